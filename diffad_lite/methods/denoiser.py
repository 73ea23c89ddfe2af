"""The denoiser that methods share: a U-Net that predicts noise, its diffusion, and its training.

AnoDDPM, DiffusionAD, GLAD, MDPS and PaDiM on denoiser features contain a :class:`Denoiser`. Methods
that train it on normal images alone, with Gaussian noise, can share the trained weights.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from diffad_lite.core.config import Count, Size, Widths, configuration
from diffad_lite.diffusion.gaussian import GaussianDiffusion, Generators, randn
from diffad_lite.diffusion.schedules import BetaSchedule, NoiseSchedule
from diffad_lite.methods.base import MethodConfig
from diffad_lite.networks.unet import UNet
from diffad_lite.training.loop import FitOptions, TrainReport, train_network
from diffad_lite.training.state import TrainConfig

NoiseSource = Callable[[Tensor, Generators], Tensor]  # (like, generators) -> noise
STAGE = "diffusion"  # name of the training, in reports and files
DENOISER_FRACTION = 0.7  # fraction of a time budget for the denoiser if a second stage follows


@configuration
class DenoiserConfig:
    """Configuration of a :class:`Denoiser`; defaults are the lite profile at 64 pixels.

    Attributes:
        beta_schedule: of the forward process.
        num_timesteps: T.
        base_channels: this and the next seven are arguments of
            :class:`~diffad_lite.networks.unet.UNet`.
        channel_mults: widths of the levels.
        blocks_per_level: residual blocks.
        attention_levels: levels with self-attention.
        unshuffle: factor by which the first layer reduces height and width.
        residual_resampling: whether residual blocks change the resolution.
        attention_heads: of each self-attention; None: one for every 32 channels.
        norm_groups: of each GroupNorm; None: at most 32, of at least 4 channels each.
        train: training on normal images.
    """

    beta_schedule: BetaSchedule = "linear"
    num_timesteps: Count = 1000
    base_channels: Size = 32
    channel_mults: Widths = (1, 2, 4)
    blocks_per_level: Size = 1
    attention_levels: tuple[int, ...] = (2,)
    unshuffle: Size = 2
    residual_resampling: bool = False
    attention_heads: Size | None = None
    norm_groups: Size | None = None
    train: TrainConfig = field(default_factory=TrainConfig)


class Denoiser:
    """A noise predictor ``eps_theta(x_t, t)`` with its diffusion and its training.

    Args:
        config: see :class:`DenoiserConfig`.
        channels: of the images.
        draw_noise: noise of the forward process, shaped as ``like``; default Gaussian.
        clip: whether samplers clip the clean estimate to [-1, 1].
    """

    network: UNet
    diffusion: GaussianDiffusion

    def __init__(
        self,
        config: DenoiserConfig,
        channels: int,
        draw_noise: NoiseSource = randn,
        *,
        clip: bool = True,
    ) -> None:
        self.config, self.draw_noise = config, draw_noise
        schedule = NoiseSchedule.named(config.beta_schedule, config.num_timesteps)
        self.diffusion = GaussianDiffusion(schedule, clip=1.0 if clip else None)
        self.network = UNet(
            channels,
            base_channels=config.base_channels,
            channel_mults=config.channel_mults,
            blocks_per_level=config.blocks_per_level,
            attention_levels=config.attention_levels,
            unshuffle=config.unshuffle,
            residual_resampling=config.residual_resampling,
            attention_heads=config.attention_heads,
            norm_groups=config.norm_groups,
        )

    def loss(self, network: nn.Module, x0: Tensor, generator: torch.Generator) -> Tensor:
        """Return the noise-prediction loss at uniform timesteps (Ho et al. 2020, algorithm 1)."""
        t = torch.randint(self.config.num_timesteps, (len(x0),), generator=generator)
        noise = self.draw_noise(x0, generator)
        return self.diffusion.loss(network, x0, t.to(x0.device), noise)

    def fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        """Train the network on normal images (N, C, H, W), already standardised if configured."""
        train_config = self.config.train
        report = train_network(self.network, self.loss, train, train_config, stage=STAGE, **options)
        return {STAGE: report}


@configuration
class DenoisingConfig(MethodConfig):
    """Base configuration of the methods with a denoiser.

    Attributes:
        denoiser: the network, its diffusion and its training.
    """

    profiles = "denoiser"

    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)

    @property
    def denoiser_training(self) -> dict[str, Any] | None:
        """Fields that determine the denoiser's training, besides seed and data.

        None if the method has no such stage. Methods with equal values can share the weights.
        """
        names = ("channels", "standardise", "denoiser")
        return {name: getattr(self, name) for name in names}
