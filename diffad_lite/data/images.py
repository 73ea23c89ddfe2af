"""Pixels: read and resize image files, convert between uint8 (files) and [-1, 1] (models)."""

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from diffad_lite.data.formats import foreign_format

Resize = Literal["squash", "pad"]
STANDARD_DEVIATION = 0.35  # of a standardised image, so that few pixels leave [-1, 1]
CACHED_BYTES = 2**28  # of all decoded images together
STACK = ".npy"  # several channels in one array, such as the sequences of an MRI scanner
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", STACK}
# Accepted formats, whatever the suffix; one of Pillow's other formats starts a program.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
LOSSY = {"JPEG", "MPO", "WEBP"}
ORIENTATION = 0x0112  # tag of EXIF data
GREY_FIX = "choose a range, and save 8 or 16 bit, for example with Pillow or tifffile"


class _Cache(dict[tuple[str, int], np.ndarray]):
    """Decoded images by path and modification time, at most ``CACHED_BYTES``, oldest out first."""

    size = 0

    def add(self, key: tuple[str, int], pixels: np.ndarray) -> None:
        """Add a new image, unless it alone would take more than a sixteenth of the cache."""
        if pixels.nbytes > CACHED_BYTES // 16:
            return
        self[key] = pixels
        self.size += pixels.nbytes
        while self.size > CACHED_BYTES:
            self.size -= self.pop(next(iter(self))).nbytes


_cache = _Cache()


def names_image(path: Path) -> bool:
    """Tell whether a path has the name of an image file that is not hidden."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def list_images(folder: Path) -> list[Path]:
    """Return the image files directly inside ``folder``, sorted, without hidden files.

    Raises:
        ValueError: a name is not valid UTF-8, so that no table could hold it.
    """
    paths = sorted(filter(names_image, folder.iterdir()))
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name {str(path)!r} is not text in UTF-8; rename it") from None
    return paths


def read_image(path: Path, bits: int = 16) -> np.ndarray:
    """Read an image file as uint8 (C, H, W), C = 1 or 3; a process decodes each file once.

    EXIF rotation is applied, transparency is dropped. Grey values of more than 8 bits are scaled
    from 0 .. 2 ** ``bits`` - 1 to 0 .. 255; larger values become 255. A ``.npy`` file is a stack of
    channels, uint8 (C, H, W), C from 1 to 4.

    Raises:
        FileNotFoundError: no such file.
        PermissionError: no permission to read it.
        ValueError: not an image, a truncated one, or one whose range of values is unknown.
    """
    values = read_values(path)
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.float32:
        fault = "floating-point pixels have no agreed range"
        raise ValueError(f"cannot read {path}: the file is fine, but {fault}; {GREY_FIX}")
    low, high = values.min(), values.max()
    if low < 0 or high >= 2**16:
        fault = f"the range of its values ({low} .. {high}) is not known"
        raise ValueError(f"cannot read {path}: the file is fine, but {fault}; {GREY_FIX}")
    return (values / ((2**bits - 1) / 255)).clip(0, 255).round().astype(np.uint8)


def read_values(path: Path) -> np.ndarray:
    """Read an image file with the values that it holds, (C, H, W), read-only.

    uint8; for grey images also uint16, int32 or float32. The rest, and the errors, are those of
    :func:`read_image`.
    """
    if not path.exists():
        raise FileNotFoundError(f"no image at {path}, or it is a broken link; repair or remove it")
    if not (path.is_file() or path.is_dir()):  # reading from a pipe would wait for ever
        raise ValueError(f"cannot read {path} as an image (no regular file); repair or remove it")
    key = str(path), path.stat().st_mtime_ns
    if key in _cache:
        return _cache[key]
    values = _decode(str(path))
    _cache.add(key, values)
    return values


def _decode(path: str) -> np.ndarray:
    is_stack = path.lower().endswith(STACK)
    try:
        values = _decode_stack(path) if is_stack else _decode_picture(path)
    except PermissionError:
        raise
    except Exception as error:  # decoders raise errors of any type on damaged files
        if not is_stack and (fault := foreign_format(Path(path), by_content=True)):
            raise ValueError(f"cannot read {path}: the file is fine, but {fault}") from None
        kind, fix = "an image", "repair or remove it"
        if is_stack:
            kind, fix = "a stack", "save uint8 (C, H, W), C from 1 to 4, with numpy.save"
        reason = error_reason(error)
        raise ValueError(f"cannot read {path} as {kind} ({reason}); {fix}") from None
    values.setflags(write=False)  # the cache returns the same array again
    return values


def _decode_stack(path: str) -> np.ndarray:
    with open(path, "rb") as file:
        pixels = np.lib.format.read_array(file, allow_pickle=False)
    is_valid = pixels.dtype == np.uint8 and pixels.ndim == 3 and 0 not in pixels.shape
    if not is_valid or len(pixels) > 4:
        raise ValueError(f"it holds {pixels.dtype} {pixels.shape}")
    return pixels


def _decode_picture(path: str) -> np.ndarray:
    with Image.open(path, formats=FORMATS) as file:
        if isinstance(file, TiffImageFile):
            _check_tiff(file)
        image = ImageOps.exif_transpose(file)
        image.info.pop("transparency", None)  # Pillow would warn about it on conversion
        if image.mode == "F" or image.mode.startswith("I"):
            values = np.array(image)[None]
            return values.astype(values.dtype.newbyteorder("="))
        if image.mode in ("1", "L", "LA"):
            return np.array(image.convert("L"))[None]
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def _check_tiff(file: TiffImageFile) -> None:
    """Refuse what Pillow reads without an error, but wrongly."""
    if file.tag_v2.get(277, 1) > 4:
        raise ValueError("Pillow would drop channels")
    if file.mode == "L" and 2 in file.tag_v2.get(339, ()):
        raise ValueError("Pillow would take signed values for unsigned ones")


class Header(NamedTuple):
    """Properties of an image file that are known without decoding it.

    Attributes:
        bits: of a stored value: 8, 16 or 32.
        is_grey: one channel, of more than 8 bits.
        n_pictures: pages or frames; only the first is read.
        is_lossy: the compression may change values.
        has_alpha: a fourth channel, or a second one beside grey, which is dropped as transparency.
    """

    bits: int = 8
    is_grey: bool = False
    n_pictures: int = 1
    is_lossy: bool = False
    has_alpha: bool = False


def read_header(path: Path) -> Header:
    """Read the header of an image file; of a broken file, which cannot be read, the default."""
    if not path.is_file() or path.suffix.lower() == STACK:
        return Header()
    try:
        with Image.open(path, formats=FORMATS) as file:
            is_deep = file.mode == "F" or file.mode.startswith("I")
            bits = 32 if is_deep else 8
            if "16" in file.mode or any(";16" in str(tile[3]) for tile in file.tile):
                bits = 16
            lossy = {file.format, str(file.info.get("compression")).upper()}
            n_pictures = int(getattr(file, "n_frames", 1))
            has_alpha = file.mode in ("LA", "RGBA")
            return Header(bits, is_deep, n_pictures, bool(lossy & LOSSY), has_alpha)
    except Exception:  # read_values names the fault
        return Header()


def is_transparent(path: Path) -> bool:
    """Return whether the alpha channel of an image file, whose header has one, is not opaque."""
    with Image.open(path, formats=FORMATS) as file:
        return bool(np.asarray(file.getchannel("A")).min() < 255)


def is_rotated(path: Path) -> bool:
    """Return whether EXIF data rotate or mirror a readable image file."""
    if path.suffix.lower() == STACK:
        return False
    with Image.open(path, formats=FORMATS) as file:
        return file.getexif().get(ORIENTATION, 1) in range(2, 9)


def error_reason(error: Exception) -> str:
    """Return the reason that an error of a library gives, in at most 200 characters."""
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]


def resize_image(image: np.ndarray, size: int, resize: Resize) -> np.ndarray:
    """Resize uint8 (C, H, W) to (C, size, size) by Lanczos; ``pad`` keeps the aspect ratio."""
    H, W = image.shape[1:]
    top, left, h, w = pad_box(H, W, size) if resize == "pad" else (0, 0, size, size)
    if (h, w) != (H, W):
        channels = [Image.fromarray(channel) for channel in image]
        image = np.stack([np.asarray(c.resize((w, h), Image.Resampling.LANCZOS)) for c in channels])
    widths = ((0, 0), (top, size - h - top), (left, size - w - left))
    return np.pad(image, widths, mode="edge")


def pad_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of an image in the square that ``resize="pad"`` makes."""
    scale = size / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - h) // 2, (size - w) // 2, h, w


