"""GRAD-style detection (after Dai et al. 2023): negatives from a model that sees too little.

A diffusion model whose receptive field is a small patch draws pictures that are right in every
patch and wrong as a whole. A small convolutional network learns to tell their patches from normal
ones; at test time it is alone. Read top to bottom: configuration, PatchDiffs, pool, detector, map.

Re-implemented from the abstract of arXiv 2312.15911: its method section could not be read and no
code was found. Architectures, sizes and the weights of patterns are ours.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_lite.config import Profile, check_ranges
from diffad_lite.gaussian import GaussianDiffusion, randn
from diffad_lite.methods.base import BATCH_SIZE, Method
from diffad_lite.methods.grad_weights import Reweighting, WeightConfig
from diffad_lite.methods.profiles import MethodConfig
from diffad_lite.networks import PatchDetector, PatchDiff
from diffad_lite.readers import FLIP_AXES
from diffad_lite.schedules import BetaSchedule, NoiseSchedule
from diffad_lite.training import FitOptions, TrainConfig, TrainReport, random_flips, train_network

DETECTOR_WIDTH = 64
GENERATORS_SHARE = 0.6  # of a time budget


@dataclass(frozen=True)
class GRADConfig(MethodConfig):
    """Configuration of :class:`GRAD`; defaults are the lite profile at 64 pixels.

    Attributes:
        beta_schedule: of the forward process.
        num_timesteps: T.
        blocks: one PatchDiff an entry; its window has ``unshuffle (2 blocks + 1)`` pixels.
        width: of the PatchDiffs.
        unshuffle: side of their cells.
        train_patchdiff: how each is trained.
        n_patterns: pictures in the pool, of all PatchDiffs together.
        steps: network evaluations for each of them.
        from_noise: share of them that begin as pure noise; the others begin as normal images at
            levels drawn from ``partial``.
        partial: range of these levels as fractions of T.
        extra: convolutions that widen the detector's window, 21 + 8 extra pixels.
        noise: deviation of the noise on all pictures that the detector learns from, so that it
            does not learn the generators' fingerprint.
        train: the detector, weights being 1 in the first third.
        reweight: give patterns their weights after it.
        weights: how.
    """

    beta_schedule: BetaSchedule = "linear"
    num_timesteps: int = 1000
    blocks: tuple[int, ...] = (2, 4)
    width: int = 48
    unshuffle: int = 2
    train_patchdiff: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1500, learning_rate=2e-3, ema_decay=0.995)
    )
    n_patterns: int = 256
    steps: int = 40
    from_noise: float = 0.5
    partial: tuple[float, ...] = (0.4, 0.8)
    extra: int = 2
    noise: float = 0.07
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500, batch_size=24, learning_rate=1e-3, ema_decay=0.995
        )
    )
    reweight: bool = True
    weights: WeightConfig = field(default_factory=WeightConfig)

    def __post_init__(self) -> None:
        """Raise ValueError for counts and ranges that cannot be."""
        super().__post_init__()
        check_ranges(self, num_timesteps=(1, math.inf), n_patterns=(1, math.inf))
        check_ranges(self, steps=(1, self.num_timesteps), from_noise=(0, 1), extra=(0, 100))
        check_ranges(self, noise=(0, 1))
        low, high = self.partial if len(self.partial) == 2 else (1.0, 0.0)
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"GRADConfig.partial must be (low, high) within 0..1, got {self.partial}"
            )
        if not self.blocks or min(self.blocks) < 1 or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(
                f"GRADConfig.blocks are different numbers from 1 on, got {self.blocks}"
            )
        if self.image_size % math.lcm(4, self.unshuffle):
            raise ValueError(
                f"GRADConfig.image_size must be a multiple of {math.lcm(4, self.unshuffle)}, the "
                f"detector's and the PatchDiffs' cells, got {self.image_size}"
            )

    @classmethod
    def for_profile(cls, profile: Profile, *, dataset: str | None = None, **shape: Any) -> Self:
        """``ci`` is a smoke test, ``lite`` the defaults, ``paper`` is assumed field by field."""
        base = super().for_profile(profile, dataset=dataset, **shape)
        flips = FLIP_AXES.get(dataset or "", ())
        if profile == "ci":
            short = TrainConfig(steps=20, batch_size=8, flip_axes=flips)
            smoke = {"blocks": (1, 2), "width": 16, "train_patchdiff": short, "train": short}
            return replace(base, **smoke, n_patterns=16, steps=4, weights=WeightConfig(4))
        stages = {
            name: replace(getattr(base, name), flip_axes=flips)
            for name in ("train_patchdiff", "train")
        }
        if profile == "lite":
            return replace(base, **stages)
        # Assumed, all of it: the paper could not be read. 256 px; windows of about 1/16, 1/8 and
        # 1/4 of the side; T = 1000, linear; the learning rate of SinDiffusion's public code, a
        # related model of patches; a pool and a number of clusters some times larger than ours.
        return replace(
            base,
            blocks=(3, 7, 15),
            width=96,
            train_patchdiff=TrainConfig(steps=50_000, learning_rate=5e-4, flip_axes=flips),
            n_patterns=1024,
            steps=50,
            extra=8,
            train=TrainConfig(20_000, 24, 5e-4, flip_axes=flips),
            weights=WeightConfig(128),
            calibrate=False,
            smooth_sigma=4.0,
        )


class GRAD(Method):
    """A patch detector trained against pictures that are right only locally."""

    name = "grad"
    Config = GRADConfig
    config: GRADConfig

    def _build(self) -> nn.Module:
        c = self.config
        schedule = NoiseSchedule.named(c.beta_schedule, c.num_timesteps)
        self.diffusion = GaussianDiffusion(schedule)
        networks: dict[str, nn.Module] = {}
        for blocks in c.blocks:
            patchdiff = PatchDiff(c.channels, blocks, width=c.width, unshuffle=c.unshuffle)
            networks[f"patchdiff{patchdiff.receptive_field}"] = patchdiff
        networks["detector"] = PatchDetector(c.channels, extra=c.extra, width=DETECTOR_WIDTH)
        networks["weights"] = Reweighting(networks["detector"], c.weights, DETECTOR_WIDTH)
        return nn.ModuleDict(networks)

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
    def draw_patterns(
        self, network: nn.Module, normal: Tensor, n: int, generator: torch.Generator
    ) -> Tensor:
        """Draw ``n`` pictures (n, C, H, W) from one PatchDiff, as prepared, on the CPU.

        A share begins as noise, the rest as normal images at levels between.
        """
        c, d, T = self.config, self.diffusion, self.config.num_timesteps
        low, high = c.partial
        parts = []
        for first in range(0, n, BATCH_SIZE):
            size = min(BATCH_SIZE, n - first)
            x0 = normal[torch.randint(len(normal), (size,), generator=generator)].to(self.device)
            noise = randn(x0, generator)
            drawn = torch.rand(2, generator=generator).tolist()
            level = 1.0 if drawn[0] < c.from_noise else low + (high - low) * drawn[1]
            start = max(0, round(level * T) - 1)
            x_t = noise if level == 1 else d.add_noise(x0, start, noise)
            timesteps = d.schedule.timesteps(start, min(c.steps, start + 1))
            *_, last = d.ddim_sample(network, x_t, timesteps)
            parts.append(last.x.clamp(-1, 1).cpu())
        return torch.cat(parts)

    def draw_pool(self, normal: Tensor, seed: int) -> Tensor:
        """Draw the contrastive pictures, in equal parts from all PatchDiffs."""
        generator = torch.Generator().manual_seed(seed)
        each = math.ceil(self.config.n_patterns / len(self.patchdiffs))
        drawn = [
            self.draw_patterns(network, normal, each, generator)
            for network in self.patchdiffs.values()
        ]
        return torch.cat(drawn)[: self.config.n_patterns]

    # The detector.

    def detector_loss(
        self,
        network: nn.Module,
        normal: Tensor,
        pool: Tensor,
        weights: Reweighting | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Weighted logistic loss of locations, as many contrastive as normal ones; a scalar."""
        index = torch.randint(len(pool), (len(normal),), generator=generator)
        contrastive = random_flips(pool[index], self.config.train.flip_axes, generator)
        both = torch.cat([normal, contrastive.to(normal)])
        g_normal, g_contrastive = network(self.disguise(both, generator)).float().chunk(2)
        v, w = 1.0, 1.0
        if weights is not None:
            of_normal, of_contrastive = weights.clusters(both).chunk(2)
            v, w = weights.v[of_normal], weights.w[of_contrastive]
        return (v * F.softplus(g_normal)).mean() + (w * F.softplus(-g_contrastive)).mean()

    def disguise(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The same rounding and noise for all, so that generated pictures are not told by them."""
        rounded = (images * 127.5).round() / 127.5
        return rounded + self.config.noise * randn(images, generator)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        c, budget, reports = self.config, options["budget"], {}
        detector, weights = self.network["detector"], self.network["weights"]
        for name, network in self.patchdiffs.items():
            share = None if budget is None else GENERATORS_SHARE * budget / len(self.patchdiffs)
            reports[name] = train_network(
                network,
                self.noise_loss,
                train,
                c.train_patchdiff,
                stage=name,
                **(options | {"budget": share}),
            )
        pool = self.draw_pool(train, options["seed"])
        steps = max(1, c.train.steps // 3), max(1, c.train.steps - c.train.steps // 3)
        used = None, (weights if c.reweight else None)
        for stage, n, own in zip(("warmup", "detector"), steps, used, strict=True):
            if own is not None:
                own.fit(detector, pool, train, options["seed"])
            left = None if budget is None else budget - sum(r.seconds for r in reports.values())
            share = None if left is None else left * (1 / 3 if stage == "warmup" else 1)

            def loss(network: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
                return self.detector_loss(network, x, pool, own, generator)  # noqa: B023

            settings = replace(c.train, steps=n)
            reports[stage] = train_network(
                detector, loss, train, settings, stage=stage, **(options | {"budget": share})
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
