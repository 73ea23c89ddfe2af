"""Appearances of synthetic anomalies: textures from files, procedural textures, augmentations.

The official code of DiffusionAD uses photographs of textures (DTD). Without them, gratings,
mosaics, clouds and other images of the batch take their place.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from diffad_lite.data.images import list_images, read_image, resize_image, to_float

N_AUGMENTATIONS = 3  # per appearance
N_STRIPS = 8  # strips or tiles per axis


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw uniform numbers in [0, 1) on the CPU."""
    return torch.rand(shape, generator=generator)


def list_textures(root: Path) -> list[Path]:
    """Return all images in a folder and its sub-folders.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
    """
    folders = [root, *sorted(p for p in root.rglob("*") if p.is_dir())] if root.is_dir() else []
    files = [file for folder in folders for file in list_images(folder)]
    if not files:
        raise FileNotFoundError(
            f"no texture images in {root.absolute()}; unpack the Describable Textures Dataset "
            "(www.robots.ox.ac.uk/~vgg/data/dtd) there, or set synthesis.texture_root to another "
            'folder, or to "" for procedural textures'
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


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Apply three different random augmentations to an image (C, H, W) in [-1, 1]."""
    image = (image[:, None] + 1) / 2  # each channel is an image, so any number of channels works
    for k in torch.randperm(len(AUGMENTATIONS), generator=generator)[:N_AUGMENTATIONS].tolist():
        image = AUGMENTATIONS[k](image, float(rand(generator))).clamp(0, 1)
    return 2 * image[:, 0] - 1


# Those of the official code, without sharpness, hue and saturation; ``u`` is uniform in [0, 1).
AUGMENTATIONS: tuple[Callable[[Tensor, float], Tensor], ...] = (
    lambda image, u: image**2 ** (2 * u - 1),  # gamma 1/2 .. 2
    lambda image, u: (0.8 + 0.4 * u) * image + 60 / 255 * (u - 0.5),  # brightness
    lambda image, u: TF.solarize(image, (32 + 96 * u) / 255),
    lambda image, u: TF.posterize((255 * image).to(torch.uint8), 2 + int(3 * u)) / 255,
    lambda image, u: TF.invert(image),
    lambda image, u: TF.autocontrast(image),
    lambda image, u: TF.equalize((255 * image).to(torch.uint8)) / 255,
    lambda image, u: TF.rotate(image, 90 * u - 45, fill=float(image.mean())),
)
