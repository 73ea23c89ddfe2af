"""GRAD-style detection (after Dai et al. 2023): negatives from a model that sees too little.

A diffusion model whose receptive field is a small patch draws what is right in every patch and
wrong as a whole. A small convolutional network learns to tell such patterns from normal images; at
test time it is alone. Read top to bottom: windows, PatchDiffs, pool, detector, map.

Re-implemented from the abstract of arXiv 2312.15911: its method section could not be read and no
code was found. Architectures, sizes, the weights of patterns, and that they are drawn into windows
of normal images, are ours.
"""

import math
from dataclasses import replace
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_lite.gaussian import GaussianDiffusion, randn
from diffad_lite.methods.base import BATCH_SIZE, Method
from diffad_lite.methods.grad_config import GRADConfig
from diffad_lite.methods.grad_weights import Reweighting
from diffad_lite.methods.prediction import Networks
from diffad_lite.networks import PatchDetector, PatchDiff
from diffad_lite.schedules import NoiseSchedule
from diffad_lite.training import FitOptions, TrainReport, left, random_flips, train_network

DETECTOR_WIDTH = 64
DETECTOR_CELL = 4  # pixels to the side for each of its logits
TWIN_STEPS = 3
PATTERN_BATCH = 8  # pictures that begin at the same level
GENERATORS_SHARE = 0.6  # of a time budget


def draw_windows(images: Tensor, sides: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """A random rectangle for each image (B, C, H, W): (B, 1, H, W), 1 inside, else 0.

    ``sides`` are its smallest and largest sides as fractions of the image's; half of it may lie
    outside.
    """
    low, high = sides
    inside = torch.ones_like(images[:, :1])
    for axis in (-2, -1):
        length = images.shape[axis]
        size, centre = torch.rand(2, len(images), generator=generator).to(images)
        half = length * (low + (high - low) * size) / 2
        place = torch.arange(length, device=images.device) + 0.5
        near = (place - length * centre[:, None]).abs() <= half[:, None]  # (B, length)
        inside = inside * (near[:, None, :, None] if axis == -2 else near[:, None, None, :])
    return inside


def parts_of_pool(pool: Tensor) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W), and which of the detector's cells were drawn, bool (n, h, w)."""
    return pool[:, :-1], F.avg_pool2d(pool[:, -1:], DETECTOR_CELL)[:, 0] > 0.5


