"""AnoDDPM (Wyatt et al. 2022): noise an image up to a noise level, denoise it, compare.

The network has seen only normal images, so it paints normal ones. The anomaly is what the noise
destroys and the network does not paint back. Read top to bottom: configuration, reconstruction,
map.

Noise levels are far below those of the 256-pixel papers: at 64 pixels a thin crack disappears from
the reconstruction at a small ``t``, and everything else that the noise destroys is only error.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Self, Unpack

import torch
from pydantic import Field
from torch import Tensor

from diffad_lite.core.config import (
    Count,
    Fraction,
    Profile,
    Timestep,
    check_at_most,
    configuration,
)
from diffad_lite.diffusion.gaussian import Step, final_step, randn
from diffad_lite.diffusion.simplex import simplex_noise
from diffad_lite.methods.base import Inferred, Method, Trace, inference
from diffad_lite.methods.denoiser import Denoiser, DenoisingConfig, NoiseSource
from diffad_lite.networks.unet import UNet
from diffad_lite.training.loop import FitOptions, TrainReport


@configuration
class AnoDDPMConfig(DenoisingConfig):
    """Configuration of :class:`AnoDDPM`; defaults are the lite profile at 64 pixels.

    Attributes:
        noise_level: timestep t that images are noised to, 0 .. T-1.
        steps: network evaluations from there back to 0; 1 is the one-step estimate.
        n_noises: independent noises whose reconstructions are averaged.
    """

    profiles = "anoddpm"

    noise_level: Timestep = inference(25)
    steps: Count = inference(1)
    n_noises: Count = inference(4)

    def __post_init__(self) -> None:
        """Validate fields against each other."""
        check_at_most(self, noise_level=self.denoiser.num_timesteps - 1)
        check_at_most(self, steps=self.noise_level + 1)


class AnoDDPM(Method):
    """Partial noising and reconstruction with a noise predictor trained on normal images.

    :meth:`explain` adds, of the first noise, ``trajectory``, a list of
    :class:`~diffad_lite.diffusion.gaussian.Step`, and ``residual`` (B, C, H, W), signed.
    """

    name = "anoddpm"
    title = "AnoDDPM, Gaussian noise"
    Config = AnoDDPMConfig
    config: AnoDDPMConfig
    network: UNet

    def _build(self) -> UNet:
        self.denoiser = Denoiser(self.config.denoiser, self.config.channels, self._noise())
        self.diffusion, self.draw_noise = self.denoiser.diffusion, self.denoiser.draw_noise
        return self.denoiser.network

    def _noise(self) -> NoiseSource:
        """Return the noise of the forward process."""
        return randn

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        return self.denoiser.fit(train, **options)

    # Inference: x_t = add_noise(x, t), then back to an image.

    @torch.no_grad()
    def trajectory(self, images: Tensor, generators: list[torch.Generator]) -> Iterator[Step]:
        """Noise images and denoise them; yield every state, the clean one last."""
        timesteps = self.diffusion.schedule.timesteps(self.config.noise_level, self.config.steps)
        x_t = self.diffusion.add_noise(images, timesteps[0], self.draw_noise(images, generators))
        yield from self.diffusion.ddim_sample(self.network, x_t, timesteps)

    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        reconstructions: list[Tensor] = []
        for _ in range(self.config.n_noises):
            steps: Iterable[Step] = self.trajectory(images, generators)
            if trace is not None and not reconstructions:
                trace["trajectory"] = steps = list(steps)
                trace["residual"] = images - trace["trajectory"][-1].x
            reconstructions.append(final_step(steps).x)
        reconstruction = torch.stack(reconstructions).mean(0)  # (B, C, H, W)
        residual = (images - reconstruction).abs().mean(1)  # (B, H, W)
        return residual, reconstruction, {}


@configuration
class AnoDDPMSimplexConfig(AnoDDPMConfig):
    """Configuration of :class:`AnoDDPMSimplex`.

    Attributes:
        wavelength: of the first octave of the noise, in pixels.
        octaves: each has half the wavelength of the one before.
        persistence: amplitude of an octave relative to the one before.
    """

    profiles = "anoddpm_simplex"

    noise_level: Timestep = 15  # chosen on development defects, as AnoDDPM's
    wavelength: Count = 16
    octaves: Annotated[int, Field(ge=1, le=16)] = 4
    persistence: Fraction = 0.8

    @property
    def denoiser_training(self) -> None:
        """None: the training with simplex noise is shared with no other method."""
        return None

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
    title = "AnoDDPM, simplex noise"
    Config = AnoDDPMSimplexConfig
    config: AnoDDPMSimplexConfig

    def _noise(self) -> NoiseSource:
        c = self.config
        return partial(
            simplex_noise,
            wavelength=c.wavelength,
            octaves=c.octaves,
            persistence=c.persistence,
        )
