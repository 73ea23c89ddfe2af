"""Load and split data sets: solar cells, your own folders, published sets, synthetic shapes.

:func:`load_dataset` returns an :class:`AnomalyData` for every source: normal images for training
and calibration, a labelled test set, and pixel masks, where they exist, at the original size of
each image. Nothing is downloaded.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from diffad_lite.core.config import unknown_name
from diffad_lite.core.files import data_dir
from diffad_lite.data.depth import choose_bits, describe_files
from diffad_lite.data.images import Resize, read_image, resize_image, to_float
from diffad_lite.data.masks import read_masks
from diffad_lite.data.planting import KINDS, plant_defects
from diffad_lite.data.readers import FLIP_AXES, READERS
from diffad_lite.data.source import Labelled, Source, check_inside

UNCERTAIN = "uncertain"
LARGEST_IMAGE = 4096  # pixels per side
MIN_CALIBRATION = 8  # normal images
PACKAGED = ("elpv", "shapes", "digits")  # data sets that need no root


@dataclass(frozen=True)
class AnomalyData:
    """One category of a data set, split; all images are (N, C, H, W), float32 in [-1, 1].

    Attributes:
        train: normal images for training.
        calibration: normal images for thresholds and map statistics, not used in training.
        test_images: normal and anomalous images.
        test_labels: int64 (N,), 1 = anomalous.
        test_masks: per test image, a bool array at its original size, or None if the image is
            anomalous and its mask is not known. None if no image has a mask.
        test_ids: per test image, its name ``<defect type>/<file stem>``.
        defect_types: per test image, ``"good"`` or the kind of defect.
        original_sizes: per test image, (height, width) before resizing.
        uncertain: images that the experts could not decide on, excluded from all scores.
        info: name, category, channels, image_size, resize, split_seed, plant, ``flip_axes`` (axes
            along which training may flip the images), ``bits`` (depth of grey images of more than
            8 bits, else None), ``remarks`` (known faults), ``notices`` (what reading assumed or
            left out), and the ``fingerprint`` of the split (names and pixels of all training and
            calibration images).
        clean_images: the test images before defects were planted; None if nothing is planted.
    """

    train: Tensor
    calibration: Tensor
    test_images: Tensor
    test_labels: np.ndarray
    test_masks: list[np.ndarray | None] | None
    test_ids: list[str]
    defect_types: list[str]
    original_sizes: list[tuple[int, int]]
    uncertain: Tensor
    info: dict[str, Any]
    clean_images: Tensor | None = None

    def summary(self) -> dict[str, Any]:
        """Return ``info`` and the number of images per part, as JSON values."""
        kinds = sorted(set(self.defect_types) - {"good"})
        return {
            **self.info,
            "n_train": len(self.train),
            "n_calibration": len(self.calibration),
            "n_test_normal": int((self.test_labels == 0).sum()),
            "n_test_anomalous": {kind: self.defect_types.count(kind) for kind in kinds},
            "n_masks": sum(bool(m is not None and m.any()) for m in self.test_masks or []),
            "n_uncertain": len(self.uncertain),
        }

    def subset(self, n_test: int, seed: int = 0) -> "AnomalyData":
        """Return the data with ``n_test // 2`` random test images of each class, if there are."""
        rng = np.random.default_rng(seed)
        keep: list[int] = []
        for label in (0, 1):
            index = np.flatnonzero(self.test_labels == label)
            keep += rng.permutation(index)[: n_test // 2].tolist()
        keep.sort()
        kept: dict[str, Any] = {}
        for name in ("test_masks", "test_ids", "defect_types", "original_sizes"):
            values = getattr(self, name)
            kept[name] = values and [values[i] for i in keep]
        if self.clean_images is not None:
            kept["clean_images"] = self.clean_images[keep]
        images, labels = self.test_images[keep], self.test_labels[keep]
        return replace(self, test_images=images, test_labels=labels, **kept)


def load_dataset(
    name: str,
    category: str | None = None,
    *,
    root: str | Path | None = None,
    image_size: int = 64,
    resize: Resize = "squash",
    split_seed: int = 0,
    plant: str | None = None,
    severity: float = 1.0,
) -> AnomalyData:
    """Load, split and resize one category.

    Whatever was read in another way than usual, or not read, is a warning, and stands in
    ``info["notices"]``.

    Args:
        name: ``elpv``, ``folder``, ``visa``, ``dagm``, ``medmnist``, ``shapes`` or ``digits``.
        category: ``mono`` or ``poly`` for elpv; a sub-folder of ``root`` for folder, visa and dagm;
            the stem of a file in ``root`` for medmnist.
        root: folder of the images, unless a package contains them.
        image_size: side of the resized images in pixels, 8 to 4096.
        resize: ``"squash"`` to a square, or ``"pad"`` (keep the aspect ratio, repeat the border).
        split_seed: selects the split; 0 in every published table.
        plant: ``"cells"`` or ``"lesions"`` replaces the anomalous test images by the normal ones
            with planted defects and exact masks. ``"development"`` plants other kinds on half of
            the calibration images, to choose hyper-parameters without the test set.
            ``"uncertain"`` uses images with an uncertain label as anomalies; nothing is planted.
        severity: of the planted defects, in (0, 2]; 1 is clearly visible, 0.3 is hard to see.

    Raises:
        ValueError: unknown name, category, resize or plant; no normal images; mixed channels; a
            range of values that is not known; a root for a data set that has none.
        FileNotFoundError: ``root`` does not exist.
    """
    check_arguments(name, plant, resize, image_size)
    check_inside(category or "", "category")
    if root is not None and name in PACKAGED:
        fix = "leave root out, or read that folder with --dataset folder"
        fault = f"data set {name!r} is part of a package and has no root, got {root}"
        raise ValueError(f"{fault}; {fix}")
    source = READERS[name](category, Path(root) if root is not None else None)
    bits = choose_bits(_files(source.normals | source.calibration).values())
    source.bits = bits or 16
    train, calibration, test = split(source, split_seed)
    fingerprint = _fingerprint(train, calibration, source.bits)
    calibration, test = _select_test(source, calibration, test, plant, severity, split_seed)
    parts = [train, calibration, source.uncertain, {n: item.image for n, item in test.items()}]
    tensors, sizes, notices = _read_parts(parts, source.bits, image_size, resize)
    test_masks, mask_notices = read_masks(test, sizes)
    masked = {n for n, item in test.items() if item.mask is not None}
    files = {n: path for part in parts for n, path in _files(part).items()}
    notices += [*describe_files(files, source.bits, masked), *mask_notices]
    notices = [*source.notices, *notices]
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    info = {
        "name": name,
        "category": source.category,
        "channels": tensors[0].shape[1],
        "image_size": image_size,
        "resize": resize,
        "split_seed": split_seed,
        "plant": plant,
        "flip_axes": FLIP_AXES.get(name, ()),
        "bits": bits,
        "remarks": source.remarks,
        "notices": notices,
        "fingerprint": fingerprint,
    }
    return AnomalyData(
        train=tensors[0],
        calibration=tensors[1],
        test_images=tensors[3],
        test_labels=np.array([t.defect_type != "good" for t in test.values()], dtype=np.int64),
        test_masks=test_masks,
        test_ids=list(test),
        defect_types=[item.defect_type for item in test.values()],
        original_sizes=[sizes[n] for n in test],
        uncertain=tensors[2],
        info=info,
        clean_images=_clean_images(tensors[3]) if plant in KINDS else None,
    )


def _files(images: Mapping[str, Any]) -> dict[str, Path]:
    """Return the images that are files."""
    return {name: image for name, image in images.items() if isinstance(image, Path)}


def _read_parts(
    parts: Sequence[Mapping[str, Any]], bits: int, image_size: int, resize: Resize
) -> tuple[list[Tensor], dict[str, tuple[int, int]], list[str]]:
    """Read and resize the images of all parts.

    Returns:
        one tensor a part; the original (height, width) of each image; a notice if images differ in
        their number of channels.
    """
    sizes: dict[str, tuple[int, int]] = {}
    names: dict[int, list[str]] = {}  # by number of channels

    def read_small(name: str, image: Path | np.ndarray) -> np.ndarray:
        pixels = _read_pixels(image, bits)
        sizes[name] = pixels.shape[1:]
        names.setdefault(len(pixels), []).append(name)
        return resize_image(pixels, image_size, resize)

    small = [{n: read_small(n, image) for n, image in part.items()} for part in parts]
    channels = max(names)
    tensors = [_stack(part, channels, image_size) for part in small]
    if len(names) < 2:
        return tensors, sizes, []
    few, many = sorted(names, key=lambda channels: len(names[channels]))
    notice = (
        f"{len(names[few])} of {len(sizes)} images have {few} channels, e.g. {names[few][0]}, and "
        f"the others {many}: all are read with {channels}; save all alike"
    )
    return tensors, sizes, [notice]


def check_arguments(name: str, plant: str | None, resize: str, image_size: int) -> None:
    """Raise ValueError for invalid arguments of :func:`load_dataset`."""
    if name not in READERS:
        raise unknown_name("data set", name, READERS)
    if plant is not None and plant not in (*KINDS, UNCERTAIN):
        raise unknown_name("family of planted defects", plant, (*KINDS, UNCERTAIN))
    if resize not in get_args(Resize):
        raise unknown_name("resize", resize, get_args(Resize))
    if not 8 <= image_size <= LARGEST_IMAGE:
        limit = "at least 8" if image_size < 8 else f"at most {LARGEST_IMAGE}"
        raise ValueError(f"image_size must be {limit} pixels, got {image_size}; 64 is usual")


def bundled_checkpoints() -> list[str]:
    """Return the names of the bundled checkpoints, ``<data set>-<category>-<method>``.

    Raises:
        FileNotFoundError: there is no data folder.
    """
    return sorted(p.name for p in (data_dir() / "checkpoints").iterdir() if p.is_dir())


def _fingerprint(train: dict, calibration: dict, bits: int) -> str:
    """Return twelve hex digits of a hash over names and original pixels of the images."""
    digest = hashlib.sha256()
    for part in (train, calibration):
        for name, value in part.items():
            digest.update(name.encode() + _read_pixels(value, bits).tobytes())
    return digest.hexdigest()[:12]


def _select_test(
    source: Source, calibration: dict, test: dict, plant: str | None, severity: float, seed: int
) -> tuple[dict, dict[str, Labelled]]:
    """Return the calibration and test images that ``plant`` asks for.

    ``"development"`` and ``"uncertain"`` do not even read the real test images.
    """
    if plant in ("development", UNCERTAIN):
        calibration, clean = _halve(calibration, seed, source.subjects)
        test = {n: Labelled(image) for n, image in clean.items()}
    if plant == UNCERTAIN:
        if not source.uncertain:
            raise ValueError(f"{source.category} has no images of uncertain label")
        test |= {n: Labelled(image, "uncertain") for n, image in source.uncertain.items()}
    elif plant is not None:
        test = _plant(test, plant, severity, source.bits)
    return calibration, test


def _plant(
    test: dict[str, Labelled], family: str, severity: float, bits: int
) -> dict[str, Labelled]:
    """Return the normal test images, followed by a copy of each with one planted defect."""
    normal = {n: item.image for n, item in test.items() if item.defect_type == "good"}
    clean = {n: _read_pixels(image, bits) for n, image in normal.items()}
    if not clean:
        raise ValueError("plant= needs normal test images, and this data set has none")
    planted = plant_defects(list(clean.values()), family, seed_names=list(clean), severity=severity)
    return {n: Labelled(image) for n, image in clean.items()} | {
        f"{kind}/{Path(n).name}": Labelled(image, kind, mask)
        for n, image, mask, kind in zip(clean, *planted, strict=True)
    }


def _clean_images(images: Tensor) -> Tensor:
    """Return each test image before planting; `_plant` returns the clean ones first."""
    return images[: len(images) // 2].repeat(2, 1, 1, 1)


def _read_pixels(value: Path | np.ndarray, bits: int) -> np.ndarray:
    """Return an image of a :class:`Source` as uint8 (C, H, W)."""
    return value if isinstance(value, np.ndarray) else read_image(value, bits)


def _stack(images: Mapping[str, np.ndarray], channels: int, size: int) -> Tensor:
    """Stack images of one size to a float tensor; grey images are repeated to ``channels``."""
    if not images:
        return torch.empty(0, channels, size, size)
    for name, image in images.items():
        if image.shape[0] not in (1, channels):
            raise ValueError(f"{name} has {image.shape[0]} channels where others have {channels}")
    shape = (channels, size, size)
    return to_float(np.stack([np.broadcast_to(image, shape) for image in images.values()]))


# -------------------------------------------------------------------------------------- splits
#
# Normal images are ranked by a hash of the seed and their name, or the name of their subject, if
# known: two slices of one patient are always on the same side. Train, calibration and test are
# consecutive ranges of this order, so adding images can move images that are close to a cut.


def split(source: Source, split_seed: int) -> tuple[dict, dict, dict]:
    """Split the normal images into train, calibration and test; add the parts the source fixes.

    The three parts are by name: images for train and calibration, :class:`Labelled` for the test.

    Raises:
        ValueError: too few normal images, or a subject is in the test and in another part.
    """
    if not source.normals:
        raise ValueError("no normal images to train on")
    subjects = source.subjects
    names = _rank(list(source.normals), split_seed, subjects)
    n_calibration, n_test = (round(len(names) * fraction) for fraction in source.fractions)
    n_calibration = 0 if source.calibration else max(n_calibration, MIN_CALIBRATION)
    n_train = _align_cut(names, len(names) - n_calibration - n_test, subjects)
    test_start = _align_cut(names, len(names) - n_test, subjects)
    if n_train < 1:
        raise ValueError(
            f"{len(names)} normal images are too few: {n_calibration} are needed for calibration "
            f"and {n_test} for the test; add normal images (20 or more are advisable)"
        )
    parts = (names[:n_train], names[n_train:test_start], names[test_start:])
    train, calibration, test = ({n: source.normals[n] for n in sorted(part)} for part in parts)
    calibration |= source.calibration
    test = {n: Labelled(image) for n, image in test.items()} | source.test
    fitted = {subjects[n] for n in [*train, *calibration] if n in subjects}
    if leaked := sorted(fitted & {subjects[n] for n in test if n in subjects}):
        raise ValueError(
            f"{len(leaked)} subjects are in training or calibration and in the test as well, e.g. "
            f"{leaked[0]}; move all images of a subject to one side"
        )
    return train, calibration, test


def _halve(
    images: Mapping[str, Any], split_seed: int, subjects: Mapping[str, str]
) -> tuple[dict, dict]:
    """Split calibration images into two halves; the second serves as a development test set.

    All images of a subject are in one half.

    Raises:
        ValueError: all images are of one subject.
    """
    names = _rank(list(images), split_seed + 1, subjects)
    half = _align_cut(names, len(names) // 2, subjects)
    if half == 0 and len(names) > 1:  # the first subject has more than half of the images
        half = next((k for k in range(1, len(names)) if _align_cut(names, k, subjects) == k), 0)
    if half == 0:
        raise ValueError(
            f"the {len(names)} calibration images are of one subject, so they cannot be split into "
            "two halves; add normal images of other subjects"
        )
    return {n: images[n] for n in names[:half]}, {n: images[n] for n in names[half:]}


def _rank(names: Sequence[str], split_seed: int, subjects: Mapping[str, str]) -> list[str]:
    """Sort names by a hash of the seed and each name; images of a subject stay together."""

    def key(name: str) -> tuple[bytes, str]:
        seeded = f"{split_seed}/{subjects.get(name, name)}"
        return hashlib.sha256(seeded.encode()).digest(), name

    return sorted(names, key=key)


def _align_cut(names: Sequence[str], cut: int, subjects: Mapping[str, str]) -> int:
    """Return the largest index <= ``cut`` that does not separate images of one subject."""
    while 0 < cut < len(names) and names[cut] in subjects:
        if subjects[names[cut]] != subjects.get(names[cut - 1]):
            break
        cut -= 1
    return cut