class GRAD(Method):
    """A patch detector trained against pictures that are right only locally."""

    name = "grad"
    Config = GRADConfig
    config: GRADConfig
    network: Networks

    def _build(self) -> Networks:
        c = self.config
        schedule = NoiseSchedule.named(c.beta_schedule, c.num_timesteps)
        self.diffusion = GaussianDiffusion(schedule)
        networks: dict[str, nn.Module] = {}
        for blocks in c.blocks:
            patchdiff = PatchDiff(c.channels, blocks, width=c.width, unshuffle=c.unshuffle)
            networks[f"patchdiff{patchdiff.receptive_field}"] = patchdiff
        detector = PatchDetector(c.channels, extra=c.extra, width=DETECTOR_WIDTH)
        networks |= {
            "detector": detector,
            "weights": Reweighting(detector, c.weights, DETECTOR_WIDTH),
        }
        return Networks(networks)

    @property
    def patchdiffs(self) -> dict[str, nn.Module]:
        """The PatchDiffs by name, ``patchdiff<receptive field>``."""
        return {k: v for k, v in self.network.items() if k.startswith("patchdiff")}

    # Before the detector: generators, and what they draw.

    def noise_loss(self, network: nn.Module, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The noise-prediction loss of a batch; a scalar."""
        t = torch.randint(self.config.num_timesteps, (len(x0),), generator=generator)
        return self.diffusion.loss(network, x0, t.to(x0.device), randn(x0, generator))

    @torch.no_grad()
    def redraw(
        self, network: nn.Module, x0: Tensor, window: Tensor, timesteps: list[int], noise: Tensor
    ) -> Tensor:
        """Draw windows of normal images anew along ``timesteps``; (B, C, H, W), clipped.

        Around the window the image is at hand at every level, so the window fits its rim.

        Args:
            network: a PatchDiff.
            x0: the images as prepared (B, C, H, W).
            window: 1 where to draw, else 0, (B, 1, H, W).
            timesteps: decreasing.
            noise: like ``x0``.
        """
        d = self.diffusion
        x_t = d.add_noise(x0, timesteps[0], noise)
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            eps_hat = network(x_t, torch.full((len(x0),), t, device=x0.device))
            inside, _ = d.ddim_step(x_t, t, s, eps_hat)
            x_t = window * inside + (1 - window) * d.add_noise(x0, s, noise)
        return x_t.clamp(-1, 1)

    def draw_patterns(
        self, network: nn.Module, normal: Tensor, n: int, generator: torch.Generator
    ) -> Tensor:
        """``n`` normal images with windows from one PatchDiff; (n, C + 1, H, W), on the CPU.

        The last channel is 1 where it has drawn.
        """
        c, parts = self.config, []
        index = torch.randint(len(normal), (n,), generator=generator).split(PATTERN_BATCH)
        for i, chosen in enumerate(index):
            x0 = normal[chosen].to(self.device)
            window = draw_windows(x0, c.windows, generator)
            low, high = c.levels  # gone through evenly, one a batch
            level = low + (high - low) * (i + 0.5) / len(index)
            start = max(0, round(level * c.num_timesteps) - 1)
            timesteps = self.diffusion.schedule.timesteps(start, min(c.steps, start + 1))
            drawn = self.redraw(network, x0, window, timesteps, randn(x0, generator))
            parts.append(torch.cat([drawn, window], 1).cpu())
        return torch.cat(parts)

    def draw_pool(self, normal: Tensor, seed: int) -> Tensor:
        """The contrastive pictures (n, C + 1, H, W), in equal parts from all PatchDiffs."""
        generator = torch.Generator().manual_seed(seed)
        each = math.ceil(self.config.n_patterns / len(self.patchdiffs))
        drawn = [
            self.draw_patterns(network, normal, each, generator)
            for network in self.patchdiffs.values()
        ]
        return torch.cat(drawn)[: self.config.n_patterns]

    def twins(self, normal: Tensor, seed: int) -> Tensor:
        """Normal images as each PatchDiff leaves them when it has hardly changed anything."""
        generator, level, parts = torch.Generator().manual_seed(seed), self.config.twin_level, []
        timesteps = self.diffusion.schedule.timesteps(level, min(TWIN_STEPS, level + 1))
        for network in self.patchdiffs.values():
            for x0 in normal.split(BATCH_SIZE):
                x0, noise = x0.to(self.device), randn(x0.to(self.device), generator)
                everywhere = torch.ones_like(x0[:, :1])
                parts.append(self.redraw(network, x0, everywhere, timesteps, noise).cpu())
        return torch.cat(parts)

    # The detector.

    def detector_loss(
        self,
        network: nn.Module,
        normal: Tensor,
        pool: Tensor,
        weights: Reweighting | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Weighted logistic loss of normal and of drawn locations; a scalar."""
        index = torch.randint(len(pool), (len(normal),), generator=generator)
        chosen = random_flips(pool[index], self.config.train.flip_axes, generator).to(normal)
        contrastive, drawn = parts_of_pool(chosen)
        both = torch.cat([normal, contrastive])
        g_normal, g_contrastive = network(both).float().chunk(2)
        v: Tensor | float = 1.0
        w: Tensor | float = 1.0
        if weights is not None:
            of_normal, of_contrastive = weights.clusters(both).chunk(2)
            v, w = weights.v[of_normal], weights.w[of_contrastive]
        normal_part = (v * F.softplus(g_normal)).mean()
        return normal_part + (w * drawn * F.softplus(-g_contrastive)).sum() / drawn.sum().clamp(1)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        c, budget, reports = self.config, options["budget"], {}
        detector, weights = self.network["detector"], self.network["weights"]
        for name, network in self.patchdiffs.items():
            share = left(budget, {}, GENERATORS_SHARE / len(self.patchdiffs))
            reports[name] = train_network(
                network,
                self.noise_loss,
                train,
                c.train_patchdiff,
                stage=name,
                **(options | {"budget": share}),
            )
        pool = self.draw_pool(train, options["seed"])
        normal = torch.cat([train, self.twins(train, options["seed"])])
        steps = max(1, c.train.steps // 3), max(1, c.train.steps - c.train.steps // 3)
        used = None, (weights if c.reweight else None)
        for stage, n, own in zip(("warmup", "detector"), steps, used, strict=True):
            if own is not None:
                own.fit(detector, *parts_of_pool(pool), normal, options["seed"])
            share = left(budget, reports, 1 / 3 if stage == "warmup" else 1.0)

            def loss(network: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
                return self.detector_loss(network, x, pool, own, generator)  # noqa: B023

            settings = replace(c.train, steps=n)
            reports[stage] = train_network(
                detector, loss, normal, settings, stage=stage, **(options | {"budget": share})
            )
        return reports

    # Inference: the detector alone.

    @torch.no_grad()
    def _infer(
        self, images: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        logits = self.network["detector"](images)
        maps = F.interpolate(logits[:, None], images.shape[-2:], mode="bilinear")[:, 0]
        return maps, None, {}
