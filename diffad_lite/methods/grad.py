"""GRAD-style detection (after Dai et al. 2023): negatives from models of small receptive field.

A diffusion model whose receptive field is a small patch draws images that are right in every patch
and wrong as a whole. A small convolutional network learns to separate such patterns from normal
images; only this network runs at test time. Read top to bottom: weights, configuration, PatchDiffs,
pool, detector, map.

Re-implemented from the abstract of arXiv 2312.15911: its method section could not be read and no
code was found. Ours are the architectures, the sizes, the weights of patterns, and the choice to
draw patterns into windows of normal images.
"""

import copy
import math
import time
import warnings
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Unpack

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffad_lite.core.config import (
    Count,
    Size,
    Timestep,
    Widths,
    check_at_most,
    configuration,
    convert,
)
from diffad_lite.core.files import read_json, write_json
from diffad_lite.diffusion.gaussian import GaussianDiffusion, randn
from diffad_lite.diffusion.schedules import BetaSchedule, NoiseSchedule
from diffad_lite.methods.base import (
    BATCH_SIZE,
    Inferred,
    Method,
    MethodConfig,
    Networks,
    Trace,
    choose_images,
)
from diffad_lite.networks.patchnet import PatchDetector, PatchDiff
from diffad_lite.training import processes
from diffad_lite.training.loop import (
    FitOptions,
    TrainReport,
    random_flips,
    remaining_budget,
    train_network,
)
from diffad_lite.training.state import TrainConfig

# ------------------------------------------------------------------------ weights of patterns
#
# Drawn patterns are long-tailed (a few patterns are most of them) and unlabelled (many are normal).
# Without labels, rare patterns get more weight, and patterns that normal images have get less.
# Locations are clustered by their features; the weight of a cluster depends on its fractions of the
# contrastive and of the normal locations. The rule is ours: GRAD's could not be read.

SAMPLED = 20_000  # locations that are clustered
CLIP = 10.0  # weights lie within 1 / CLIP and CLIP
Exponent = Annotated[float, Field(ge=0, le=10)]


@configuration
class WeightConfig:
    """Configuration of :class:`Reweighting`.

    Attributes:
        n_clusters: K.
        flatten_contrastive: exponent a; larger values give rare contrastive patterns more weight.
        flatten_normal: exponent b; likewise for normal patterns.
        filter_normal: exponent eta; larger values reduce the weight of patterns that normal images
            have.
    """

    n_clusters: Size = 32
    flatten_contrastive: Exponent = 0.5
    flatten_normal: Exponent = 0.5
    filter_normal: Exponent = 2.0


def pattern_weights(
    contrastive: Tensor, normal: Tensor, config: WeightConfig
) -> tuple[Tensor, Tensor]:
    """Return the weights of clusters.

    ``w ~ c^-a (1 - n / (n + c))^eta`` and ``v ~ n^-b``, each of mean 1 over its locations, then
    clipped.

    Args:
        contrastive: fraction c of contrastive locations in each cluster (K,), positive.
        normal: fraction n of normal locations, likewise.
        config: the exponents a, b and eta.

    Returns:
        ``w`` for contrastive and ``v`` for normal locations, (K,) each.
    """
    abnormal = contrastive / (contrastive + normal)
    w = contrastive**-config.flatten_contrastive * abnormal**config.filter_normal
    v = normal**-config.flatten_normal
    w, v = w / (w * contrastive).sum(), v / (v * normal).sum()
    return w.clamp(1 / CLIP, CLIP), v.clamp(1 / CLIP, CLIP)


