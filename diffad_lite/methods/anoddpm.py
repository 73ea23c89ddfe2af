"""AnoDDPM (Wyatt et al. 2022): noise an image up to a level, denoise it, compare.

The network has seen only normal images, so what it paints back is normal; what noise up to level
``t`` destroys and the network does not paint back is the anomaly. Read top to bottom:
configuration, training, reconstruction, map.

Levels are far below those of the 256-pixel papers: at 64 pixels a thin crack is gone from the
reconstruction at small ``t`` already, and everything else the noise destroys is only error.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from diffad_lite.core.config import Profile, check_ranges
from diffad_lite.diffusion.gaussian import GaussianDiffusion, Generators, Step, final_step, randn
from diffad_lite.diffusion.schedules import BetaSchedule, NoiseSchedule
from diffad_lite.diffusion.simplex import simplex_noise
from diffad_lite.methods.base import Method, MethodConfig, exact, inference
from diffad_lite.networks.unet import UNet
from diffad_lite.training.loop import FitOptions, TrainReport, train_network
from diffad_lite.training.state import TrainConfig

PRIOR_SHARE = 0.7  # of a time budget, where it is the first stage of another method


@dataclass(frozen=True)
class AnoDDPMConfig(MethodConfig):
    """Configuration of :class:`AnoDDPM`; defaults are the lite profile at 64 pixels.

    Attributes:
        beta_schedule: of the forward process.
        num_timesteps: T.
        base_channels: see :class:`~diffad_lite.networks.unet.UNet`, as the next four.
        channel_mults: widths of the levels.
        blocks_per_level: residual blocks.
        attention_levels: levels with self-attention.
        unshuffle: factor of the stem.
        noise_level: timestep t that images are noised to, 0 .. T-1.
        steps: network evaluations from there back to 0; 1 is the one-step estimate.
        n_noises: independent noises whose reconstructions are averaged.
        train: how the noise predictor is trained.
    """

    beta_schedule: BetaSchedule = "linear"
    num_timesteps: int = 1000
    base_channels: int = 32
    channel_mults: tuple[int, ...] = (1, 2, 4)
    blocks_per_level: int = 1
    attention_levels: tuple[int, ...] = (2,)
    unshuffle: int = 2
    noise_level: int = inference(25)
    steps: int = inference(1)
    n_noises: int = inference(4)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Validate field values."""
        super().__post_init__()
        check_ranges(self, num_timesteps=(1, math.inf), n_noises=(1, math.inf))
        check_ranges(self, noise_level=(0, self.num_timesteps - 1))
        check_ranges(self, steps=(1, self.noise_level + 1))

    @classmethod
    def for_profile(
        cls, profile: Profile, *, flip_axes: tuple[int, ...] = (), **shape: Any
    ) -> Self:
        """``ci`` is a smoke test, ``lite`` the defaults; the sources of ``paper`` stand below."""
        base = super().for_profile(profile, **shape)
        if profile == "ci":
            train = TrainConfig(steps=20, batch_size=8, flip_axes=flip_axes)
            return replace(base, base_channels=16, n_noises=1, train=train)
        if profile == "lite":
            return replace(base, train=TrainConfig(flip_axes=flip_axes))
        # Public code (Julian-Wyatt/AnoDDPM), test_args/args28.json and UNet.py: 256 px, base 128,
        # multipliers (1, 1, 2, 2, 4, 4), two blocks, attention at 16 and 8 px, linear betas,
        # T = 1000, AdamW 1e-4, batch 1, 3000 epochs of 100 images, EMA 0.9999; detection.py,
        # anomalous_metric_calculation: 200 steps. Ours differs: the learning rate warms up and
        # decays, gradients are clipped, the way back is DDIM, and maps are blurred and calibrated
        # as in lite. Noise is simplex in that file: AnoDDPMSimplex.
        train = TrainConfig(
            steps=300_000, batch_size=1, learning_rate=1e-4, ema_decay=0.9999, flip_axes=flip_axes
        )
        return replace(
            base,
            base_channels=128,
            channel_mults=(1, 1, 2, 2, 4, 4),
            blocks_per_level=2,
            attention_levels=(4, 5),
            unshuffle=1,
            noise_level=199,
            steps=200,
            n_noises=1,
            train=train,
        )


