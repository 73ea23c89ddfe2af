"""One reader for each kind of data set: what images there are, and what is known of them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffad_lite.core.config import short_repr, unknown_name
from diffad_lite.core.files import read_rows
from diffad_lite.data.images import list_images
from diffad_lite.data.published_readers import read_dagm, read_medmnist, read_visa
from diffad_lite.data.shapes import KINDS, draw_shape
from diffad_lite.data.source import DEFAULT_CATEGORIES, Source, existing_root, named_images

FLIP_AXES: dict[str, tuple[int, ...]] = {"elpv": (-1, -2), "shapes": (-1,)}
LICENCES = {"elpv": "CC BY-NC-SA 4.0", "medmnist": "CC BY 4.0", "digits": "CC BY 4.0"}
LICENCES |= {"visa": "CC BY 4.0", "shapes": "CC0 1.0"}
CALIBRATION_FOLDERS = ("calibration", "validation")
GOOD = ("good", "ok")  # how sets in this layout call normal images


def read_elpv(category: str | None, root: Path | None) -> Source:
    """Electroluminescence images of solar cells, from the PyPI package ``elpv-dataset``.

    Deitsch et al. 2019, doi 10.1016/j.solener.2019.02.067; CC BY-NC-SA 4.0. The experts' defect
    probability is 0 (normal), 1 (defective), or 1/3 and 2/3 (uncertain, left out of scores).
    """
    category = category or DEFAULT_CATEGORIES["elpv"]
    if category not in ("mono", "poly"):
        raise unknown_name("elpv category", category, ("mono", "poly"))
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package elpv-dataset is missing: pip install elpv-dataset")
    folder = Path(spec.origin).parent / "data"
    groups: dict[str, dict[str, Path]] = {"good": {}, "defective": {}, "uncertain": {}}
    for line in (folder / "labels.csv").read_text().splitlines():
        file, probability, kind = line.split()
        if kind == category:
            group = {0.0: "good", 1.0: "defective"}.get(float(probability), "uncertain")
            groups[group][f"{group}/{Path(file).stem}"] = folder / file
    return Source(
        category=category,
        normals=groups["good"],
        shares=(0.2, 0.2),
        test=groups["defective"],
        defect_types=dict.fromkeys(groups["defective"], "defective"),
        uncertain=groups["uncertain"],
        remarks=("mean brightness alone separates many defective cells from normal ones",),
    )


def read_folder(category: str | None, root: Path | None) -> Source:
    """A folder in MVTec layout, or one that simply holds normal images.

    MVTec layout: ``train/good``, ``test/good``, ``test/<defect>``, and masks at
    ``ground_truth/<defect>/<stem>_mask.png`` (or ``<stem>.png``, or all files of a folder
    ``<stem>``); ``calibration/good`` or ``validation/good`` is used when there. So are MVTec AD,
    MVTec LOCO, MPDD, PCB-Bank, and BTAD, where "good" is "ok". ``subjects.csv``, lines of
    ``file,subject`` with files as seen from the category's folder, says which images are of one
    patient, part or wafer.
    """
    root = existing_root(root, "folder", "the folder of your images", takes="a folder of images")
    base = root / category if category else root
    if not base.is_dir():
        folders = [p.name for p in root.iterdir() if p.is_dir()]
        raise unknown_name(f"category in {root}", str(category), folders)
    if (good := _good(base / "train")) is None:
        source = _loose_folder(base, category or base.name)
    else:
        source = _mvtec_layout(base, category or base.name, good)
    source.subjects = _subjects(base, source)
    return source


def _good(folder: Path) -> Path | None:
    """The folder of normal images in ``train``, ``test`` or the like."""
    return next((folder / name for name in GOOD if (folder / name).is_dir()), None)


def _mvtec_layout(base: Path, category: str, good: Path) -> Source:
    normals = named_images(good, "train/")
    if not normals:
        raise ValueError(f"{good} holds no images ({_suffixes()}); put normal images there")
    source = Source(category, normals, (0.2, 0.0))
    for name in CALIBRATION_FOLDERS:
        if not source.calibration and (own := _good(base / name)):
            source.calibration = named_images(own, f"{name}/")
    for folder in sorted(p for p in (base / "test").glob("[!.]*") if p.is_dir()):
        kind = "good" if folder.name in GOOD else folder.name
        for name, path in named_images(folder, f"{kind}/").items():
            source.test[name], source.defect_types[name] = path, kind
            if kind != "good":
                source.masks[name] = _mask_file(base / "ground_truth" / folder.name, path.stem)
    if "good" not in source.defect_types.values():
        source.shares = (0.2, 0.2)
    return source


def _mask_file(folder: Path, stem: str) -> Path | tuple[Path, ...] | None:
    """The mask of an image: one file, or all those of a folder of its name."""
    if (folder / stem).is_dir():
        return tuple(list_images(folder / stem)) or None
    names = (f"{stem}_mask.png", f"{stem}.png", f"{stem}.bmp")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _subjects(base: Path, source: Source) -> dict[str, str]:
    """Name -> subject, from ``subjects.csv`` where there is one."""
    path = base / "subjects.csv"
    if not path.is_file():
        return {}
    known = {}
    for number, row in enumerate(read_rows(path), start=1):
        if len(row) != 2:
            raise ValueError(f"line {number} of {path} is not 'file,subject': {short_repr(row)}")
        known[row[0].strip()] = row[1].strip()
    images = source.normals | source.calibration | source.test
    files = {name: value.relative_to(base).as_posix() for name, value in images.items()}
    if missing := [file for file in files.values() if file not in known]:
        raise ValueError(
            f"{path} does not name the subject of {len(missing)} images, e.g. {missing[0]}; add "
            "them, or remove that file"
        )
    return {name: known[file] for name, file in files.items()}


def _loose_folder(base: Path, category: str) -> Source:
    """Normal images without any layout: good for training and planted defects."""
    normals = named_images(base, "good/")
    if not normals:
        inside = ", ".join(sorted(p.name for p in base.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{base} has neither train/good (MVTec layout) nor images in it ({_suffixes()}); put "
            f"normal images there, or give another folder; it holds: {inside}"
        )
    return Source(category, normals, (0.2, 0.2))


def _suffixes() -> str:
    return "png, jpg, bmp, tif or webp files, or stacks in npy"


def read_shapes(category: str | None, root: Path | None) -> Source:
    """Synthetic scenes with structural and logical defects; see :mod:`diffad_lite.data.shapes`."""
    category = category or DEFAULT_CATEGORIES["shapes"]
    if category != "disc":
        raise unknown_name("shapes category", category, ("disc",))
    normals = {f"good/{i:03d}": draw_shape("good", i)[0] for i in range(300)}
    source = Source(category, normals, (0.2, 0.2))
    for kind in KINDS:
        for i in range(15):
            name = f"{kind}/{i:03d}"
            source.test[name], source.masks[name] = draw_shape(kind, i)
            source.defect_types[name] = kind
    return source


def read_digits(category: str | None, root: Path | None) -> Source:
    """Handwritten digits, 8x8, from scikit-learn: ``all``, or one digit as the normal class."""
    from sklearn.datasets import load_digits

    category = category or DEFAULT_CATEGORIES["digits"]
    known = ("all", *map(str, range(10)))
    if category not in known:
        raise unknown_name("digits category", category, known)
    digits = load_digits()
    images = (digits.images / 16 * 255).round().astype(np.uint8)[:, None]
    labels = [str(label) for label in digits.target]
    names = [f"{label}/{i:04d}" for i, label in enumerate(labels)]
    normals = {
        n: image
        for n, label, image in zip(names, labels, images, strict=True)
        if category in ("all", label)
    }
    source = Source(category, normals, (0.2, 0.2))
    for n, label, image in zip(names, labels, images, strict=True):
        if n not in normals and list(source.defect_types.values()).count(label) < 20:
            source.test[n], source.defect_types[n] = image, label
    return source


READERS: dict[str, Callable[[str | None, Path | None], Source]] = {
    "elpv": read_elpv,
    "folder": read_folder,
    "visa": read_visa,
    "dagm": read_dagm,
    "medmnist": read_medmnist,
    "shapes": read_shapes,
    "digits": read_digits,
}


def flip_axes(name: str) -> tuple[int, ...]:
    """Return the axes along which training may flip the images of a data set.

    They have no preferred direction there; -1 is left-right, -2 up-down.
    """
    return FLIP_AXES.get(name, ())
