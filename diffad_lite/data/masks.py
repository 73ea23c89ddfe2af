"""Ground-truth masks: which file belongs to which image, and which of its values are a defect."""

import re
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffad_lite.data.images import read_header, read_values
from diffad_lite.data.source import Labelled, count_of, walk_images

MASK_FOLDERS = ("ground_truth", "groundtruth", "masks", "mask", "gt")  # in any case of letters
MASK_ENDING = re.compile(r"[_-](mask|gt|ground_?truth|label|seg)([_-]?\d+)?$", re.IGNORECASE)
N_CLASSES = 32  # masks with more different values show grey levels, not kinds of defect
FAINT = 64  # below it, no value of a lossy file is safely above the noise of its compression
COMMON = 0.5  # fraction of an image above which a mask may be inverted


@dataclass
class MaskIndex:
    """Mask files by the image that they belong to: the kind of defect, sub-folders, the stem.

    Attributes:
        files: place and stem of an image -> mask files, each with a rank; the lowest is taken.
        images: place and stem of all images; a mask named exactly like an image is of no other.
        used: mask files that belong to an image.
    """

    files: dict[tuple[str, ...], list[tuple[int, Path]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    images: set[tuple[str, ...]] = field(default_factory=set)
    used: set[Path] = field(default_factory=set)

    def add_folder(self, folder: Path) -> None:
        """Add all masks of one kind of defect, in a folder and its sub-folders."""
        for path in walk_images(folder):
            self.add(path, (folder.name, *path.relative_to(folder).parts[:-1]))

    def add(self, path: Path, place: tuple[str, ...]) -> None:
        """Add a mask: ``<stem>_mask``, ``<stem>``, or any file in the folder ``<stem>``."""
        stem = MASK_ENDING.sub("", path.stem)
        self.files[self.key(place[:-1], place[-1])].append((0, path))
        self.files[self.key(place, path.stem)].append((2, path))
        if stem != path.stem:
            self.files[self.key(place, stem)].append((1, path))

    def find(self, place: tuple[str, ...], stem: str) -> tuple[Path, ...] | None:
        """Return the masks of an image, one for each of its defects, or None."""
        entries = [
            (rank, path)
            for rank, path in self.files.get(self.key(place, stem), [])
            if rank != 1 or self.key(place, path.stem) not in self.images
        ]
        best = min((rank for rank, _ in entries), default=0)
        paths = [path for rank, path in entries if rank == best]
        if best > 0:  # several formats of one mask
            paths.sort(key=lambda path: (path.suffix.lower() in (".jpg", ".jpeg"), path))
            paths = list({path.stem.lower(): path for path in reversed(paths)}.values())
        self.used.update(paths)
        return tuple(sorted(paths)) or None

    @staticmethod
    def key(place: tuple[str, ...], stem: str) -> tuple[str, ...]:
        """Return the key of an image: its kind of defect in lower case, sub-folders, stem."""
        kind, *folders = (*place, stem)
        return kind.lower(), *folders

    def paths(self) -> list[Path]:
        """Return all files, sorted."""
        return sorted({path for files in self.files.values() for _, path in files})

    def unmatched(self) -> list[Path]:
        """Return the files that belong to no image, sorted."""
        return [path for path in self.paths() if path not in self.used]


def without_masks(paths: Sequence[Path]) -> list[Path]:
    """Return the images without the masks that lie beside them, such as ``000_mask.png``."""
    stems = {(path.parent, path.stem) for path in paths}
    return [path for path in paths if not is_mask_beside(path, stems)]


def is_mask_beside(path: Path, stems: Container[tuple[Path, str]]) -> bool:
    """Return whether a file is the mask of another file; ``stems`` are (folder, stem)."""
    stem = MASK_ENDING.sub("", path.stem)
    return stem != path.stem and (path.parent, stem) in stems


def read_masks(
    test: Mapping[str, Labelled], sizes: Mapping[str, tuple[int, int]]
) -> tuple[list[np.ndarray | None] | None, list[str]]:
    """Read the masks of all test images, and say how their values were understood.

    Args:
        test: images by name.
        sizes: (height, width) of each image, which its masks must have.

    Returns:
        per image, a bool array, or None where it is not known; None if no anomalous image has a
        mask file. Then notices, one sentence each.

    Raises:
        ValueError: a mask is no image, or has another size than its image.
    """
    if all(item.mask is None or item.defect_type == "good" for item in test.values()):
        return None, []
    values = {name: _read_files(name, item, sizes[name]) for name, item in test.items()}
    files = {path: array for arrays in values.values() for path, array in arrays.items()}
    marked, notices = _binarise(files)
    masks: list[np.ndarray | None] = []
    contradictory = []
    for name, item in test.items():
        mask = np.zeros(sizes[name], dtype=bool)
        for path in values[name]:
            mask |= marked[path]
        if item.defect_type == "good" and mask.any():
            contradictory.append(name)
            mask = np.zeros_like(mask)
        masks.append(mask if mask.any() or item.defect_type == "good" else None)
    notices += _describe(test, masks)
    if contradictory:
        notices.append(
            f"{count_of(contradictory, 'normal test image')} with a mask that marks pixels, e.g. "
            f"{contradictory[0]}: the folder counts, not the mask; check its label"
        )
    return masks, notices


def _read_files(name: str, item: Labelled, size: tuple[int, int]) -> dict[Path | str, np.ndarray]:
    """Return the values (H, W) of each mask file of an image; key of an array is the image."""
    file = item.mask
    if file is None:
        return {}
    if isinstance(file, np.ndarray):
        arrays: dict[Path | str, np.ndarray] = {name: file}
    else:
        paths = file if isinstance(file, tuple) else (file,)
        arrays = {path: read_values(path).max(axis=0) for path in paths}
    for path, array in arrays.items():
        if array.shape != size:
            raise ValueError(
                f"the mask of {name} is {array.shape[1]}x{array.shape[0]} pixels, its image "
                f"{size[1]}x{size[0]}; export masks at the size of their images ({path})"
            )
    return arrays


def _binarise(
    files: Mapping[Path | str, np.ndarray],
) -> tuple[dict[Path | str, np.ndarray], list[str]]:
    """Return which pixels of each mask file are anomalous, and how its values were understood.

    Anomalous is what is not 0. Files with more values than kinds of defect hold grey levels, for
    example at blurred edges: there it is what lies above half of the file's largest value.
    """
    levels = {path: np.unique(values[values != 0]) for path, values in files.items()}
    several = [path for path, values in levels.items() if len(values) > 1]
    marking = [path for path, values in levels.items() if len(values)]
    lossy = [path for path in marking if isinstance(path, Path) and read_header(path).is_lossy]
    classes = [path for path in several if path not in set(lossy)]
    faint = [path for path in lossy if levels[path].max() < FAINT]
    is_grey = len({value for path in classes for value in levels[path].tolist()}) > N_CLASSES
    halved = set(lossy) | (set(classes) if is_grey else set())
    marked = {
        path: values > values.max() / 2 if path in halved else values != 0
        for path, values in files.items()
    }
    marked |= {path: np.zeros(files[path].shape, dtype=bool) for path in faint}
    notices = []
    if grey := [path for path in marking if path in halved and path not in faint]:
        notices.append(
            f"{count_of(grey, 'mask')} with blurred edges or lossy compression, e.g. {grey[0]}: "
            "values above half of the file's largest one count as anomalous; save 0 and 255 as PNG"
        )
    if classes and not is_grey:
        some = ", ".join(f"{value:g}" for value in levels[classes[0]][:4])
        notices.append(
            f"{count_of(classes, 'mask')} with several values, e.g. {classes[0]} ({some}): every "
            "value except 0 counts as anomalous"
        )
    if faint:
        notices.append(
            f"{count_of(faint, 'mask')} not used, e.g. {faint[0]}: its values 0 .. "
            f"{levels[faint[0]].max():g} may be noise of the lossy compression; save 0 and 255 as "
            "PNG"
        )
    return marked, notices


def _describe(test: Mapping[str, Labelled], masks: Sequence[np.ndarray | None]) -> list[str]:
    """Return notices about anomalous images without a usable mask, and about large masks."""
    notices = []
    anomalous = {
        name: mask
        for (name, item), mask in zip(test.items(), masks, strict=True)
        if item.defect_type != "good"
    }
    if unknown := [name for name, mask in anomalous.items() if mask is None]:
        n_files = sum(test[name].mask is not None for name in unknown)
        notices.append(
            f"{len(unknown)} of {len(anomalous)} anomalous images have no mask, or an empty one "
            f"({n_files}), e.g. {unknown[0]}; pixel metrics leave these images out"
        )
    areas = {name: mask.mean() for name, mask in anomalous.items() if mask is not None}
    if large := [name for name, area in areas.items() if area > COMMON]:
        notices.append(
            f"{count_of(large, 'mask')} covering more than half of the image, e.g. {large[0]} "
            f"({areas[large[0]]:.0%}); if 0 stands for the defect there, invert the masks"
        )
    return notices