class Reweighting(nn.Module):
    """Clusters of a frozen detector's features, and their weights.

    Args:
        detector: of the same architecture as the one whose features are clustered.
        config: see :class:`WeightConfig`.
        width: number of its features.
    """

    contrastive: Tensor
    normal: Tensor
    w: Tensor
    v: Tensor
    centres: Tensor

    def __init__(self, detector: PatchDetector, config: WeightConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.snapshot = copy.deepcopy(detector).requires_grad_(False)
        for name in ("contrastive", "normal", "w", "v"):
            self.register_buffer(name, torch.ones(config.n_clusters))
        self.register_buffer("centres", torch.zeros(config.n_clusters, width))

    @torch.no_grad()
    def fit(
        self,
        detector: PatchDetector,
        contrastive: Tensor,
        drawn: Tensor,
        normal: Tensor,
        seed: int,
    ) -> None:
        """Freeze a copy of the detector, cluster its features, and set the weights.

        A copy, because the features of a detector that is trained further would leave the clusters.

        Args:
            detector: after its warm-up.
            contrastive: images (N, C, H, W).
            drawn: locations that a PatchDiff has drawn, bool (N, h, w).
            normal: images (M, C, H, W).
            seed: of the clusters.
        """
        from sklearn.cluster import MiniBatchKMeans  # slow to import

        self.snapshot.load_state_dict(detector.state_dict())
        points = [self._points(contrastive)[drawn.flatten()], self._points(normal)]
        rng = torch.Generator().manual_seed(seed)
        sample = torch.cat([p[torch.randperm(len(p), generator=rng)[:SAMPLED]] for p in points])
        k = min(self.config.n_clusters, len(sample))
        clustering = MiniBatchKMeans(k, random_state=seed, n_init=3).fit(sample.numpy())
        self.centres[:k] = torch.from_numpy(clustering.cluster_centers_).to(self.centres)
        self.centres[k:] = 10.0  # far from all features
        for name, features in zip(("contrastive", "normal"), points, strict=True):
            counts = torch.bincount(self._nearest(features.to(self.centres)), minlength=len(self.w))
            getattr(self, name).copy_((counts + 1) / (counts + 1).sum())  # none is 0
        w, v = pattern_weights(self.contrastive, self.normal, self.config)
        self.w.copy_(w)
        self.v.copy_(v)

    def _points(self, images: Tensor) -> Tensor:
        """Return the features of every location (n, width), on the CPU."""
        device = self.centres.device
        parts = [self.snapshot.features(part.to(device)).cpu() for part in images.split(32)]
        return torch.cat(parts).permute(0, 2, 3, 1).flatten(0, 2)

    def _nearest(self, points: Tensor) -> Tensor:
        return torch.cdist(points, self.centres).argmin(1)

    @torch.no_grad()
    def clusters(self, images: Tensor) -> Tensor:
        """Return the cluster of each location, (B, h, w)."""
        features = self.snapshot.features(images).float()
        nearest = self._nearest(features.permute(0, 2, 3, 1).flatten(0, 2))
        return nearest.view(len(images), *features.shape[-2:])


# -------------------------------------------------------------------------- configuration


@configuration
class GRADConfig(MethodConfig):
    """Configuration of GRAD; defaults are the lite profile at 64 pixels.

    Attributes:
        beta_schedule: of the forward process.
        num_timesteps: T.
        blocks: residual blocks of each PatchDiff; its receptive field has
            ``unshuffle (2 blocks + 1)`` pixels.
        width: channels of the PatchDiffs.
        unshuffle: side in pixels of their cells.
        train_patchdiff: training of each PatchDiff.
        n_patterns: images in the pool, from all PatchDiffs together: normal images in which a
            PatchDiff has redrawn a window.
        steps: network evaluations per image of the pool.
        windows: smallest and largest side of the windows, as fractions of the image's.
        noise_levels: smallest and largest start timestep, as fractions of T.
        twin_noise_level: timestep to which normal images are noised, then denoised by each
            PatchDiff. These twins count as normal, so that the detector does not learn the mere
            touch of a PatchDiff.
        extra: convolutions that widen the detector's receptive field to 22 + 8 extra pixels.
        train: training of the detector; all weights are 1 in its first third.
        reweight: use the weights of patterns afterwards; harmful on development defects.
        weights: the rule of the weights.
    """

    profiles = "grad"

    # Chosen on development defects and uncertain cells, like windows, twins and no weights:
    standardise: bool = True
    calibrate: bool = False
    beta_schedule: BetaSchedule = "linear"
    num_timesteps: Count = 1000
    blocks: Widths = (2, 4)
    width: Size = 48
    unshuffle: Size = 2
    train_patchdiff: TrainConfig = field(
        default_factory=lambda: TrainConfig(steps=1500, learning_rate=2e-3, ema_decay=0.995)
    )
    n_patterns: Count = 256
    steps: Count = 40
    windows: tuple[float, ...] = (0.0625, 0.75)
    noise_levels: tuple[float, ...] = (0.2, 1.0)
    twin_noise_level: Timestep = 30
    extra: Annotated[int, Field(ge=0, le=100)] = 2
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=1500, batch_size=24, learning_rate=1e-3, ema_decay=0.995
        )
    )
    reweight: bool = False
    weights: WeightConfig = field(default_factory=WeightConfig)

    def __post_init__(self) -> None:
        """Validate fields against each other."""
        check_at_most(self, steps=self.num_timesteps, twin_noise_level=self.num_timesteps - 1)
        for name in ("windows", "noise_levels"):
            ends = getattr(self, name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1] <= 1:
                raise ValueError(f"GRADConfig.{name} must be (low, high) within 0..1, got {ends}")
        if len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"GRADConfig.blocks must be different numbers, got {self.blocks}")
        if self.image_size % self.cell or self.image_size < 2 * self.cell:
            raise ValueError(
                f"GRADConfig.image_size must be a multiple of {self.cell}, the cells of detector "
                f"and PatchDiffs in pixels, and at least {2 * self.cell}, got {self.image_size}"
            )

    @property
    def cell(self) -> int:
        """Side in pixels that the cells of detector and PatchDiffs both divide."""
        return math.lcm(DETECTOR_CELL, self.unshuffle)


