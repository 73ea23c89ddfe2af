"""Data sets: solar cells, your own folders, published sets, made shapes; fingerprints.

``load_dataset`` is the only entry. Whatever the source, it returns an :class:`AnomalyData`:
normal images for training and calibration, a labelled test set, and pixel masks at each image's
original size where they exist. Nothing here downloads anything.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from diffad_lite.core.config import unknown_name
from diffad_lite.data.images import Resize, read_image, resize_image, to_float
from diffad_lite.data.planting import KINDS, plant_on
from diffad_lite.data.readers import READERS, flip_axes
from diffad_lite.data.source import Source, check_inside

UNCERTAIN = "uncertain"
LARGEST_IMAGE = 4096  # pixels of a side
MIN_CALIBRATION = 8  # normal images taken for calibration, at least


@dataclass(frozen=True)
class AnomalyData:
    """One category of a data set, split.

    Attributes:
        train: normal images (N, C, H, W), float32 in [-1, 1]; methods learn from these.
        calibration: normal images held out of training, for thresholds and map statistics.
        test_images: (M, C, H, W).
        test_labels: int64 (M,), 1 = anomalous.
        test_masks: for each test image a bool array at its original size, or None where the
            image is anomalous but its mask is not known; None when no image has a mask.
        test_ids: a name for each test image, ``<defect type>/<file stem>``.
        defect_types: for each test image, ``"good"`` or the kind of defect.
        original_sizes: for each test image, (height, width) before resizing.
        uncertain: images that the experts could not decide on, left out of all scores.
        info: name, category, channels, image_size, resize, split_seed, plant, ``flip_axes`` (axes
            along which training may flip the images), ``remarks`` (known faults), and the
            ``fingerprint`` of the split (names and pixels of all training and calibration images).
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

    def summary(self) -> dict[str, Any]:
        """Counts and remarks, as JSON values."""
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
        """The same data with at most ``n_test`` test images, normal and anomalous alike drawn."""
        rng = np.random.default_rng(seed)
        keep: list[int] = []
        for label in (0, 1):
            index = np.flatnonzero(self.test_labels == label)
            keep += rng.permutation(index)[: n_test // 2].tolist()
        keep.sort()
        pick = lambda values: [values[i] for i in keep]  # noqa: E731
        return replace(
            self,
            test_images=self.test_images[keep],
            test_labels=self.test_labels[keep],
            test_masks=pick(self.test_masks) if self.test_masks else None,
            test_ids=pick(self.test_ids),
            defect_types=pick(self.defect_types),
            original_sizes=pick(self.original_sizes),
        )


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

    Args:
        name: ``elpv``, ``folder``, ``visa``, ``dagm``, ``medmnist``, ``shapes`` or ``digits``.
        category: ``mono`` or ``poly`` for elpv; a sub-folder of ``root`` for folder, visa and dagm;
            the stem of a file there for medmnist.
        root: folder of the images, where they are not part of a package.
        image_size: side in pixels that the images are brought to.
        resize: ``"squash"`` to a square, or ``"pad"`` (keep the aspect, replicate the border).
        split_seed: chooses the split; 0 in every published table.
        plant: ``"cells"`` or ``"lesions"`` replaces the anomalous test images by test normals
            with planted defects and exact masks; ``"development"`` does so with other kinds on
            half of the calibration images, for choosing hyper-parameters without the test set.
            ``"uncertain"`` draws nothing: images whose label is uncertain stand for anomalies.
        severity: of the planted defects; 1 is plain to see, 0.3 hard.

    Raises:
        ValueError: unknown name, category, resize or plant; no normal images; mixed channels.
        FileNotFoundError: ``root`` does not exist.
    """
    check_arguments(name, plant, resize, image_size)
    check_inside(category or "", "category")
    source = READERS[name](category, Path(root) if root is not None else None)
    train, calibration, test = split(source, split_seed)
    fingerprint = _fingerprint(train, calibration)
    calibration, test, types, masks = _test_set(
        source, calibration, test, plant, severity, split_seed
    )
    sizes: dict[str, tuple[int, int]] = {}
    parts = [
        {n: _small(n, v, sizes, image_size, resize) for n, v in part.items()}
        for part in (train, calibration, source.uncertain, test)
    ]
    channels = max(image.shape[0] for part in parts for image in part.values())
    tensors = [_stack(part, channels, image_size) for part in parts]
    known = any(mask is not None for mask in masks.values())
    pixel_masks = [_mask(masks[n], types[n], sizes[n], n) for n in test] if known else None
    info = {
        "name": name,
        "category": source.category,
        "channels": channels,
        "image_size": image_size,
        "resize": resize,
        "split_seed": split_seed,
        "plant": plant,
        "flip_axes": flip_axes(name),
        "remarks": source.remarks,
        "fingerprint": fingerprint,
    }
    return AnomalyData(
        train=tensors[0],
        calibration=tensors[1],
        test_images=tensors[3],
        test_labels=np.array([types[n] != "good" for n in test], dtype=np.int64),
        test_masks=pixel_masks,
        test_ids=list(test),
        defect_types=[types[n] for n in test],
        original_sizes=[sizes[n] for n in test],
        uncertain=tensors[2],
        info=info,
    )


def check_arguments(name: str, plant: str | None, resize: str, image_size: int) -> None:
    """What :func:`load_dataset` checks of its arguments before it reads anything."""
    if name not in READERS:
        raise unknown_name("data set", name, READERS)
    if plant is not None and plant not in (*KINDS, UNCERTAIN):
        raise unknown_name("family of planted defects", plant, (*KINDS, UNCERTAIN))
    if resize not in get_args(Resize):
        raise unknown_name("resize", resize, get_args(Resize))
    if not 8 <= image_size <= LARGEST_IMAGE:
        wanted = "at least 8" if image_size < 8 else f"at most {LARGEST_IMAGE}"
        raise ValueError(f"image_size must be {wanted} pixels, got {image_size}; 64 is usual")


def data_dir() -> Path:
    """The folder ``data/`` with bundled checkpoints and results, from any working directory.

    The environment variable ``DIFFAD_DATA`` names it, else it stands beside the package in the
    repository.

    Raises:
        FileNotFoundError: neither is there.
    """
    named = os.environ.get("DIFFAD_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "data"
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"no data folder at {folder}; clone the repository and install it with "
            "'pip install -e .', or set DIFFAD_DATA to its data/ folder"
        )
    return folder


def bundled_checkpoints() -> list[str]:
    """Return the names of the bundled checkpoints, ``<data set>-<category>-<method>``.

    Raises:
        FileNotFoundError: there is no data folder.
    """
    return sorted(p.name for p in (data_dir() / "checkpoints").iterdir() if p.is_dir())


def _fingerprint(train: dict, calibration: dict) -> str:
    """Twelve hex digits that identify the images a method was fitted on, before any resizing."""
    digest = hashlib.sha256()
    for part in (train, calibration):
        for name, value in part.items():
            digest.update(name.encode() + _pixels(value).tobytes())
    return digest.hexdigest()[:12]


def _test_set(
    source: Source, calibration: dict, test: dict, plant: str | None, severity: float, seed: int
) -> tuple[dict, dict, dict, dict]:
    """The calibration images, and images, defect types and masks of the test that ``plant`` means.

    Development sets do not even read the real test images.
    """
    types = {n: source.defect_types.get(n, "good") for n in test}
    masks = {n: source.masks.get(n) for n in test}
    if plant in ("development", UNCERTAIN):
        calibration, test = halves(calibration, seed)
        types, masks = dict.fromkeys(test, "good"), dict.fromkeys(test)
    if plant == UNCERTAIN:
        if not source.uncertain:
            raise ValueError(f"{source.category} has no images of uncertain label")
        test = test | source.uncertain
        types |= dict.fromkeys(source.uncertain, "uncertain")
        masks |= dict.fromkeys(source.uncertain)
    elif plant is not None:
        test, types, masks = _plant(test, types, plant, severity)
    return calibration, test, types, masks


def _plant(test: dict, types: dict, family: str, severity: float) -> tuple[dict, dict, dict]:
    """The test normals, clean and once more with a planted defect each."""
    clean = {n: _pixels(v) for n, v in test.items() if types[n] == "good"}
    if not clean:
        raise ValueError("plant= needs normal test images, and this data set has none")
    names = list(clean)
    images, masks, kinds = plant_on(
        list(clean.values()), family, seed_names=names, severity=severity
    )
    planted = [f"{kind}/{Path(n).name}" for n, kind in zip(names, kinds, strict=True)]
    return (
        clean | dict(zip(planted, images, strict=True)),
        dict.fromkeys(names, "good") | dict(zip(planted, kinds, strict=True)),
        dict.fromkeys(names) | dict(zip(planted, masks, strict=True)),
    )


def _pixels(value: Path | np.ndarray) -> np.ndarray:
    """An image (C, H, W) uint8 from what a reader gave: a path or the pixels."""
    return value if isinstance(value, np.ndarray) else read_image(value)


def _small(
    name: str, value: Path | np.ndarray, sizes: dict, image_size: int, resize: Resize
) -> np.ndarray:
    """Resize one image and note its original size; the large pixels are not kept."""
    pixels = _pixels(value)
    sizes[name] = pixels.shape[1:]
    return resize_image(pixels, image_size, resize)


def _stack(images: Mapping[str, np.ndarray], channels: int, size: int) -> Tensor:
    """Images of one size as one float tensor; grey files among colour ones become colour."""
    if not images:
        return torch.empty(0, channels, size, size)
    for name, image in images.items():
        if image.shape[0] not in (1, channels):
            raise ValueError(f"{name} has {image.shape[0]} channels where others have {channels}")
    shape = (channels, size, size)
    return to_float(np.stack([np.broadcast_to(image, shape) for image in images.values()]))


def _mask(value: Any, kind: str, size: tuple[int, int], name: str) -> np.ndarray | None:
    """A bool mask at the image's original size; None = anomalous, but nobody knows where."""
    if value is None:
        return np.zeros(size, dtype=bool) if kind == "good" else None
    if isinstance(value, np.ndarray):
        masks = [value]
    elif isinstance(value, tuple):  # a file for each defect, whose grey value is its kind
        masks = [read_image(path).max(axis=0) > 0 for path in value]
    else:
        pixels = read_image(value).max(axis=0)
        masks = [pixels > (127 if pixels.max() > 127 else 0)]  # some sets number defects
    for mask in masks:
        if mask.shape != size:
            raise ValueError(
                f"the mask of {name} is {mask.shape[1]}x{mask.shape[0]} pixels, its image "
                f"{size[1]}x{size[0]}; export masks at the size of their images ({value})"
            )
    mask = np.any(masks, axis=0)
    return mask if mask.any() else None  # an empty mask on an anomalous image says nothing


# -------------------------------------------------------------------------------------- splits
#
# Which normal images train, which calibrate, which are held out for the test. An image's rank
# depends on the seed and its name alone, or, where it is known, on the name of its subject: two
# slices of one patient are never on both sides. The cuts are made by rank, so images near one can
# change sides when others are added.


def split(source: Source, split_seed: int) -> tuple[dict, dict, dict]:
    """Cut the normals into train, calibration and test, and add what the source fixed.

    Raises:
        ValueError: too few normal images, or a subject of the source's own test set is in training.
    """
    if not source.normals:
        raise ValueError("no normal images to train on")
    names = _rank(list(source.normals), split_seed, source.subjects)
    share_calibration, share_test = source.shares
    n_test = round(len(names) * share_test)
    n_calibration = 0 if source.calibration else round(len(names) * share_calibration)
    if not source.calibration:
        n_calibration = max(n_calibration, MIN_CALIBRATION)
    first = _whole(names, len(names) - n_calibration - n_test, source.subjects)
    second = _whole(names, len(names) - n_test, source.subjects)
    if first < 1:
        raise ValueError(
            f"{len(names)} normal images are too few: {n_calibration} are needed for calibration "
            f"and {n_test} for the test; add normal images (20 or more are advisable)"
        )
    parts = (names[:first], names[first:second], names[second:])
    train, calibration, held_out = ({n: source.normals[n] for n in sorted(p)} for p in parts)
    calibration, test = calibration | source.calibration, held_out | source.test
    subjects = source.subjects
    shared = {subjects[n] for n in [*train, *calibration] if n in subjects}
    if leaked := sorted(shared & {subjects[n] for n in test if n in subjects}):
        raise ValueError(
            f"{len(leaked)} subjects are in training or calibration and in the test as well, e.g. "
            f"{leaked[0]}; move all images of a subject to one side"
        )
    return train, calibration, test


def halves(calibration: Mapping[str, Any], split_seed: int) -> tuple[dict, dict]:
    """Calibration normals cut in two: one half stays, the other carries development defects."""
    names = _rank(list(calibration), split_seed + 1, {})
    half = len(names) // 2
    return {n: calibration[n] for n in names[:half]}, {n: calibration[n] for n in names[half:]}


def _rank(names: Sequence[str], split_seed: int, subjects: Mapping[str, str]) -> list[str]:
    """An order that depends on the seed and each name alone; subjects stay together."""

    def key(name: str) -> tuple[bytes, str]:
        own = f"{split_seed}/{subjects.get(name, name)}"
        return hashlib.sha256(own.encode()).digest(), name

    return sorted(names, key=key)


def _whole(names: Sequence[str], cut: int, subjects: Mapping[str, str]) -> int:
    """The last place at or before ``cut`` that parts no subject."""
    while 0 < cut < len(names) and (a := subjects.get(names[cut])) is not None:
        if a != subjects.get(names[cut - 1]):
            break
        cut -= 1
    return cut
