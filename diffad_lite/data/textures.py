"""Appearances of synthetic anomalies: textures from files, procedural textures, augmentations.

The official codes of DiffusionAD and GLAD use photographs of textures (DTD). Without them,
gratings, mosaics, clouds and other images of the batch take their place.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torchvision.transforms.v2.functional as TF
from PIL import ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from diffad_lite.core.files import data_dir
from diffad_lite.data.images import read_image, resize_image, to_float
from diffad_lite.data.source import walk_images

Augmentations = Literal["lite", "published"]
Operation = Callable[[Tensor, torch.Generator], Tensor]
DTD = (
    "5,640 images, 625 MB, for research purposes: "
    "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
)
BILINEAR = InterpolationMode.BILINEAR
N_AUGMENTATIONS = 3  # per appearance
N_STRIPS = 8  # strips or tiles per axis


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw uniform numbers in [0, 1) on the CPU."""
    return torch.rand(shape, generator=generator)


def list_textures(root: str | Path) -> list[Path]:
    """Return all images in a folder and its sub-folders; a relative path is below ``data_dir()``.

    Raises:
        FileNotFoundError: no such folder, no image in it, or no data folder for a relative path.
    """
    root = Path(root).expanduser()
    folder = root if root.is_absolute() else data_dir().absolute() / root
    files = walk_images(folder) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"no texture images in {folder}; download the Describable Textures Dataset ({DTD}) and "
            "unpack it there, name another folder (--set synthesis.texture_root=/path/to/it; a "
            "relative path is below the data folder), or take procedural textures: "
            "--set synthesis.texture_root="
        )
    return files


def draw_textures(images: Tensor, files: Sequence[Path], generator: torch.Generator) -> Tensor:
    """Draw a texture for each image, (B, C, H, W) in [-1, 1], procedural if there are no files."""
    B, C, H, W = images.shape
    if files:
        picks = torch.randint(len(files), (B,), generator=generator).tolist()
        return torch.stack([read_texture(files[i], C, H, W) for i in picks]).to(images)
    kind = torch.randint(1 + len(PROCEDURAL), (B,), generator=generator)
    textures = draw_from_batch(images, generator)
    for k, draw in enumerate(PROCEDURAL):
        if n := int((kind == k).sum()):
            textures[kind == k] = draw(n, C, H, W, generator).to(images)
    return textures


def draw_gratings(n: int, C: int, H: int, W: int, generator: torch.Generator) -> Tensor:
    """Draw waves between two random colours; half of them are square waves."""
    y, x = torch.arange(H)[:, None] / H, torch.arange(W) / W
    angle, waves = math.pi * rand(generator, n, 1, 1), 2 + 14 * rand(generator, n, 1, 1)
    phase = 2 * math.pi * (waves * (angle.cos() * x + angle.sin() * y) + rand(generator, n, 1, 1))
    wave = torch.where(rand(generator, n, 1, 1) < 0.5, phase.sin(), phase.sin().sign())
    a, b = 2 * rand(generator, 2, n, C, 1, 1) - 1
    return a + (b - a) * (wave[:, None] + 1) / 2


def draw_mosaics(n: int, C: int, H: int, W: int, generator: torch.Generator) -> Tensor:
    """Draw 40 Voronoi cells per image, each with one random colour."""
    points, colours = rand(generator, n, 40, 2), 2 * rand(generator, n, C, 40) - 1
    y, x = torch.meshgrid(torch.arange(H) / H, torch.arange(W) / W, indexing="ij")
    nearest = torch.cdist(torch.stack([y, x], -1).view(1, -1, 2), points).argmin(2)  # (n, HW)
    return colours.gather(2, nearest[:, None].expand(-1, C, -1)).view(n, C, H, W)


def draw_clouds(n: int, C: int, H: int, W: int, generator: torch.Generator) -> Tensor:
    """Draw coloured noise with the amplitude spectrum 1 / f^p, p uniform in 0 .. 2."""
    spectrum = torch.fft.rfft2(torch.randn(n, C, H, W, generator=generator))
    f = torch.hypot(torch.fft.fftfreq(H)[:, None] * H, torch.fft.rfftfreq(W) * W).clamp_min(1)
    field = torch.fft.irfft2(spectrum * f ** (-2 * rand(generator, n, 1, 1, 1)), s=(H, W))
    field = (field - field.mean((2, 3), keepdim=True)) / field.std((2, 3), keepdim=True)
    return (0.5 * field + rand(generator, n, C, 1, 1) - 0.5).clamp(-1, 1)


