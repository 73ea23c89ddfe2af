"""Your own images without labels: survey them before training, then score a folder of them."""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffad_lite.core.files import check_writable, staged, write_rows
from diffad_lite.data.depth import DEPTHS, choose_bits, describe_files
from diffad_lite.data.formats import describe_foreign
from diffad_lite.data.images import (
    IMAGE_SUFFIXES,
    Resize,
    list_images,
    read_image,
    resize_image,
    to_float,
)
from diffad_lite.data.source import walk_images
from diffad_lite.experiments.evaluate import (
    check_replaceable,
    escape_dollars,
    save_figure,
    write_map,
)
from diffad_lite.experiments.quality import at_original_size
from diffad_lite.methods.base import Method, Prediction
from diffad_lite.plots import show_detections

FEW = 50  # normal images below which both training and threshold are unreliable
OUTLYING = 6.0  # distance from the median, in robust standard deviations, of an outlier
SHIFTED = 0.8  # fraction of image pairs in the same order from which two folders differ
SHOWN = 8  # images in the gallery
LOOKS = {  # property of grey values -> words for more and less of it
    "brightness": ("brighter", "darker"),
    "contrast": ("richer in contrast", "poorer in contrast"),
    "sharpness": ("sharper", "less sharp"),
}


@dataclass
class Survey:
    """Properties of image files, one entry for each readable file.

    Attributes:
        names: file names.
        sizes: (height, width) in pixels.
        channels: 1 to 4.
        looks: brightness (mean), contrast (standard deviation) and sharpness (mean absolute
            difference of neighbours) of the grey values, 0 .. 255; each (n,).
        copies: pairs of names whose pixels are equal.
        broken: one line for each unreadable file.
    """

    names: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    channels: list[int] = field(default_factory=list)
    looks: dict[str, np.ndarray] = field(default_factory=dict)
    copies: list[tuple[str, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def warnings(self, training: bool = True) -> list[str]:
        """Return what may spoil a model of these images: one sentence each, with what to do.

        ``training=False`` leaves out what matters only for images that a model learns as normal.
        """
        warnings, n = [], len(self.names)
        if self.broken:
            warnings.append(f"{len(self.broken)} files cannot be read: {self.broken[0]}")
        if training and n < FEW:
            warnings.append(
                f"only {n} images; below {FEW} the model may memorise them, and a fifth of them "
                "gives an unreliable threshold; add normal images"
            )
        if len(set(self.channels)) > 1:
            grey = self.channels.count(1)
            warnings.append(f"{grey} images are grey and {n - grey} in colour; save all alike")
        aspects = [w / h for h, w in self.sizes]
        if aspects and max(aspects) > 1.1 * min(aspects):
            warnings.append(
                f"width / height goes from {min(aspects):.2f} to {max(aspects):.2f}, so resizing "
                "to a square distorts the images differently; crop them alike, or use resize='pad'"
            )
        if training and self.copies:
            original, copy = self.copies[0]
            warnings.append(
                f"{len(self.copies)} images are copies of others, such as {copy} of {original}; a "
                "copy on both sides of a split makes the result too good: remove it"
            )
        for look, values in self.looks.items() if training else ():
            if outliers := _outlying(values):
                names = ", ".join(self.names[i] for i in outliers[:3])
                warnings.append(
                    f"{len(outliers)} images are outliers in {look}, such as {names}; look at "
                    "them: the model learns a faulty image among the normal ones as normal"
                )
        return warnings


def _outlying(values: np.ndarray) -> list[int]:
    """Return indices of values far from the median, in units of the median distance from it."""
    if not len(values):
        return []
    distance = np.abs(values - np.median(values))
    robust_std = 1.4826 * np.median(distance)
    return np.flatnonzero(distance > OUTLYING * max(robust_std, 1.0)).tolist()


def survey(paths: Sequence[Path]) -> Survey:
    """Open every image once; list unreadable files instead of raising an error."""
    result = Survey()
    looks = []
    name_of: dict[str, str] = {}  # digest of the pixels -> first file with them
    for path in paths:
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            result.broken.append(str(error))
            continue
        digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        if digest in name_of:
            result.copies.append((name_of[digest], path.name))
        name_of.setdefault(digest, path.name)
        result.names.append(path.name)
        result.sizes.append(image.shape[1:])
        result.channels.append(len(image))
        grey = image.mean(0)
        steps = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1) if grey.shape[axis] > 1]
        looks.append((grey.mean(), grey.std(), np.mean(steps or 0)))
    columns = np.array(looks, dtype=float).reshape(-1, len(LOOKS)).T
    result.looks = dict(zip(LOOKS, columns, strict=True))
    return result


