"""Baselines on frozen features: how unlike the patches of normal images is each patch?

``padim`` (Defard et al. 2021) fits one Gaussian at every position of the image; ``bank``, after
PatchCore (Roth et al. 2022), keeps patches of normal images from everywhere and measures the
distance to the nearest. Nothing is trained, unless ``backbone="denoiser"`` asks for a noise
predictor whose features take the place of ImageNet's.

Maps are not calibrated by position: on development defects that did not help either method, and
neither did PatchCore's mean over neighbouring patches, which is left out.
"""

import time
from dataclasses import replace
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from diffad_lite.core.config import Count, Profile, Timestep, check_at_most, configuration
from diffad_lite.data.images import image_keys
from diffad_lite.diffusion.gaussian import noise_generators, randn
from diffad_lite.methods.base import (
    BATCH_SIZE,
    Buffers,
    Inferred,
    InputSize,
    Method,
    Networks,
    Trace,
    exact,
)
from diffad_lite.methods.denoiser import Denoiser, DenoisingConfig
from diffad_lite.spaces.features import (
    DENOISER,
    LITE0,
    LITE0_LAYERS,
    DenoiserFeatures,
    ImageNetFeatures,
    on_grid,
)
from diffad_lite.training.loop import FitOptions, TrainReport

COVARIANCE_FLOOR = 0.01  # added to the diagonal, as in PaDiM, section III-B


@configuration
class PatchConfig(DenoisingConfig):
    """Configuration that :class:`PaDiM` and :class:`Bank` share.

    Attributes:
        backbone: ``efficientnet_lite0`` (weights in a package), a classifier of torchvision
            (downloads its weights once), or ``denoiser``.
        layers: of an ImageNet network; their maps are concatenated.
        input_size: side in pixels of an ImageNet network's input; images are resized to it.
        grid: side of the grid of patches.
        noise_level: timestep at which features of the ``denoiser`` are taken.
    """

    profiles = "patches"

    calibrate: bool = False
    backbone: str = LITE0
    layers: tuple[str, ...] = LITE0_LAYERS
    input_size: InputSize = 224
    grid: Count = 28
    noise_level: Timestep = 25

    def __post_init__(self) -> None:
        """Validate fields against each other."""
        check_at_most(self, noise_level=self.denoiser.num_timesteps - 1)

    @property
    def denoiser_training(self) -> dict[str, Any] | None:
        """The training of the backbone ``denoiser``."""
        return super().denoiser_training if self.backbone == DENOISER else None

    @classmethod
    def for_profile(cls, profile: Profile, **shape: Any) -> Self:
        """As every method; maps are blurred as in PaDiM, 4 pixels of 224."""
        base = super().for_profile(profile, **shape)
        return replace(base, smooth_sigma=4 * base.image_size / 224)


