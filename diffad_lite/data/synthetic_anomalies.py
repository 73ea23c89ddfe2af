"""Synthetic anomalies for training: a Perlin mask, an appearance and an opacity.

After DRAEM (Zavrtanik et al. 2021) and the official code of DiffusionAD. A normal image N gets a
mask M, an appearance A and an opacity b: ``(1 - M) N + M (b N + (1 - b) A)``. A detector trained on
these knows nothing else about defects. The test defects of :mod:`diffad_lite.data.planting` are
drawn by other code: polylines, dark fills, round spots and mirrored patches do not occur here,
though some kinds are similar (ridges and cracks, dark tiles and dark areas).
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffad_lite.core.config import Fraction, configuration
from diffad_lite.data.textures import (
    Augmentations,
    augment,
    draw_textures,
    list_textures,
    rand,
    shuffle_strips,
    shuffle_tiles,
)

Foreground = Literal["all", "part", "object"]
TRIES = 50  # an image stays normal if this many masks were empty
RIDGE_WIDTHS = (0.03, 0.1)  # a ridge is where |noise| is below a width from this range
RIDGE_FINEST = 2  # a finer lattice would give specks instead of ridges


@configuration
class SynthesisConfig:
    """Settings of synthetic anomalies.

    Attributes:
        anomaly_probability: fraction of images with an anomaly.
        ridges: fraction of masks that are thin and curved; the others are blobs.
        threshold: blobs are where the noise is above it.
        empty_corners: blobs lie inside a square that is rotated with the noise (see
            :func:`perlin_noise`), as in the official codes of DiffusionAD and GLAD.
        finest: the lattice of the noise has up to 2 ** finest cells per side.
        self_augmentation: fraction of appearances made from the image itself; the others are
            textures.
        shuffle: how such an appearance is mixed: rows and columns of ``strips`` (DiffusionAD), or
            8 x 8 ``tiles`` (GLAD).
        augmentations: operations that change an appearance: ``lite``, or the ten ``published`` ones
            of both official codes.
        opacity: range of b, the weight of the normal image inside the mask.
        foreground: region of the anomalies: ``all``, a random ``part`` (the official code's choice
            for textures), or the ``object`` that differs from the image's border.
        texture_root: folder of texture images, such as DTD, with sub-folders; a relative path is
            below ``data_dir()``; empty for procedural textures.
    """

    anomaly_probability: Fraction = 0.5
    ridges: Fraction = 0.0
    threshold: Fraction = 0.5
    empty_corners: bool = False
    finest: Annotated[int, Field(ge=0, le=8)] = 4
    self_augmentation: Fraction = 0.5
    shuffle: Literal["strips", "tiles"] = "strips"
    augmentations: Augmentations = "lite"
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
    """Add synthetic anomalies to normal images."""

    def __init__(self, config: SynthesisConfig) -> None:
        self.config = config

    @cached_property
    def files(self) -> list[Path]:
        """Texture images, none for procedural textures.

        Raises:
            FileNotFoundError: ``texture_root`` is set, but is no folder with images.
        """
        return list_textures(self.config.texture_root) if self.config.texture_root else []

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return images with anomalies, masks (B, 1, H, W) of 0 and 1, and bool labels (B,).

        ``images`` are (B, C, H, W) in [-1, 1]. They do not change where the mask is 0.
        """
        masks, low, high = self.draw_masks(images, generator), *self.config.opacity
        appearances = self.draw_appearances(images, generator)
        b = low + (high - low) * rand(generator, len(images), 1, 1, 1).to(images)
        blended = b * images + (1 - b) * appearances
        return torch.where(masks > 0, blended, images), masks, masks.flatten(1).any(1)

    def draw_masks(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw masks (B, 1, H, W) inside the foreground, empty for images that stay normal."""
        B, _, H, W = images.shape
        wanted = rand(generator, B) < self.config.anomaly_probability
        foreground = self.draw_foreground(images, generator).cpu()
        masks = torch.zeros(B, 1, H, W)
        for _ in range(TRIES):
            missing = (wanted & ~masks.flatten(1).any(1)).nonzero()[:, 0]
            if len(missing) == 0:
                break
            masks[missing] = self.draw_shapes(len(missing), H, W, generator) * foreground[missing]
        return masks.to(images)

    def draw_shapes(self, n: int, H: int, W: int, generator: torch.Generator) -> Tensor:
        """Draw blobs and ridges (n, 1, H, W) from Perlin noise, anywhere in the image."""
        c = self.config
        noise = perlin_noise(n, H, W, c.finest, generator, empty_corners=c.empty_corners)
        blobs = noise > c.threshold
        if c.ridges == 0:
            return blobs[:, None].float()
        low, high = RIDGE_WIDTHS
        width = low + (high - low) * rand(generator, n, 1, 1)
        # A ridge crosses the whole image; the gate keeps pieces of it.
        coarse, gate = (perlin_noise(n, H, W, RIDGE_FINEST, generator) for _ in range(2))
        ridges = (coarse.abs() < width) & (gate > 0.2)
        is_ridge = rand(generator, n, 1, 1) < c.ridges
        return torch.where(is_ridge, ridges, blobs)[:, None].float()

    def draw_foreground(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the region of the anomalies, 0 or 1, (B, 1, H, W)."""
        B, _, H, W = images.shape
        if self.config.foreground == "object":
            return object_mask(images)
        if self.config.foreground == "part":
            return (perlin_noise(B, H, W, 1, generator)[:, None] > 0).to(images)
        return torch.ones(B, 1, H, W).to(images)

    def draw_appearances(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw appearances (B, C, H, W): the image itself, shuffled, or a texture."""
        shuffle = shuffle_tiles if self.config.shuffle == "tiles" else shuffle_strips
        from_image = (rand(generator, len(images)) < self.config.self_augmentation).tolist()
        textures = draw_textures(images, self.files, generator)
        appearances = []
        for image, texture, is_shuffled in zip(images, textures, from_image, strict=True):
            source = image if is_shuffled else texture
            appearance = augment(source, generator, self.config.augmentations)
            appearances.append(shuffle(appearance, generator) if is_shuffled else appearance)
        return torch.stack(appearances)


def perlin_noise(
    n: int,
    H: int,
    W: int,
    finest: int,
    generator: torch.Generator,
    *,
    empty_corners: bool = False,
) -> Tensor:
    """Draw Perlin noise (n, H, W) with values in about [-1, 1].

    Each lattice has 2^a by 2^b cells, a and b uniform in 0 .. finest. It is rotated by up to 90
    degrees in either direction and shifted, both at random.

    With ``empty_corners``, the lattice is not shifted: its cells fill the image before the
    rotation, and the noise is 0 outside of the rotated image.
    """
    cells = 2 ** torch.randint(finest + 1, (n, 2, 1, 1), generator=generator)
    angle = math.pi * (rand(generator, n, 1, 1) - 0.5)
    y = ((torch.arange(H) + 0.5) / H - 0.5)[:, None]
    x = (torch.arange(W) + 0.5) / W - 0.5
    right, down = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
    if empty_corners:
        shift_u, shift_v = cells[:, 0] / 2, cells[:, 1] / 2
    else:
        shift_u, shift_v = (rand(generator, n, 1, 1) for _ in range(2))
    u, v = cells[:, 0] * right + shift_u, cells[:, 1] * down + shift_v
    side = 2 ** (finest + 1) + 2  # lattice points that a rotated image can reach
    gradients = 2 * math.pi * rand(generator, n, side * side)
    i, j = u.floor(), v.floor()
    du, dv = u - i, v - j

    def corner(a: int, b: int) -> Tensor:
        index = ((i.long() + a) % side) * side + (j.long() + b) % side
        theta = gradients.gather(1, index.flatten(1)).view(n, H, W)
        return theta.cos() * (du - a) + theta.sin() * (dv - b)

    def fade(s: Tensor) -> Tensor:
        return s**3 * (s * (6 * s - 15) + 10)

    edge0, edge1 = (torch.lerp(corner(0, b), corner(1, b), fade(du)) for b in (0, 1))
    noise = math.sqrt(2) * torch.lerp(edge0, edge1, fade(dv))
    if empty_corners:
        noise[(right.abs() > 0.5) | (down.abs() > 0.5)] = 0
    return noise


def object_mask(images: Tensor) -> Tensor:
    """Return 1 where an image (B, C, H, W) differs from its border, by Otsu's threshold, else 0.

    The masks (B, 1, H, W) replace the saliency masks that come with the official code of
    DiffusionAD. Those are resized, so their rims are soft; these are hard.
    """
    border = torch.cat([images[..., (0, -1), :].flatten(2), images[..., :, (0, -1)].flatten(2)], 2)
    background = border.median(dim=2).values[..., None, None]
    distance = (images - background).abs().mean(1).flatten(1)  # (B, HW)
    values, n = distance.sort(dim=1).values, distance.shape[1]
    below = torch.arange(1, n, device=images.device)
    sums = values.cumsum(1)
    low, high = sums[:, :-1] / below, (sums[:, -1:] - sums[:, :-1]) / (n - below)
    best = (below * (n - below) * (high - low) ** 2).argmax(1, keepdim=True)
    mask = distance > values.gather(1, best)
    B, _, H, W = images.shape
    return mask.view(B, 1, H, W).to(images)