def to_float(images: np.ndarray) -> Tensor:
    """Convert uint8 (..., C, H, W) to float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """Clip floats to [-1, 1] and convert them to uint8, the inverse of :func:`to_float`."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def check_values(images: Tensor, what: str) -> None:
    """Raise ValueError unless images (N, C, H, W) are float32, finite and in [-1, 1], with N > 0.

    ``what`` names the images in the message.
    """
    if len(images) == 0:
        raise ValueError(f"{what}: no images")
    if images.dtype != torch.float32:
        raise ValueError(f"{what}: expected float32, got {images.dtype}; call .float()")
    if not torch.isfinite(images).all():
        index = int((~torch.isfinite(images)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{what}: image {index} contains NaN or infinity")
    if images.min() < -1.001 or images.max() > 1.001:
        raise ValueError(
            f"{what}: values must lie in [-1, 1], got {images.min():.3g}..{images.max():.3g}; "
            "scale uint8 images by x / 127.5 - 1"
        )


def image_keys(images: Tensor) -> list[str]:
    """Return a hash of the uint8 pixels of each image, which seeds its noise."""
    return [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in to_uint8(images)]


def standardise(images: Tensor, like: Tensor | None = None) -> Tensor:
    """Bring each image to mean 0 and one standard deviation, and clip it to [-1, 1].

    Images then differ in neither brightness nor contrast.

    Args:
        images: (B, C, H, W).
        like: images (B, C, H, W) whose means and standard deviations are used instead, such as the
            clean images in which defects were planted.
    """
    mean, std = _mean_and_std(images if like is None else like)
    return ((images - mean) / std * STANDARD_DEVIATION).clamp(-1, 1)


def undo_standardise(standardised: Tensor, images: Tensor) -> Tensor:
    """Restore the brightness and contrast of ``images`` in what ``standardise(images)`` led to."""
    mean, std = _mean_and_std(images)
    return standardised / STANDARD_DEVIATION * std + mean


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean, images.std(dim=(1, 2, 3), keepdim=True).clamp_min(0.02)  # constant images