# --------------------------------------------------------------------------------- method

DETECTOR_WIDTH = 64
DETECTOR_CELL = 4  # pixels to the side for each of its logits
TWIN_STEPS = 3
PATTERN_BATCH = 8  # images of the pool with the same start timestep
GENERATORS_FRACTION = 0.6  # of a time budget
POOL_FRACTION = 0.5  # of the time budget that remains after the generators
TWINS_FRACTION = 0.3  # of the pool's time
WARMUP_FRACTION = 1 / 3  # of the time budget that remains after the pool


def draw_windows(images: Tensor, sides: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """Draw a random rectangle per image (B, C, H, W): (B, 1, H, W), 1 inside, else 0.

    ``sides`` are its smallest and largest side as fractions of the image's. Its centre lies in the
    image.
    """
    low, high = sides
    inside = torch.ones_like(images[:, :1])
    for axis in (-2, -1):
        length = images.shape[axis]
        size, centre = torch.rand(2, len(images), generator=generator).to(images)
        half = length * (low + (high - low) * size) / 2
        pixels = torch.arange(length, device=images.device) + 0.5
        within = (pixels - length * centre[:, None]).abs() <= half[:, None]  # (B, length)
        inside = inside * (within[:, None, :, None] if axis == -2 else within[:, None, None, :])
    return inside


def parts_of_pool(pool: Tensor) -> tuple[Tensor, Tensor]:
    """Return images (n, C, H, W), and which detector cells were drawn, bool (n, h, w)."""
    return pool[:, :-1], F.avg_pool2d(pool[:, -1:], DETECTOR_CELL)[:, 0] > 0.5


class GRAD(Method):
    """A patch detector trained against images that are right only locally."""

    name = "grad"
    title = "GRAD-style"
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
    def sides(self) -> tuple[int, int]:
        """Return the smallest and the dividing side; padding by reflection needs two cells."""
        return 2 * self.config.cell, self.config.cell

    @property
    def patchdiffs(self) -> dict[str, nn.Module]:
        """The PatchDiffs by name, ``patchdiff<receptive field>``."""
        return {k: v for k, v in self.network.items() if k.startswith("patchdiff")}

    # Before the detector: PatchDiffs and their pool.

    def noise_loss(self, network: nn.Module, x0: Tensor, generator: torch.Generator) -> Tensor:
        """Return the noise-prediction loss of a batch; a scalar (Ho et al. 2020, algorithm 1)."""
        t = torch.randint(self.config.num_timesteps, (len(x0),), generator=generator)
        return self.diffusion.loss(network, x0, t.to(x0.device), randn(x0, generator))

    @torch.no_grad()
    def redraw(
        self, network: nn.Module, x0: Tensor, window: Tensor, timesteps: list[int], noise: Tensor
    ) -> Tensor:
        """Redraw windows of normal images along ``timesteps``; (B, C, H, W), clipped.

        Outside of the window the image, noised to each timestep, is given, so that the window fits
        its surroundings.

        Args:
            network: a PatchDiff.
            x0: the images as the networks see them (B, C, H, W).
            window: 1 where to draw, else 0, (B, 1, H, W).
            timesteps: decreasing.
            noise: like ``x0``.
        """
        d = self.diffusion
        x_t = d.add_noise(x0, timesteps[0], noise)
        for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
            noise_hat = network(x_t, torch.full((len(x0),), t, device=x0.device))
            inside, _ = d.ddim_step(x_t, t, s, noise_hat)
            x_t = window * inside + (1 - window) * d.add_noise(x0, s, noise)
        return x_t.clamp(-1, 1)

    def draw_patterns(
        self, network: nn.Module, normal: Tensor, n: int, generator: torch.Generator
    ) -> Tensor:
        """Redraw windows of ``n`` normal images by one PatchDiff; (n, C + 1, H, W), on the CPU.

        The last channel is 1 inside the window.
        """
        c, parts = self.config, []
        index = torch.randint(len(normal), (n,), generator=generator).split(PATTERN_BATCH)
        for i, chosen in enumerate(index):
            x0 = normal[chosen].to(self.device)
            window = draw_windows(x0, c.windows, generator)
            low, high = c.noise_levels  # evenly spaced, one per batch
            noise_level = low + (high - low) * (i + 0.5) / len(index)
            start = max(0, round(noise_level * c.num_timesteps) - 1)
            timesteps = self.diffusion.schedule.timesteps(start, min(c.steps, start + 1))
            drawn = self.redraw(network, x0, window, timesteps, randn(x0, generator))
            parts.append(torch.cat([drawn, window], 1).cpu())
        return torch.cat(parts)

    def draw_pool(self, normal: Tensor, seed: int, n: int | None = None) -> Tensor:
        """Draw the contrastive images (n, C + 1, H, W), in equal parts from all PatchDiffs.

        None draws ``config.n_patterns`` of them.
        """
        n = self.config.n_patterns if n is None else n
        generator = torch.Generator().manual_seed(seed)
        each = math.ceil(n / len(self.patchdiffs))
        drawn = [
            self.draw_patterns(network, normal, each, generator)
            for network in self.patchdiffs.values()
        ]
        return torch.cat(drawn)[:n]

    def pool_sizes(
        self, normal: Tensor, budget: float | None, workdir: Path | None
    ) -> tuple[int, int]:
        """Return the numbers of contrastive images and of normal images that get twins.

        Both are smaller where ``budget`` (s) does not allow all of them, which a warning says.
        ``workdir`` keeps them, as a resumed training must draw the same pool.
        """
        n, N, P = self.config.n_patterns, len(normal), len(self.patchdiffs)
        if budget is None:
            return n, N
        path = workdir / "pool.json" if workdir else None
        if path and path.exists():
            sizes = convert(read_json(path, "sizes of the pool"), dict[str, int], str(path))
            return sizes["patterns"], sizes["twins"]
        started, generator = time.monotonic(), torch.Generator().manual_seed(0)
        for network in self.patchdiffs.values():
            self.draw_patterns(network, normal, 1, generator)
        elapsed = time.monotonic() - started  # of config.steps steps by each PatchDiff
        remaining = max(0.0, budget - elapsed)
        twin_time = elapsed * TWIN_STEPS / self.config.steps
        sizes = {
            "patterns": min(n, max(P, int((1 - TWINS_FRACTION) * remaining / elapsed * P))),
            "twins": min(N, max(1, int(TWINS_FRACTION * remaining / twin_time))),
        }
        sizes = processes.gather(sizes)[0]  # the first process decides
        if sizes != {"patterns": n, "twins": N}:
            warnings.warn(
                f"the time budget (--max-minutes) allows {sizes['patterns']} of {n} contrastive "
                f"images, and twins of {sizes['twins']} of {N} normal ones; allow more time, or "
                "lower n_patterns",
                stacklevel=3,
            )
        if path and processes.rank() == 0:
            write_json(path, sizes)
        return sizes["patterns"], sizes["twins"]

    def twins(self, normal: Tensor, seed: int) -> Tensor:
        """Return normal images after a few steps of each PatchDiff from a low noise level."""
        generator, parts = torch.Generator().manual_seed(seed), []
        start = self.config.twin_noise_level
        timesteps = self.diffusion.schedule.timesteps(start, min(TWIN_STEPS, start + 1))
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
        """Return the weighted logistic loss of normal and of drawn locations; a scalar."""
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

    # Training: four stages, all of them inside the time budget. A resumed training makes pool and
    # weights again; only that time is reported.

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        budget, seed = options["budget"], options["seed"]
        reports = self.train_patchdiffs(train, **options)
        started = time.monotonic()
        pool_budget = remaining_budget(budget, reports, POOL_FRACTION)
        n_patterns, n_twins = self.pool_sizes(train, pool_budget, options["workdir"])
        pool = self.draw_pool(train, seed, n_patterns)
        normal = torch.cat([train, self.twins(choose_images(train, n_twins, seed), seed)])
        reports["pool"] = TrainReport(0, time.monotonic() - started, torch.zeros(0))
        options["budget"] = remaining_budget(budget, reports, WARMUP_FRACTION)
        reports["warmup"] = self.warm_up(normal, pool, **options)
        options["budget"] = remaining_budget(budget, reports)
        reports["detector"] = self.train_detector(normal, pool, **options)
        return reports

    def train_patchdiffs(
        self, train: Tensor, **options: Unpack[FitOptions]
    ) -> dict[str, TrainReport]:
        """Train each PatchDiff to predict noise; all get the same time."""
        fraction = GENERATORS_FRACTION / len(self.patchdiffs)
        options["budget"] = remaining_budget(options["budget"], {}, fraction)
        config = self.config.train_patchdiff
        return {
            name: train_network(network, self.noise_loss, train, config, stage=name, **options)
            for name, network in self.patchdiffs.items()
        }

    def warm_up(self, normal: Tensor, pool: Tensor, **options: Unpack[FitOptions]) -> TrainReport:
        """Train the detector for a third of its steps, unweighted; then set the weights."""
        steps = max(1, self.config.train.total_steps(len(normal)) // 3)
        report = self._train("warmup", steps, normal, pool, None, options)
        if not self.config.reweight:
            return report
        started = time.monotonic()
        detector, weights = self.network["detector"], self.network["weights"]
        weights.fit(detector, *parts_of_pool(pool), normal, options["seed"])
        return replace(report, seconds=report.seconds + time.monotonic() - started)

    def train_detector(
        self, normal: Tensor, pool: Tensor, **options: Unpack[FitOptions]
    ) -> TrainReport:
        """Train the detector for the rest of its steps, with the weights of patterns."""
        steps = self.config.train.total_steps(len(normal))
        weights = self.network["weights"] if self.config.reweight else None
        return self._train("detector", max(1, steps - steps // 3), normal, pool, weights, options)

    def _train(
        self,
        stage: str,
        steps: int,
        normal: Tensor,
        pool: Tensor,
        weights: Reweighting | None,
        options: FitOptions,
    ) -> TrainReport:
        def loss(network: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
            return self.detector_loss(network, x, pool, weights, generator)

        config = replace(self.config.train, steps=steps, epochs=None)
        detector = self.network["detector"]
        return train_network(detector, loss, normal, config, stage=stage, **options)

    # Inference: the detector alone.

    @torch.no_grad()
    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        logits = self.network["detector"](images)
        maps = F.interpolate(logits[:, None], images.shape[-2:], mode="bilinear")[:, 0]
        return maps, None, {}