class PatchMethod(Method):
    """Map of distances between the features of an image's patches and those of normal images."""

    trained = False
    Config = PatchConfig
    config: PatchConfig
    network: Networks

    def _build(self) -> Networks:
        c = self.config
        image = torch.zeros(1, c.channels, c.image_size, c.image_size)
        features: DenoiserFeatures | ImageNetFeatures
        if c.backbone == DENOISER:
            self.denoiser = d = Denoiser(c.denoiser, c.channels)
            features = DenoiserFeatures(d.network, d.diffusion, c.noise_level)
            maps = features(image, image)
        else:
            features = ImageNetFeatures(c.backbone, c.layers, c.input_size)
            maps = features(image)
        statistics = self._statistics(sum(m.shape[1] for m in maps))
        return Networks({"features": features, "statistics": statistics})

    def _statistics(self, dims: int) -> Buffers:
        """Return untrained statistics of features with ``dims`` dimensions."""
        raise NotImplementedError

    def _summarise(self, patches: Tensor, generator: torch.Generator) -> Buffers:
        """Return statistics of normal patches (N, grid * grid, D)."""
        raise NotImplementedError

    def _distance(self, patches: Tensor) -> Tensor:
        """Return distances (B, grid * grid) of patches (B, grid * grid, D) from normal ones."""
        raise NotImplementedError

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        features, reports = self.network["features"], {}
        if self.config.backbone == DENOISER:
            reports = self.denoiser.fit(train, **options)
        else:
            features.load_weights()
        self.network.eval()
        started = time.monotonic()
        patches = []
        with exact():  # as images are scored
            for batch in train.split(BATCH_SIZE):
                generators = noise_generators(image_keys(batch), options["seed"])
                patches.append(self._patches(batch.to(self.device), generators).cpu())
        generator = torch.Generator().manual_seed(options["seed"])
        self.network["statistics"] = self._summarise(torch.cat(patches), generator)
        seconds = time.monotonic() - started
        return reports | {"statistics": TrainReport(0, seconds, torch.zeros(0))}

    def _patches(self, images: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Return features (B, grid * grid, D) of images (B, C, H, W)."""
        if self.config.backbone == DENOISER:
            maps = self.network["features"](images, randn(images, generators))
        else:
            maps = self.network["features"](images)
        return on_grid(maps, self.config.grid).flatten(2).transpose(1, 2)

    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        patches = self._patches(images, generators)
        maps = self._distance(patches).view(-1, 1, self.config.grid, self.config.grid)
        maps = F.interpolate(maps, images.shape[-2:], mode="bilinear")
        return maps[:, 0], None, {}


@configuration
class PaDiMConfig(PatchConfig):
    """Configuration of :class:`PaDiM`.

    Attributes:
        n_dims: number of features, drawn at random where there are more.
    """

    profiles = "padim"

    n_dims: Count = 550


class PaDiM(PatchMethod):
    """Mahalanobis distance to the normal patches at the same position."""

    name = "padim"
    title = "PaDiM"
    Config = PaDiMConfig
    config: PaDiMConfig

    def _statistics(self, dims: int) -> Buffers:
        P, D = self.config.grid**2, min(dims, self.config.n_dims)
        return Buffers(
            mean=torch.zeros(P, D), whitening=torch.zeros(P, D, D), picked=torch.arange(D)
        )

    def _summarise(self, patches: Tensor, generator: torch.Generator) -> Buffers:
        picked = torch.randperm(patches.shape[-1], generator=generator)[: self.config.n_dims]
        patches = patches[..., picked]
        N, P, D = patches.shape
        mean, whitening = patches.mean(0), torch.zeros(P, D, D)
        for p in range(P):
            centred = (patches[:, p] - mean[p]).double()
            covariance = centred.T @ centred / max(1, N - 1) + COVARIANCE_FLOOR * torch.eye(D)
            # With covariance = L L^T the distance is |L^-1 (x - mean)|.
            factor = torch.linalg.cholesky(covariance)
            whitening[p] = torch.linalg.solve_triangular(factor, torch.eye(D).double(), upper=False)
        return Buffers(mean=mean, whitening=whitening, picked=picked).to(self.device)

    def _distance(self, patches: Tensor) -> Tensor:
        s: Buffers = self.network["statistics"]
        centred = patches[..., s.picked] - s.mean  # (B, P, D)
        return torch.einsum("pde,bpe->bpd", s.whitening, centred).norm(dim=-1)


@configuration
class BankConfig(PatchConfig):
    """Configuration of :class:`Bank`.

    Attributes:
        bank_size: patches that are kept.
        pool_size: patches, drawn at random, among which the bank is chosen.
    """

    bank_size: Count = 4000
    pool_size: Count = 40_000


class Bank(PatchMethod):
    """Distance to the nearest patch in a bank of normal patches, at any position."""

    name = "bank"
    title = "patch bank"
    Config = BankConfig
    config: BankConfig

    def _statistics(self, dims: int) -> Buffers:
        return Buffers(bank=torch.zeros(self.config.bank_size, dims))

    def _summarise(self, patches: Tensor, generator: torch.Generator) -> Buffers:
        pool = patches.flatten(0, 1)
        pool = pool[torch.randperm(len(pool), generator=generator)[: self.config.pool_size]]
        bank = pool[farthest_points(pool, self.config.bank_size)]
        # Where there are fewer patches than asked for, repeating one changes no distance.
        missing = self.config.bank_size - len(bank)
        return Buffers(bank=torch.cat([bank, bank[:1].expand(missing, -1)])).to(self.device)

    def _distance(self, patches: Tensor) -> Tensor:
        bank: Tensor = self.network["statistics"].bank
        return torch.stack([torch.cdist(image, bank).amin(1) for image in patches])


def farthest_points(points: Tensor, n: int) -> Tensor:
    """Return indices of ``n`` of the points (N, D), each the farthest from those before it.

    This is the greedy cover of PatchCore (Roth et al. 2022, algorithm 1): it keeps rare normal
    patches, and few of the common ones.
    """
    squares = points.square().sum(1)
    distance = torch.full((len(points),), torch.inf)
    chosen = [0]
    while len(chosen) < min(n, len(points)):
        newest = chosen[-1]
        to_newest = squares - 2 * (points @ points[newest]) + squares[newest]
        distance = torch.minimum(distance, to_newest)
        distance[newest] = -1  # never again, even among equal points
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen)