class AnoDDPM(Method):
    """Partial noising and reconstruction with a noise predictor trained on normal images."""

    name = "anoddpm"
    Config = AnoDDPMConfig
    config: AnoDDPMConfig
    network: UNet

    def _build(self, **unet: Any) -> UNet:
        c = self.config
        self.diffusion = GaussianDiffusion(NoiseSchedule.named(c.beta_schedule, c.num_timesteps))
        self.diffusion.schedule.timesteps(c.noise_level, c.steps)  # raises if out of range
        return UNet(
            c.channels,
            base_channels=c.base_channels,
            channel_mults=c.channel_mults,
            blocks_per_level=c.blocks_per_level,
            attention_levels=c.attention_levels,
            unshuffle=c.unshuffle,
            **unet,
        )

    def draw_noise(self, like: Tensor, generators: Generators) -> Tensor:
        """The noise of the forward process, shaped as ``like`` (B, C, H, W)."""
        return randn(like, generators)

    # Training: Ho et al. 2020, algorithm 1.

    def loss(self, network: nn.Module, x0: Tensor, generator: torch.Generator) -> Tensor:
        """The noise-prediction loss of a batch at timesteps drawn uniformly."""
        t = torch.randint(self.config.num_timesteps, (len(x0),), generator=generator)
        noise = self.draw_noise(x0, generator)
        return self.diffusion.loss(network, x0, t.to(x0.device), noise)

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        config = self.config.train
        report = train_network(self.network, self.loss, train, config, stage="diffusion", **options)
        return {"diffusion": report}

    # Inference: x_t = add_noise(x, t), then back to an image.

    @torch.no_grad()
    def trajectory(self, images: Tensor, generators: list[torch.Generator]) -> Iterator[Step]:
        """Noise images to the level and denoise them, yielding every state, the last one clean."""
        timesteps = self.diffusion.schedule.timesteps(self.config.noise_level, self.config.steps)
        x_t = self.diffusion.add_noise(images, timesteps[0], self.draw_noise(images, generators))
        yield from self.diffusion.ddim_sample(self.network, x_t, timesteps)

    def _infer(
        self, images: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        reconstruction = torch.stack(
            [final_step(self.trajectory(images, generators)).x for _ in range(self.config.n_noises)]
        ).mean(0)  # (B, C, H, W)
        residual = (images - reconstruction).abs().mean(1)  # (B, H, W)
        return residual, reconstruction, {}

    @exact()
    def explain(
        self, images: Tensor, *, seed: int = 0, keys: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Intermediates of the first noise.

        Returns:
            ``trajectory`` (list of :class:`~diffad_lite.diffusion.gaussian.Step`), ``residual``
            (B, C, H, W) signed, image as prepared minus reconstruction, and what every method
            returns.
        """
        common = super().explain(images, seed=seed, keys=keys)  # checks the images, too
        prepared, generators = self.network_inputs(images, seed, keys)
        steps = [
            Step(s.t, s.x.cpu(), None if s.x0_hat is None else s.x0_hat.cpu())
            for s in self.trajectory(prepared, generators)
        ]
        return common | {"trajectory": steps, "residual": prepared.cpu() - steps[-1].x}


@dataclass(frozen=True)
class PriorConfig(MethodConfig):
    """What methods are configured by that begin with AnoDDPM's own training.

    Attributes:
        prior: the denoiser and its training; the noise level and steps in it are not used.
    """

    prior: AnoDDPMConfig = field(default_factory=AnoDDPMConfig)

    @property
    def first_stage(self) -> AnoDDPMConfig | None:
        """The denoiser's training on normal images."""
        return replace(self.prior, standardise=self.standardise)

    @classmethod
    def for_profile(cls, profile: Profile, **shape: Any) -> Self:
        """With AnoDDPM's configuration of the same profile as ``prior``."""
        prior = AnoDDPMConfig.for_profile(profile, **shape)
        return replace(super().for_profile(profile, **shape), prior=prior)


def prior_of(config: AnoDDPMConfig, **unet: Any) -> AnoDDPM:
    """AnoDDPM as a part of another method; unlike its own, its weights follow the method's seed.

    Args:
        config: of the denoiser, its diffusion and its training.
        unet: further options of :class:`~diffad_lite.networks.unet.UNet`.
    """
    with torch.device("meta"):  # its own weights, of a fixed seed, are not wanted
        prior = AnoDDPM(config)
    prior.network = prior._build(**unet)
    return prior


@dataclass(frozen=True)
class AnoDDPMSimplexConfig(AnoDDPMConfig):
    """Configuration of :class:`AnoDDPMSimplex`.

    Attributes:
        wavelength: of the first octave of the noise, in pixels.
        octaves: each has half the wavelength of the one before.
        persistence: amplitude of an octave relative to the one before.
    """

    noise_level: int = 15  # chosen on development defects, as AnoDDPM's
    wavelength: int = 16
    octaves: int = 4
    persistence: float = 0.8

    def __post_init__(self) -> None:
        """Validate field values."""
        super().__post_init__()
        check_ranges(self, wavelength=(1, math.inf), octaves=(1, 16), persistence=(0, 1))

    @classmethod
    def for_profile(cls, profile: Profile, **shape: Any) -> Self:
        """The first wavelength is a quarter of the image, the last is two pixels.

        At 256 pixels these are the public code's 64 pixels and six octaves
        (GaussianDiffusion.py, ``generate_simplex_noise``).
        """
        base = super().for_profile(profile, **shape)
        octaves = max(1, int(math.log2(base.image_size)) - 2)
        return replace(base, wavelength=max(2, base.image_size // 4), octaves=octaves)


class AnoDDPMSimplex(AnoDDPM):
    """AnoDDPM as its paper proposes it: training and inference with simplex noise.

    Only noise of unit variance is put in the place of Gaussian noise; the formulas, which are
    derived for Gaussian noise, stay. One step, or DDIM, needs no more than a noise estimate.
    """

    name = "anoddpm_simplex"
    Config = AnoDDPMSimplexConfig
    config: AnoDDPMSimplexConfig

    def draw_noise(self, like: Tensor, generators: Generators) -> Tensor:
        """Simplex noise shaped as ``like`` (B, C, H, W)."""
        c = self.config
        return simplex_noise(
            like,
            generators,
            wavelength=c.wavelength,
            octaves=c.octaves,
            persistence=c.persistence,
        )
