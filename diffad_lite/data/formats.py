"""Files that are fine, but that this package cannot read: their kinds, and what converts them."""

import struct
from pathlib import Path

from PIL.TiffImagePlugin import ImageFileDirectory_v2

SLICES = "save its slices as PNG, or as uint8 arrays (C, H, W) with numpy.save"
PICTURE = "save it as PNG with 8 or 16 bits"
FOREIGN = {  # suffix -> kind of file, what converts it
    ".dcm": ("DICOM", f"pydicom: choose a window of grey values, and {SLICES}"),
    ".nii": ("NIfTI", f"nibabel: {SLICES}"),
    ".nii.gz": ("NIfTI", f"nibabel: {SLICES}"),
    ".mha": ("MetaImage", f"SimpleITK: {SLICES}"),
    ".nrrd": ("NRRD", f"SimpleITK: {SLICES}"),
    ".czi": ("a microscope's format", f"aicsimageio: {SLICES}"),
    ".npz": ("a NumPy archive", "numpy: save each image as uint8 (C, H, W) with numpy.save"),
    ".h5": ("HDF5", "h5py: save each image as uint8 (C, H, W) with numpy.save"),
    ".mat": ("MATLAB", "scipy.io: save each image as uint8 (C, H, W) with numpy.save"),
    ".heic": ("HEIC", f"pillow-heif: {PICTURE}"),
    ".exr": ("OpenEXR", f"OpenEXR: choose a range of values, and {PICTURE}"),
    ".dng": ("a camera's raw format", f"rawpy: {PICTURE}"),
    ".nef": ("a camera's raw format", f"rawpy: {PICTURE}"),
    ".cr2": ("a camera's raw format", f"rawpy: {PICTURE}"),
    ".arw": ("a camera's raw format", f"rawpy: {PICTURE}"),
    **{
        f".{name}": (name.upper(), f"Pillow: {PICTURE}")
        for name in ("gif", "pgm", "ppm", "pnm", "jp2", "avif", "jfif", "tga", "ico", "pcx")
    },
}
TIFF_MAGIC = (b"II*\0", b"MM\0*")
SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}


def foreign_format(path: Path, *, by_content: bool = False) -> str | None:
    """Return what kind of file this is and what converts it, or None for other files.

    A known suffix is enough. Files without a suffix, or with a number as suffix, are recognised by
    their first bytes; with ``by_content``, files of any suffix.
    """
    name = path.name.lower()
    kind = next((FOREIGN[suffix] for suffix in FOREIGN if name.endswith(suffix)), None)
    if kind is None and (by_content or not any(map(str.isalpha, path.suffix))):
        kind = _kind_by_content(path)
    return None if kind is None else f"{kind[0]} is not supported; convert it with {kind[1]}"


def describe_foreign(folder: Path) -> str:
    """Return "; <file>: <kind and converter>" for a file of another format in a folder, or ""."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and (kind := foreign_format(path)):
            return f"; {path.name}: {kind}"
    return ""


def _kind_by_content(path: Path) -> tuple[str, str] | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            head = file.read(352)
            if head[:4] in TIFF_MAGIC:
                return _kind_of_tiff(path)
    except OSError:
        return None
    if head[128:132] == b"DICM":
        return FOREIGN[".dcm"]
    return FOREIGN[".nii"] if head[344:348] in (b"n+1\0", b"ni1\0") else None


def _kind_of_tiff(path: Path) -> tuple[str, str] | None:
    """Return the number and kind of a TIFF's channels, if its directory is intact and odd."""
    try:
        with path.open("rb") as file:
            tags = ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
        n_channels = int(tags.get(277, 1))
        bits = int(tags.get(258, (1,))[0])
        form = SAMPLE_FORMATS.get(int(tags.get(339, (1,))[0]), "unknown")
    except (OSError, ValueError, TypeError, IndexError, KeyError, SyntaxError, struct.error):
        return None
    if n_channels <= 4 and bits in (1, 2, 4, 8, 16) and form == "unsigned" and n_channels != 2:
        return None  # Pillow reads these: what it refuses is damaged
    kind = f"a TIFF of {n_channels} channels, {form} with {bits} bits,"
    how = "tifffile: save uint8 (C, H, W), C from 1 to 4, with numpy.save"
    return kind, how if n_channels > 1 else f"tifffile: choose a range of values, and {PICTURE}"