def draw_from_batch(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a different image of the batch for each image, shifted with wrap-around."""
    B, _, H, W = images.shape
    shifted = []
    for i in range(B):
        j = (i + 1 + int(torch.randint(max(1, B - 1), (), generator=generator))) % B
        dy, dx = (int(torch.randint(s, (), generator=generator)) for s in (H, W))
        shifted.append(images[j].roll((dy, dx), (1, 2)))
    return torch.stack(shifted)


PROCEDURAL: tuple[Callable[..., Tensor], ...] = (draw_gratings, draw_mosaics, draw_clouds)


def read_texture(path: Path, C: int, H: int, W: int) -> Tensor:
    """Read a texture (C, H, W) in [-1, 1]; the channel mean gives grey and a fourth channel."""
    texture = to_float(resize_image(read_image(path), max(H, W), "squash"))[:, :H, :W]
    if len(texture) == 1 or C == 1:
        return texture.mean(0, keepdim=True).expand(C, H, W)
    return torch.cat([texture, texture.mean(0, keepdim=True)])[:C]


def shuffle_strips(image: Tensor, generator: torch.Generator) -> Tensor:
    """Cut an image (C, H, W) into strips and permute them: columns first, then rows.

    After the official code of DiffusionAD, which shuffles even and odd strips separately.
    """
    for axis in (2, 1):
        strips = list(image.tensor_split(N_STRIPS, dim=axis))
        order = torch.randperm(len(strips), generator=generator).tolist()
        image = torch.cat([strips[k] for k in order], dim=axis)
    return image


def shuffle_tiles(image: Tensor, generator: torch.Generator) -> Tensor:
    """Cut an image (C, H, W) into 8 x 8 tiles of equal size and permute them.

    After the official code of GLAD. If 8 does not divide the height or the width, up to 7 rows at
    the bottom and up to 7 columns on the right stay as they are.
    """
    C, n, h, w = len(image), N_STRIPS, image.shape[1] // N_STRIPS, image.shape[2] // N_STRIPS
    tiles = image[:, : n * h, : n * w].reshape(C, n, h, n, w).transpose(2, 3).flatten(1, 2)
    tiles = tiles[:, torch.randperm(n * n, generator=generator)].unflatten(1, (n, n))
    shuffled = image.clone()
    shuffled[:, : n * h, : n * w] = tiles.transpose(2, 3).reshape(C, n * h, n * w)
    return shuffled


def augment(
    image: Tensor, generator: torch.Generator, augmentations: Augmentations = "lite"
) -> Tensor:
    """Apply three different random operations to an image (C, H, W) in [-1, 1]."""
    operations = AUGMENTATIONS[augmentations]
    image = ((image[:, None] + 1) / 2).clamp(0, 1)  # each channel is an image: any number works
    for k in torch.randperm(len(operations), generator=generator)[:N_AUGMENTATIONS].tolist():
        image = operations[k](image, generator).clamp(0, 1)
    return 2 * image[:, 0] - 1


def with_number(change: Callable[[Tensor, float], Tensor]) -> Operation:
    """Return an operation that draws the second argument of ``change``, uniform in [0, 1)."""
    return lambda image, generator: change(image, float(rand(generator)))


def to_bytes(image: Tensor) -> Tensor:
    """Convert floats in [0, 1] to uint8."""
    return TF.to_dtype(image, torch.uint8, scale=True)


def vary_gamma(image: Tensor, generator: torch.Generator) -> Tensor:
    """Raise each channel to its power, uniform in 0.5 .. 2."""
    return image ** (0.5 + 1.5 * rand(generator, len(image), 1, 1, 1)).to(image)


def vary_brightness(image: Tensor, generator: torch.Generator) -> Tensor:
    """Multiply by 0.8 .. 1.2, then add up to 30 / 255 in either direction."""
    u, v = rand(generator, 2).tolist()
    return (0.8 + 0.4 * u) * image + 60 / 255 * (v - 0.5)


def shift_colours(image: Tensor, generator: torch.Generator) -> Tensor:
    """Shift hue and saturation by up to 50 of 255 each, if the image has three channels."""
    if len(image) != 3:
        return image
    hue, saturation = torch.randint(-50, 51, (2,), generator=generator).tolist()
    hsv = TF.pil_to_tensor(TF.to_pil_image(to_bytes(image[:, 0])).convert("HSV")).int()
    shifted = torch.stack([(hsv[0] + hue) % 256, (hsv[1] + saturation).clamp(0, 255), hsv[2]])
    rgb = TF.to_pil_image(shifted.to(torch.uint8), mode="HSV").convert("RGB")
    return TF.pil_to_tensor(rgb)[:, None].to(image) / 255


def stretch_contrast(image: Tensor, u: float) -> Tensor:
    """Stretch each channel to 0 .. 1, without its darkest and brightest 0 .. 20 %."""
    channels = [
        ImageOps.autocontrast(TF.to_pil_image(channel), cutoff=int(21 * u))
        for channel in to_bytes(image)
    ]
    return torch.stack([TF.pil_to_tensor(channel) for channel in channels]).to(image) / 255


# Operations on images (C, 1, H, W) in [0, 1]; ``u`` is uniform in [0, 1).
AUGMENTATIONS: dict[Augmentations, tuple[Operation, ...]] = {
    # Without sharpness, hue and saturation, and with one gamma for all channels.
    "lite": tuple(
        with_number(change)
        for change in (
            lambda image, u: image**2 ** (2 * u - 1),  # gamma 1/2 .. 2
            lambda image, u: (0.8 + 0.4 * u) * image + 60 / 255 * (u - 0.5),  # brightness
            lambda image, u: TF.solarize(image, (32 + 96 * u) / 255),
            lambda image, u: TF.posterize((255 * image).to(torch.uint8), 2 + int(3 * u)) / 255,
            lambda image, u: TF.invert(image),
            lambda image, u: TF.autocontrast(image),
            lambda image, u: TF.equalize((255 * image).to(torch.uint8)) / 255,
            lambda image, u: TF.rotate(image, 90 * u - 45, fill=float(image.mean())),
        )
    ),
    # Those of the official codes of DiffusionAD and GLAD, with the ranges that imgaug has by itself
    # where the codes give none. imgaug changes brightness in a colour space that it draws.
    "published": (
        vary_gamma,
        vary_brightness,
        with_number(lambda image, u: TF.adjust_sharpness(image, 2 * u)),
        shift_colours,
        with_number(
            lambda image, u: TF.solarize(image, (32 + 192 * u) / 255) if u < 0.5 else image
        ),
        with_number(lambda image, u: TF.posterize(to_bytes(image), 1 + int(8 * u)) / 255),
        lambda image, generator: TF.invert(image),
        with_number(stretch_contrast),
        lambda image, generator: TF.equalize(to_bytes(image)) / 255,
        with_number(lambda image, u: TF.rotate(image, 90 * u - 45, BILINEAR)),
    ),
}
