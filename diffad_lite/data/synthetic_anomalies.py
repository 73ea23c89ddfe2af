"""Synthetic anomalies for training: where (Perlin masks), what (textures), how strongly (opacity).

After DRAEM (Zavrtanik et al. 2021) and the official code of DiffusionAD. A normal image N gets a
mask M, a foreign appearance A and an opacity b: ``(1 - M) N + M (b N + (1 - b) A)``. All that a
detector trained on this knows of defects stands here. None of it is drawn by the code of
:mod:`diffad_lite.data.planting`, which measures: no polylines, dark fills, round spots or mirrored
patches, though some kinds are related (ridges and cracks, dark tiles and dark areas).
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffad_lite.core.config import Fraction, configuration
from diffad_lite.data.textures import change, foreign_textures, rand, shuffle_strips, texture_files

Foreground = Literal["all", "part", "object"]
TRIES = 50  # draws of a mask before an image is left normal
RIDGE_WIDTHS = (0.03, 0.1)  # of |noise|
RIDGE_FINEST = 2  # finer ridges would be dust


@configuration
class SynthesisConfig:
    """What anomalies look like.

    Attributes:
        share: of images that get one.
        ridges: share of masks that are thin and curved, the rest are blobs.
        threshold: blobs are where the noise is above it.
        finest: the lattice of the noise has up to 2 ** finest cells a side.
        own: share of appearances made from the image itself, the rest are foreign textures.
        opacity: range of b, the weight of the normal image inside the mask.
        foreground: where anomalies may lie: ``all``, a random ``part`` (the code's choice for
            textures), or on the ``object`` that differs from the image's border.
        texture_root: folder of texture images, such as DTD's; empty takes made textures.
    """

    share: Fraction = 0.5
    ridges: Fraction = 0.0
    threshold: Fraction = 0.5
    finest: Annotated[int, Field(ge=0, le=8)] = 4
    own: Fraction = 0.5
    opacity: tuple[float, ...] = (0.2, 0.8)
    foreground: Foreground = "all"
    texture_root: str = ""

    def __post_init__(self) -> None:
        """Validate the range of opacities."""
        low, high = self.opacity if len(self.opacity) == 2 else (1.0, 0.0)
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"SynthesisConfig.opacity must be (low, high) within 0..1, got {self.opacity}"
            )


class Synthesis:
    """Puts anomalies on normal images.

    Args:
        config: see :class:`SynthesisConfig`.

    """

    def __init__(self, config: SynthesisConfig) -> None:
        self.config = config

    @cached_property
    def files(self) -> list[Path]:
        """Texture images; none where they are to be made.

        Raises:
            FileNotFoundError: ``texture_root`` is given, but is no folder with images.
        """
        return texture_files(Path(self.config.texture_root)) if self.config.texture_root else []

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) in [-1, 1] -> with anomalies, masks (B, 1, H, W), labels (B,).

        Masks are 0 or 1, labels bool; where the mask is 0 the image is exactly what it was.
        """
        masks, low, high = self.masks(images, generator), *self.config.opacity
        appearances = self.appearances(images, generator)
        b = low + (high - low) * rand(generator, len(images), 1, 1, 1).to(images)
        blended = b * images + (1 - b) * appearances
        return torch.where(masks > 0, blended, images), masks, masks.flatten(1).any(1)

    # ------------------------------------------------------------------------------- where

    def masks(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Masks (B, 1, H, W); empty for a share of the images."""
        B, _, H, W = images.shape
        wanted = rand(generator, B) < self.config.share
        foreground = self.foreground(images, generator).cpu()
        masks = torch.zeros(B, 1, H, W)
        for _ in range(TRIES):
            missing = (wanted & ~masks.flatten(1).any(1)).nonzero()[:, 0]
            if len(missing) == 0:
                break
            masks[missing] = self.shapes(len(missing), H, W, generator) * foreground[missing]
        return masks.to(images)

    def shapes(self, n: int, H: int, W: int, generator: torch.Generator) -> Tensor:
        """Blobs and ridges (n, 1, H, W) of Perlin noise, not confined to a foreground."""
        blobs = perlin_noise(n, H, W, self.config.finest, generator) > self.config.threshold
        if self.config.ridges == 0:
            return blobs[:, None].float()
        low, high = RIDGE_WIDTHS
        width = low + (high - low) * rand(generator, n, 1, 1)
        # A ridge runs through the whole image; the gate leaves pieces of it.
        coarse, gate = (perlin_noise(n, H, W, RIDGE_FINEST, generator) for _ in range(2))
        ridges = (coarse.abs() < width) & (gate > 0.2)
        is_ridge = rand(generator, n, 1, 1) < self.config.ridges
        return torch.where(is_ridge, ridges, blobs)[:, None].float()

    def foreground(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Where anomalies may lie, 0 or 1, (B, 1, H, W)."""
        B, _, H, W = images.shape
        if self.config.foreground == "object":
            return object_mask(images)
        if self.config.foreground == "part":
            return (perlin_noise(B, H, W, 1, generator)[:, None] > 0).to(images)
        return torch.ones(B, 1, H, W).to(images)

    # -------------------------------------------------------------------------------- what

    def appearances(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """What anomalies look like, (B, C, H, W): the image's own strips, or a foreign texture."""
        own = rand(generator, len(images)) < self.config.own
        foreign = foreign_textures(images, self.files, generator)
        changed = []
        for image, texture, is_own in zip(images, foreign, own.tolist(), strict=True):
            appearance = change(image if is_own else texture, generator)
            changed.append(shuffle_strips(appearance, generator) if is_own else appearance)
        return torch.stack(changed)


def perlin_noise(n: int, H: int, W: int, finest: int, generator: torch.Generator) -> Tensor:
    """Perlin noise (n, H, W), values within about [-1, 1].

    The lattice of each has 2^a by 2^b cells, a and b uniform in 0 .. finest, and is turned by up
    to 90 degrees either way and moved, both at random.
    """
    cells = 2 ** torch.randint(finest + 1, (n, 2, 1, 1), generator=generator)
    angle = math.pi * (rand(generator, n, 1, 1) - 0.5)
    y = ((torch.arange(H) + 0.5) / H - 0.5)[:, None]
    x = (torch.arange(W) + 0.5) / W - 0.5
    u = cells[:, 0] * (angle.cos() * x - angle.sin() * y) + rand(generator, n, 1, 1)
    v = cells[:, 1] * (angle.sin() * x + angle.cos() * y) + rand(generator, n, 1, 1)
    side = 2 ** (finest + 1) + 2  # corners that a turned image can reach
    gradients = 2 * math.pi * rand(generator, n, side * side)
    i, j = u.floor(), v.floor()
    du, dv = u - i, v - j

    def corner(a: int, b: int) -> Tensor:
        index = ((i.long() + a) % side) * side + (j.long() + b) % side
        theta = gradients.gather(1, index.flatten(1)).view(n, H, W)
        return theta.cos() * (du - a) + theta.sin() * (dv - b)

    def fade(s: Tensor) -> Tensor:
        return s**3 * (s * (6 * s - 15) + 10)

    left = torch.lerp(corner(0, 0), corner(1, 0), fade(du))
    right = torch.lerp(corner(0, 1), corner(1, 1), fade(du))
    return math.sqrt(2) * torch.lerp(left, right, fade(dv))


def object_mask(images: Tensor) -> Tensor:
    """1 where an image (B, C, H, W) differs from its own border, (B, 1, H, W); Otsu's threshold.

    A simple stand-in for the saliency masks that the official code ships.
    """
    rim = torch.cat([images[..., (0, -1), :].flatten(2), images[..., :, (0, -1)].flatten(2)], 2)
    background = rim.median(dim=2).values[..., None, None]
    distance = (images - background).abs().mean(1).flatten(1)  # (B, HW)
    values, n = distance.sort(dim=1).values, distance.shape[1]
    below = torch.arange(1, n, device=images.device)
    sums = values.cumsum(1)
    low, high = sums[:, :-1] / below, (sums[:, -1:] - sums[:, :-1]) / (n - below)
    best = (below * (n - below) * (high - low) ** 2).argmax(1, keepdim=True)
    mask = distance > values.gather(1, best)
    B, _, H, W = images.shape
    return mask.view(B, 1, H, W).to(images)
