"""Images of your own: what to know of them before training, and scoring a folder without labels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from diffad_lite.core.files import check_writable, write_atomically, write_rows
from diffad_lite.data.images import Resize, list_images, read_image, resize_image, to_float
from diffad_lite.experiments.evaluate import at_original_size, plain
from diffad_lite.methods.base import Method
from diffad_lite.plots import show_detections

FEW = 50  # normal images below which both training and threshold are rough
OUTLYING = 6.0  # deviations (of the median's kind) from which an image stands out
SHIFTED = 0.8  # share of pairs that are ordered alike, from which two folders differ
SHOWN = 8  # images in the gallery


@dataclass(frozen=True)
class Survey:
    """What some image files are like, one entry for each that could be read.

    Attributes:
        names: file names.
        sizes: (height, width) in pixels.
        channels: 1 to 4.
        looks: brightness (mean), contrast (standard deviation) and sharpness (mean absolute
            difference of neighbours) of the grey values, 0 .. 255; each (n,).
        copies: pairs of names whose pixels are equal.
        broken: one line for each file that could not be read.
    """

    names: list[str]
    sizes: list[tuple[int, int]]
    channels: list[int]
    looks: dict[str, np.ndarray]
    copies: list[tuple[str, str]]
    broken: list[str]

    def warnings(self, training: bool = True) -> list[str]:
        """What may spoil a training on these images, one sentence each, with what to do.

        Args:
            training: False leaves out what only matters where they are learnt as normal.
        """
        found = (
            [f"{len(self.broken)} files cannot be read: {self.broken[0]}"] if self.broken else []
        )
        n = len(self.names)
        if training and n < FEW:
            found.append(
                f"{n} images are few: with less than {FEW} a model learns these very images, and "
                "a fifth of them makes a rough threshold; add normal images"
            )
        if len(set(self.channels)) > 1:
            grey = self.channels.count(1)
            found.append(f"{grey} images are grey and {n - grey} in colour; save all alike")
        aspects = [w / h for h, w in self.sizes]
        if aspects and max(aspects) > 1.1 * min(aspects):
            found.append(
                f"width / height goes from {min(aspects):.2f} to {max(aspects):.2f}, so that "
                "squeezing to a square distorts them differently; cut them alike, or use "
                "resize='pad'"
            )
        if training and self.copies:
            one, other = self.copies[0]
            found.append(
                f"{len(self.copies)} images are copies of others, such as {other} of {one}; a copy "
                "on both sides of a split flatters the result: remove it"
            )
        for look, values in self.looks.items() if training else ():
            if odd := _outlying(values):
                names = ", ".join(self.names[i] for i in odd[:3])
                found.append(
                    f"{len(odd)} images stand out by their {look}, such as {names}; look at them: "
                    "a faulty picture among the normal ones is learnt as normal"
                )
        return found


def _outlying(values: np.ndarray) -> list[int]:
    """Indices of values far from the median, in units of the median distance from it."""
    distance = np.abs(values - np.median(values)) if len(values) else values
    usual = 1.4826 * np.median(distance) if len(values) else 0.0
    return np.flatnonzero(distance > OUTLYING * max(usual, 1.0)).tolist()


def survey(paths: Sequence[Path]) -> Survey:
    """Open every image once; files that cannot be read are listed, not raised."""
    found = Survey([], [], [], {}, [], [])
    looks: dict[str, list[float]] = {"brightness": [], "contrast": [], "sharpness": []}
    seen: dict[str, str] = {}
    for path in paths:
        try:
            image = read_image(path)
        except (OSError, ValueError) as error:
            found.broken.append(str(error))
            continue
        digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        if digest in seen:
            found.copies.append((seen[digest], path.name))
        seen.setdefault(digest, path.name)
        grey = image.mean(0)
        steps = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1) if grey.shape[axis] > 1]
        found.names.append(path.name)
        found.sizes.append(image.shape[1:])
        found.channels.append(len(image))
        for values, value in zip(
            looks.values(), (grey.mean(), grey.std(), np.mean(steps or 0)), strict=True
        ):
            values.append(float(value))
    return replace(found, looks={look: np.array(values) for look, values in looks.items()})


def shifts(normal: Survey, new: Survey) -> list[str]:
    """How new images differ from the normal ones as a whole, one sentence each.

    A difference that nearly all new images share is rarely a defect: it is the light, the lens or
    the file format, and every score will show it.
    """
    found = []
    labels = np.repeat([0, 1], [len(normal.names), len(new.names)])
    words = {
        "brightness": ("brighter", "darker"),
        "contrast": ("richer in contrast", "poorer in contrast"),
        "sharpness": ("sharper", "less sharp"),
    }
    for look, (more, less) in words.items() if len(set(labels)) == 2 else ():
        share = roc_auc_score(labels, np.concatenate([normal.looks[look], new.looks[look]]))
        if max(share, 1 - share) >= SHIFTED:
            what = more if share > 0.5 else less
            found.append(
                f"the new images are {what} than the normal ones in {max(share, 1 - share):.0%} of "
                "all pairs; take them alike, or train with standardise=true"
            )
    return found


def read_images(paths: Sequence[Path], channels: int, image_size: int, resize: Resize) -> Tensor:
    """Image files as methods take them, (n, C, H, W), float32 in [-1, 1].

    Raises:
        ValueError: one is no image, or of more channels than wanted.
    """
    parts = []
    for path in paths:
        image = resize_image(read_image(path), image_size, resize)
        if len(image) not in (1, channels):
            raise ValueError(
                f"{path} has {len(image)} channels, and the model is for {channels}; save it as "
                "the images that the model was trained on"
            )
        parts.append(np.broadcast_to(image, (channels, *image.shape[1:])))
    return to_float(np.stack(parts))


def score_folder(
    method: Method, folder: str | Path, out: str | Path, *, resize: Resize = "squash"
) -> list[dict[str, Any]]:
    """Score images that have no labels; write ``scores.csv``, ``maps/``, ``gallery.png``.

    Args:
        method: fitted.
        folder: images directly in it.
        out: where to write; a map is a float32 TIFF of its image's size.
        resize: as in training.

    Returns:
        a row for each image, highest score first: ``file``, ``image_score``, ``alarm`` (whether
        it lies above the method's threshold).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images in it, one that cannot be read, or a method without a threshold.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; give the one that holds the images")
    paths = list_images(folder)
    if not paths:
        raise ValueError(f"{folder} holds no images; give the folder that they lie in directly")
    check_writable(out)
    c, threshold = method.config, method.threshold_
    if threshold is None:
        raise ValueError("the model has no threshold yet; call calibrate() with normal images")
    images = read_images(paths, c.channels, c.image_size, resize)
    prediction = method.predict(images)
    scores, maps = prediction.image_score.numpy(), prediction.anomaly_map
    order = np.argsort(-scores, kind="stable")
    rows = [
        {
            "file": paths[i].name,
            "image_score": float(scores[i]),
            "alarm": bool(scores[i] > threshold),
        }
        for i in order
    ]
    for path, anomaly_map in zip(paths, maps, strict=True):
        size = read_image(path).shape[1:]
        pixels = at_original_size(anomaly_map, size, resize, c.image_size)
        target = out / "maps" / f"{path.name}.tiff"
        write_atomically(target, Image.fromarray(pixels).save)
    _write_gallery(out / "gallery.png", images, maps, rows, order, method)
    limit = f"{threshold:.6g}"
    cells = [(r["file"], f"{r['image_score']:.6g}", limit, int(r["alarm"])) for r in rows]
    write_rows(out / "scores.csv", [("file", "image_score", "threshold", "alarm"), *cells])
    return rows


def _write_gallery(
    path: Path,
    images: Tensor,
    maps: Tensor,
    rows: Sequence[dict[str, Any]],
    order: np.ndarray,
    method: Method,
) -> None:
    """The images with the highest scores, on one scale of colours that ends above normal pixels."""
    chosen = torch.as_tensor(order[:SHOWN].copy())
    titles = [("ALARM " if row["alarm"] else "") + plain(row["file"][-16:]) for row in rows[:SHOWN]]
    low, high = np.quantile(maps.numpy(), (0.05, 0.999))
    fig, _ = show_detections(
        images[chosen],
        maps[chosen],
        titles=titles,
        scale=(float(low), float(max(high, low + 1e-6))),
        caption=f"{method.name}: highest scores of {len(images)} images; "
        f"{sum(row['alarm'] for row in rows)} lie above the threshold",
    )
    write_atomically(path, fig.savefig)
    plt.close(fig)