def find_shifts(normal: Survey, new: Survey) -> list[str]:
    """Return how new images differ from the normal ones as a whole, one sentence each.

    A difference that nearly all new images have is rarely a defect: it is the light, the lens or
    the file format, and it raises every score.
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    labels = np.repeat([0, 1], [len(normal.names), len(new.names)])
    if len(set(labels)) < 2:
        return []
    shifts = []
    for look, (more, less) in LOOKS.items():
        auroc = roc_auc_score(labels, np.concatenate([normal.looks[look], new.looks[look]]))
        fraction = max(auroc, 1 - auroc)
        if fraction >= SHIFTED:
            shifts.append(
                f"the new images are {more if auroc > 0.5 else less} than the normal ones in "
                f"{fraction:.0%} of all pairs; take both alike, or train with standardise=true"
            )
    return shifts


def read_images(
    paths: Sequence[Path], channels: int, image_size: int, resize: Resize, bits: int = 16
) -> Tensor:
    """Read image files as methods take them, (n, C, H, W), float32 in [-1, 1].

    ``bits`` is the depth that deep grey images have in the training, ``AnomalyData.info["bits"]``.

    Raises ValueError for a file that is no image, or has another number of channels (a grey image
    fits any).
    """
    images = []
    for path in paths:
        image = resize_image(read_image(path, bits), image_size, resize)
        if len(image) not in (1, channels):
            raise ValueError(
                f"{path} has {len(image)} channels, and the model is for {channels}; save it as "
                "the images that the model was trained on"
            )
        images.append(np.broadcast_to(image, (channels, *image.shape[1:])))
    return to_float(np.stack(images))


def score_folder(
    method: Method,
    folder: str | Path,
    out: str | Path,
    *,
    resize: Resize = "squash",
    bits: int | None = None,
) -> list[dict[str, Any]]:
    """Score images that have no labels; write ``scores.csv``, ``maps/`` and ``gallery.png``.

    They replace those of an earlier call in ``out``, all of them or, on an error, none. A warning
    names the images that the method cannot take; the others are scored.

    Args:
        method: fitted and calibrated.
        folder: holds the images directly.
        out: where to write; a map is a float32 TIFF of its image's size.
        resize: as in training.
        bits: as in training, ``AnomalyData.info["bits"]``; None if it had images of 8 bits, and
            deep images are then read with the depth that they use.

    Returns:
        a row for each scored image, highest score first: ``file``, ``image_score``, ``alarm`` (is
        it above the method's threshold?).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder has no images, or none that the method can take; the method has no
            threshold; ``out`` lies inside ``folder``, or holds other files than an earlier call's.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give the one that holds the images")
    _check_output(folder, out)
    paths = list_images(folder)
    if not paths:
        hint = describe_foreign(folder)
        raise ValueError(
            f"{folder} holds no images; give the folder that they lie in directly{hint}"
        )
    if deeper := [path for path in walk_images(folder) if path.parent != folder]:
        warnings.warn(
            f"{len(deeper)} images in sub-folders are not scored, e.g. {deeper[0]}; give their "
            "folder to score them",
            stacklevel=2,
        )
    if method.threshold_ is None:
        raise ValueError("the model has no threshold yet; call calibrate() with normal images")
    if bits is not None and bits not in DEPTHS:
        raise ValueError(f"bits must be one of {', '.join(map(str, DEPTHS))}, got {bits!r}")
    c = method.config
    paths, images = _read_usable(paths, c.channels, c.image_size, resize, bits)
    prediction = method.predict(images)
    rows: list[dict[str, Any]] = [
        {
            "file": path.name,
            "image_score": float(score),
            "alarm": bool(score > method.threshold_),
        }
        for path, score in zip(paths, prediction.image_score.numpy(), strict=True)
    ]
    rows.sort(key=lambda row: -row["image_score"])
    cells = [
        (r["file"], f"{r['image_score']:.6g}", f"{method.threshold_:.6g}", int(r["alarm"]))
        for r in rows
    ]
    with staged(out) as stage:
        for path, anomaly_map in zip(paths, prediction.anomaly_map, strict=True):
            size = read_image(path).shape[1:]
            pixels = at_original_size(anomaly_map, size, resize, c.image_size)
            write_map(stage / "maps" / f"{path.name}.tiff", pixels)
        _write_gallery(stage / "gallery.png", method, images, prediction, rows)
        write_rows(stage / "scores.csv", [("file", "image_score", "threshold", "alarm"), *cells])
        (out / "scores.csv").unlink(missing_ok=True)  # its presence means that all else is there
    return rows


def _check_output(folder: Path, out: Path) -> None:
    """Check that results can be written to ``out``, and replace nothing but older results."""
    check_writable(out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"the output folder {out} lies in that of the images, {folder}, whose next call would "
            "take the gallery for an image; choose an output folder outside of it"
        )
    if (out / "result.json").exists():
        raise ValueError(
            f"{out} holds an evaluated run, whose scores.csv would be replaced; choose another "
            "output folder"
        )
    check_replaceable(
        out / "maps",
        lambda path: path.suffix == ".tiff" and Path(path.stem).suffix.lower() in IMAGE_SUFFIXES,
    )


def _read_usable(
    paths: Sequence[Path], channels: int, image_size: int, resize: Resize, bits: int | None
) -> tuple[list[Path], Tensor]:
    """Read the images that :func:`read_images` takes; a warning names the others.

    Further warnings are about pages and depth.

    Raises what the first image raised if no image can be read.
    """
    images: dict[Path, Tensor] = {}
    errors: dict[Path, OSError | ValueError] = {}
    for path in paths:
        try:
            read_image(path)
        except (OSError, ValueError) as error:
            errors[path] = error
    readable = [path for path in paths if path not in errors]
    bits = bits or choose_bits(readable) or 16
    for path in readable:
        try:
            images[path] = read_images([path], channels, image_size, resize, bits)
        except ValueError as error:  # another number of channels
            errors[path] = error
    if not images:
        raise next(iter(errors.values()))
    for notice in describe_files({path.name: path for path in images}, bits, set()):
        warnings.warn(notice, stacklevel=3)
    if errors:
        failed = [path for path in paths if path in errors]
        names = ", ".join(path.name for path in failed)
        warnings.warn(
            f"{len(failed)} of {len(paths)} images are not scored: {names}; the first, because "
            f"{errors[failed[0]]}",
            stacklevel=3,
        )
    return list(images), torch.cat(list(images.values()))


def _write_gallery(
    path: Path, method: Method, images: Tensor, prediction: Prediction, rows: list[dict[str, Any]]
) -> None:
    """Show the images with the highest scores; ``rows`` are in the order of their scores."""
    scores, maps = prediction.image_score.numpy(), prediction.anomaly_map
    top = torch.as_tensor(np.argsort(-scores, kind="stable")[:SHOWN].copy())
    low, high = np.quantile(maps.numpy(), (0.05, 0.999))  # above normal pixels
    alarms = sum(row["alarm"] for row in rows)
    fig, _ = show_detections(
        images[top],
        maps[top],
        titles=["ALARM " * r["alarm"] + escape_dollars(r["file"][-16:]) for r in rows[:SHOWN]],
        scale=(float(low), float(max(high, low + 1e-6))),
        caption=f"{method.name}: highest scores of {len(images)} images; "
        f"{alarms} lie above the threshold",
    )
    save_figure(path, fig)
