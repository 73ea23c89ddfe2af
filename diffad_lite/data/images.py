"""Pixels: reading image files, resizing, the two ranges (uint8 on disk, [-1, 1] in models)."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Resize = Literal["squash", "pad"]
STANDARD_DEVIATION = 0.35  # of a standardised image, so that few pixels leave [-1, 1]
CACHED_BYTES = 2**28  # of decoded images, together; those read first give way
STACK = ".npy"  # several channels in one array, such as the sequences of a scanner
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", STACK}
# What a file may be, whatever its suffix; Pillow's others include one that starts a program.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")


class _Cache(dict[tuple[str, int], np.ndarray]):
    """Decoded images by file and time of change, at most ``CACHED_BYTES`` of them."""

    size = 0

    def keep(self, key: tuple[str, int], pixels: np.ndarray) -> None:
        """Add an image that is not here yet, unless it alone would take a sixteenth of the room."""
        if pixels.nbytes > CACHED_BYTES // 16:
            return
        self[key] = pixels
        self.size += pixels.nbytes
        while self.size > CACHED_BYTES:
            self.size -= self.pop(next(iter(self))).nbytes

    def clear(self) -> None:
        """Forget all images."""
        super().clear()
        self.size = 0


_cache = _Cache()


def list_images(folder: Path) -> list[Path]:
    """Image files directly inside ``folder``, sorted; hidden files are passed over.

    Raises:
        ValueError: a name is not text, so that no table could hold it.
    """
    found = sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
    )
    for path in found:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name {str(path)!r} is not text in UTF-8; rename it") from None
    return found


def read_image(path: Path) -> np.ndarray:
    """One image file as uint8 (C, H, W), C = 1 or 3, or 1 to 4 of a stack; decoded once in a
    process.

    EXIF rotation is applied, transparency dropped, 16-bit grey scaled to 8 bit. A stack is a
    ``.npy`` file of uint8 (C, H, W).

    Raises:
        FileNotFoundError: no such file.
        PermissionError: it may not be read.
        ValueError: not an image, or a truncated one.
    """
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}, or it is a broken link; repair or remove it")
    if not (path.is_file() or path.is_dir()):  # reading from a pipe would wait for ever
        raise ValueError(f"cannot read {path} as an image (no regular file); repair or remove it")
    key = str(path), path.stat().st_mtime_ns
    if key in _cache:
        return _cache[key]
    pixels = _read(str(path))
    _cache.keep(key, pixels)
    return pixels


def _read(path: str) -> np.ndarray:
    if path.lower().endswith(STACK):
        return _read_stack(path)
    try:
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
            image.info.pop("transparency", None)  # Pillow warns of it on conversion
            if image.mode == "F":
                raise ValueError("floating-point pixels have no agreed range; save 8 or 16 bit")
            if image.mode.startswith("I"):  # 16 bit grey: 0..65535 -> 0..255
                grey16 = np.asarray(image, dtype=np.float64) / 257
                pixels = grey16.clip(0, 255).round().astype(np.uint8)
            else:
                is_grey = image.mode in ("1", "L", "LA")
                pixels = np.asarray(image.convert("L" if is_grey else "RGB"))
    except PermissionError:
        raise
    except Exception as error:  # decoders of spoilt files raise what they like
        unknown = isinstance(error, UnidentifiedImageError)
        why = "of no known format" if unknown else getattr(error, "strerror", None) or _words(error)
        raise ValueError(f"cannot read {path} as an image ({why}); repair or remove it") from None
    pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    pixels.setflags(write=False)  # the cache hands out the same array again
    return pixels


def _read_stack(path: str) -> np.ndarray:
    fix = "save uint8 (C, H, W), C from 1 to 4, with numpy.save"
    try:
        with open(path, "rb") as file:
            pixels = np.lib.format.read_array(file, allow_pickle=False)
    except PermissionError:
        raise
    except Exception as error:  # a spoilt header is parsed as Python is
        fault = f"cannot read {path} as a stack of channels ({_words(error)})"
        raise ValueError(f"{fault}; {fix}") from None
    whole = pixels.ndim == 3 and pixels.dtype == np.uint8
    if not whole or not 1 <= len(pixels) <= 4 or 0 in pixels.shape:
        raise ValueError(f"{path} holds {pixels.dtype} {pixels.shape}; {fix}")
    pixels.setflags(write=False)
    return pixels


def _words(error: Exception) -> str:
    """What an error of a library says, in at most 200 letters."""
    return (str(error) or type(error).__name__)[:200]


def resize_image(image: np.ndarray, size: int, resize: Resize) -> np.ndarray:
    """uint8 (C, H, W) -> (C, size, size), Lanczos; ``pad`` keeps the aspect ratio."""
    H, W = image.shape[1:]
    top, left, h, w = pad_box(H, W, size) if resize == "pad" else (0, 0, size, size)
    if (h, w) != (H, W):
        channels = [Image.fromarray(channel) for channel in image]
        image = np.stack([np.asarray(c.resize((w, h), Image.Resampling.LANCZOS)) for c in channels])
    widths = ((0, 0), (top, size - h - top), (left, size - w - left))
    return np.pad(image, widths, mode="edge")


def pad_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Where ``resize="pad"`` puts an image: (top, left, height, width) inside the square."""
    scale = size / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - h) // 2, (size - w) // 2, h, w


def to_float(images: np.ndarray) -> Tensor:
    """uint8 (..., C, H, W) -> float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """float in [-1, 1] -> uint8, the inverse of :func:`to_float`."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def check_values(images: Tensor, what: str) -> None:
    """Raise ValueError unless there are images (N, C, H, W), float32, finite and in [-1, 1].

    Args:
        images: as a model is to see them.
        what: what the message calls them.
    """
    if len(images) == 0:
        raise ValueError(f"{what}: no images")
    if images.dtype != torch.float32:
        raise ValueError(f"{what}: expected float32, got {images.dtype}; call .float()")
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{what}: image {bad} contains NaN or infinity")
    if images.min() < -1.001 or images.max() > 1.001:
        raise ValueError(
            f"{what}: values must lie in [-1, 1], got {images.min():.3g}..{images.max():.3g}; "
            "scale uint8 images by x / 127.5 - 1"
        )


def image_keys(images: Tensor) -> list[str]:
    """A name for each image made of its own pixels (as uint8), for seeding its noise."""
    return [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in to_uint8(images)]


def standardise(images: Tensor, like: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) brought to mean 0 and one deviation each, and clipped to [-1, 1].

    What then differs between two images is not how bright or how contrasty they are.

    Args:
        images: (B, C, H, W).
        like: images (B, C, H, W) whose means and deviations are taken instead, such as the twins
            that the images were before defects were planted in them.
    """
    mean, deviation = _mean_and_deviation(images if like is None else like)
    return ((images - mean) / deviation * STANDARD_DEVIATION).clamp(-1, 1)


def undo_standardise(standardised: Tensor, images: Tensor) -> Tensor:
    """Bring a picture made from ``standardise(images)`` back to the brightness of ``images``."""
    mean, deviation = _mean_and_deviation(images)
    return standardised / STANDARD_DEVIATION * deviation + mean


def _mean_and_deviation(images: Tensor) -> tuple[Tensor, Tensor]:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean, images.std(dim=(1, 2, 3), keepdim=True).clamp_min(0.02)  # of an empty image
