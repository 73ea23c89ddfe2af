"""The maths of diffusion: no network, no data."""

from diffad_lite.diffusion.bernoulli import BernoulliDiffusion, BitStep, sample_bits
from diffad_lite.diffusion.gaussian import (
    GaussianDiffusion,
    Step,
    final_step,
    noise_generators,
    randn,
)
from diffad_lite.diffusion.schedules import NoiseSchedule, make_betas
from diffad_lite.diffusion.simplex import simplex_noise

__all__ = [
    "BernoulliDiffusion",
    "BitStep",
    "GaussianDiffusion",
    "NoiseSchedule",
    "Step",
    "final_step",
    "make_betas",
    "noise_generators",
    "randn",
    "sample_bits",
    "simplex_noise",
]
