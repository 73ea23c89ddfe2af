"""Depth of pixels: the range of values that image files of more than 8 bits really use.

A camera of 12 bits stores 0 .. 4095 in files of 16 bits. The range is decided once for a data set,
from its normal images, so that all images stay comparable.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from diffad_lite.data.images import (
    Header,
    is_rotated,
    is_transparent,
    read_header,
    read_image,
    read_values,
)
from diffad_lite.data.source import count_of

DEPTHS = (8, 10, 12, 14, 16)  # bits of the usual cameras and scanners
DARK = 64  # of 255; colour values below it use less than 14 of 16 bits


def choose_bits(normals: Collection[Path]) -> int | None:
    """Return the smallest usual depth that holds all values of the deep grey images.

    None if no image has more than 8 bits.

    Raises:
        ValueError: the range is unknown: deep images among others, or deep colour images that do
            not use their range.
    """
    headers = {path: read_header(path) for path in normals}
    deep = [path for path, header in headers.items() if header.is_grey]
    cut = [path for path, header in headers.items() if header.bits > 8 and not header.is_grey]
    if cut and (largest := max(int(read_image(path).max()) for path in cut)) < DARK:
        raise ValueError(
            f"{count_of(cut, 'image')} with 16 bits per channel, e.g. {cut[0]}, but no value above "
            f"{256 * largest + 255} of 65535; their range is not known: save them with 8 bits"
        )
    if not deep:
        return None
    for path in deep:
        read_image(path)  # refuses floats, negative values and more than 16 bits
    largest = max(int(read_values(path).max()) for path in deep)
    bits = next(bits for bits in DEPTHS if largest < 2**bits)
    if bits < 16 and len(deep) < len(normals):
        other = next(path for path in normals if path not in set(deep))
        raise ValueError(
            f"{count_of(deep, 'image')} of 16 bits, e.g. {deep[0]}, with values up to {largest} "
            f"only, and {len(normals) - len(deep)} of 8 bits, e.g. {other}; how their brightness "
            "compares is not known: save all alike"
        )
    return bits


def describe_files(images: Mapping[str, Path], bits: int, masked: set[str]) -> list[str]:
    """Return notices about what the headers of image files say.

    Args:
        images: all images of a data set, by name.
        bits: the depth that :func:`choose_bits` returned.
        masked: names of the images that have a mask.
    """
    headers = {name: read_header(path) for name, path in images.items()}
    deep = [name for name, header in headers.items() if header.is_grey]
    notices = _describe_depth(images, headers, deep, bits)
    if several := [name for name, header in headers.items() if header.n_pictures > 1]:
        notices.append(
            f"{count_of(several, 'file')} with several pages or frames, e.g. {images[several[0]]} "
            f"({headers[several[0]].n_pictures}): only the first is read; save each as a file if "
            "they are images of their own"
        )
    alpha = [name for name, header in headers.items() if header.has_alpha]
    if dropped := [name for name in alpha if is_transparent(images[name])]:
        notices.append(
            f"{count_of(dropped, 'image')} with transparency, e.g. {images[dropped[0]]}: that "
            "channel is dropped; save it as a stack in npy if it is a measurement"
        )
    if turned := [n for n in sorted(masked & set(images)) if is_rotated(images[n])]:
        notices.append(
            f"{count_of(turned, 'image')} with a mask and EXIF rotation, e.g. "
            f"{images[turned[0]]}: the image is rotated, the mask is taken as it is; save the "
            "images upright, without EXIF data"
        )
    return notices


def _describe_depth(
    images: Mapping[str, Path],
    headers: Mapping[str, Header],
    deep: Sequence[str],
    bits: int,
) -> list[str]:
    if not deep:
        return []
    notices = []
    highest = 2**bits - 1
    stored = headers[deep[0]].bits
    if highest < 2**stored - 1:
        notices.append(
            f"{count_of(deep, 'image')} stored with {stored} bits, e.g. {images[deep[0]]}: read "
            f"with {bits} bits, 0 .. {highest}"
        )
    clipped = [name for name in deep if read_values(images[name]).max() > highest]
    if clipped:
        notices.append(
            f"{count_of(clipped, 'image')} with values above {highest}, e.g. {images[clipped[0]]}, "
            "clipped; save all images with 8 bits if these values matter"
        )
    if len(deep) < len(headers):
        flat = next(name for name in headers if name not in set(deep))
        notices.append(
            f"{count_of(deep, 'image')} of more than 8 bits, e.g. {images[deep[0]]}, and "
            f"{len(headers) - len(deep)} of 8 bits, e.g. {images[flat]}: their brightness may not "
            "be comparable; save all alike"
        )
    return notices
