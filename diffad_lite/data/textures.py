"""What synthetic anomalies are made of: textures out of a folder, or drawn, and their changes.

The official code of DiffusionAD takes photographs of textures (DTD); without them, waves, mosaics,
clouds and pieces of other images serve.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from diffad_lite.data.images import list_images, read_image, resize_image, to_float

OPERATIONS = 3  # of those below, on each appearance
STRIPS = 8  # that an image is cut into when it becomes its own anomaly


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in [0, 1), drawn on the CPU."""
    return torch.rand(shape, generator=generator)


def texture_files(root: Path) -> list[Path]:
    """All images in a folder and below it.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    folders = [root, *sorted(p for p in root.rglob("*") if p.is_dir())] if root.is_dir() else []
    files = [file for folder in folders for file in list_images(folder)]
    if not files:
        raise FileNotFoundError(
            f"no texture images in {root.absolute()}; unpack the Describable Textures Dataset "
            "(www.robots.ox.ac.uk/~vgg/data/dtd) there, or set synthesis.texture_root to another "
            'folder, or to "" for made textures'
        )
    return files


def foreign_textures(images: Tensor, files: Sequence[Path], generator: torch.Generator) -> Tensor:
    """One texture for each image, (B, C, H, W) in [-1, 1]: of the files, else a made one."""
    B, C, H, W = images.shape
    if files:
        picks = torch.randint(len(files), (B,), generator=generator).tolist()
        return torch.stack([read_texture(files[i], C, H, W) for i in picks]).to(images)
    kind = torch.randint(1 + len(MADE), (B,), generator=generator)
    textures = other_images(images, generator)
    for k, make in enumerate(MADE):
        if n := int((kind == k).sum()):
            textures[kind == k] = make(n, C, H, W, generator).to(images)
    return textures


def gratings(n: int, C: int, H: int, W: int, generator: torch.Generator) -> Tensor:
    """Waves, half of them hard stripes, in two random colours."""
    y, x = torch.arange(H)[:, None] / H, torch.arange(W) / W
    angle, waves = math.pi * rand(generator, n, 1, 1), 2 + 14 * rand(generator, n, 1, 1)
    phase = 2 * math.pi * (waves * (angle.cos() * x + angle.sin() * y) + rand(generator, n, 1, 1))
    wave = torch.where(rand(generator, n, 1, 1) < 0.5, phase.sin(), phase.sin().sign())
    return two_colours(wave, C, generator)


def mosaics(n: int, C: int, H: int, W: int, generator: torch.Generator) -> Tensor:
    """Voronoi cells, each of one random colour."""
    points, colours = rand(generator, n, 40, 2), 2 * rand(generator, n, C, 40) - 1
    y, x = torch.meshgrid(torch.arange(H) / H, torch.arange(W) / W, indexing="ij")
    nearest = torch.cdist(torch.stack([y, x], -1).view(1, -1, 2), points).argmin(2)  # (n, HW)
    return colours.gather(2, nearest[:, None].expand(-1, C, -1)).view(n, C, H, W)


def clouds(n: int, C: int, H: int, W: int, generator: torch.Generator) -> Tensor:
    """Coloured noise with the amplitude spectrum 1 / f^p, p uniform in 0 .. 2."""
    white = torch.fft.rfft2(torch.randn(n, C, H, W, generator=generator))
    f = torch.hypot(torch.fft.fftfreq(H)[:, None] * H, torch.fft.rfftfreq(W) * W).clamp_min(1)
    field = torch.fft.irfft2(white * f ** (-2 * rand(generator, n, 1, 1, 1)), s=(H, W))
    field = (field - field.mean((2, 3), keepdim=True)) / field.std((2, 3), keepdim=True)
    return (0.5 * field + rand(generator, n, C, 1, 1) - 0.5).clamp(-1, 1)


def other_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """For each image another one of the batch, moved with wrap-around."""
    B, _, H, W = images.shape
    moved = []
    for i in range(B):
        j = (i + 1 + int(torch.randint(max(1, B - 1), (), generator=generator))) % B
        dy, dx = (int(torch.randint(s, (), generator=generator)) for s in (H, W))
        moved.append(images[j].roll((dy, dx), (1, 2)))
    return torch.stack(moved)


MADE: tuple[Callable[..., Tensor], ...] = (gratings, mosaics, clouds)


def two_colours(wave: Tensor, C: int, generator: torch.Generator) -> Tensor:
    """Waves (n, H, W) in [-1, 1] -> (n, C, H, W) between two random colours."""
    a, b = 2 * rand(generator, 2, len(wave), C, 1, 1) - 1
    return a + (b - a) * (wave[:, None] + 1) / 2


def read_texture(path: Path, C: int, H: int, W: int) -> Tensor:
    """A texture image (C, H, W) in [-1, 1]; grey for one channel, its mean fills a fourth."""
    texture = to_float(resize_image(read_image(path), max(H, W), "squash"))[:, :H, :W]
    if len(texture) == 1 or C == 1:
        return texture.mean(0, keepdim=True).expand(C, H, W)
    return torch.cat([texture, texture.mean(0, keepdim=True)])[:C]


def shuffle_strips(image: Tensor, generator: torch.Generator) -> Tensor:
    """Cut (C, H, W) into columns and permute them, then rows.

    After the official code, which shuffles even and odd strips separately.
    """
    for axis in (2, 1):
        strips = list(image.tensor_split(STRIPS, dim=axis))
        order = torch.randperm(len(strips), generator=generator).tolist()
        image = torch.cat([strips[k] for k in order], dim=axis)
    return image


def change(image: Tensor, generator: torch.Generator) -> Tensor:
    """Three different random operations on an image (C, H, W) in [-1, 1]."""
    image = (image[:, None] + 1) / 2  # channel by channel, so that any number will do
    for k in torch.randperm(len(CHANGES), generator=generator)[:OPERATIONS].tolist():
        image = CHANGES[k](image, float(rand(generator))).clamp(0, 1)
    return 2 * image[:, 0] - 1


# The official code's, without sharpness, hue and saturation; ``u`` is uniform in [0, 1).
CHANGES: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda image, u: image**2 ** (2 * u - 1),  # gamma 1/2 .. 2
    lambda image, u: (0.8 + 0.4 * u) * image + 60 / 255 * (u - 0.5),  # brightness
    lambda image, u: TF.solarize(image, (32 + 96 * u) / 255),
    lambda image, u: TF.posterize((255 * image).to(torch.uint8), 2 + int(3 * u)) / 255,
    lambda image, u: TF.invert(image),
    lambda image, u: TF.autocontrast(image),
    lambda image, u: TF.equalize((255 * image).to(torch.uint8)) / 255,
    lambda image, u: TF.rotate(image, 90 * u - 45, fill=float(image.mean())),
)
