"""Simplex noise (Perlin 2001) in octaves: smooth random fields with structure at many scales.

Gaussian noise changes each pixel independently, so a large dark area remains recognisable in it.
AnoDDPM (Wyatt et al. 2022) replaces it by simplex noise, which hides large structures, too. The
rest of the diffusion model is unchanged.
"""

import math

import torch
from torch import Tensor

from diffad_lite.diffusion.gaussian import Generators, draw

# Equilateral triangles cover the plane. SKEW maps their corners to integer coordinates, UNSKEW
# maps these back.
SKEW, UNSKEW = (math.sqrt(3) - 1) / 2, (3 - math.sqrt(3)) / 6
# Variance of one octave: sum over corners of E[(1/2 - d^2)^4 g.d]^2 for unit gradients g, which
# for corners of density sqrt(3) is sqrt(3) * integral of (1/2 - r^2)^8 r^2 / 2 over the disc.
VARIANCE = math.sqrt(3) * math.pi / (180 * 2**10)


def simplex_noise(
    like: Tensor, generators: Generators, *, wavelength: float, octaves: int, persistence: float
) -> Tensor:
    """Draw noise of mean 0 and variance 1 in the shape of ``like`` (B, C, H, W), on the CPU.

    Args:
        like: gives shape, device and dtype.
        generators: one for the batch, or one for each image.
        wavelength: of the first octave, in pixels; it halves with each further octave.
        octaves: number of octaves that are summed.
        persistence: amplitude of an octave relative to the previous one.
    """
    B, C, H, W = like.shape
    total = torch.zeros(B * C, H, W)
    for octave in range(octaves):
        corners = math.ceil(math.sqrt(3) * (max(H, W) * 2**octave / wavelength + 1)) + 2
        uniform = draw(torch.rand, (B, C * (corners**2 + 2)), generators).view(B * C, -1)
        angles, offset = uniform.split([corners**2, 2], dim=1)
        angles = 2 * math.pi * angles.reshape(B * C, corners, corners)
        total += persistence**octave * _octave(angles, offset, H, W, wavelength / 2**octave)
    variance = VARIANCE * sum(persistence ** (2 * octave) for octave in range(octaves))
    return (total / math.sqrt(variance)).view(B, C, H, W).to(like)


def _octave(angles: Tensor, offset: Tensor, H: int, W: int, wavelength: float) -> Tensor:
    """Return one octave (N, H, W) from the angle of the gradient at each corner (N, n, n).

    ``offset`` (N, 2) moves the triangles at random. Without it, the corners, where the noise is
    always zero, would lie at the same pixels in every image.
    """
    y = torch.arange(H)[:, None] / wavelength + offset[:, 0, None, None]  # (N, H, 1)
    x = torch.arange(W) / wavelength + offset[:, 1, None, None]  # (N, 1, W)
    skew = SKEW * (x + y)
    i, j = (y + skew).floor(), (x + skew).floor()  # lattice cell of each pixel, (N, H, W)
    unskew = UNSKEW * (i + j)
    dy, dx = y - i + unskew, x - j + unskew  # from the cell's first corner
    lower = (dy > dx).float()  # 1 in the lower triangle of the cell
    total = torch.zeros_like(dx)
    for a, b in ((0.0, 0.0), (lower, 1 - lower), (1.0, 1.0)):
        shift = UNSKEW * (a + b)
        dy_c, dx_c = dy - a + shift, dx - b + shift
        index = ((i + a) * angles.shape[-1] + j + b).long().flatten(1)
        angle = angles.flatten(1).gather(1, index).view_as(dx)
        falloff = (0.5 - dy_c**2 - dx_c**2).clamp_min(0) ** 4
        total += falloff * (angle.sin() * dy_c + angle.cos() * dx_c)
    return total
