"""One reader per kind of data set; it returns a :class:`~diffad_lite.data.source.Source`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffad_lite.core.config import short_repr, unknown_name
from diffad_lite.core.files import read_rows
from diffad_lite.data.images import list_images
from diffad_lite.data.published_readers import read_dagm, read_medmnist, read_visa
from diffad_lite.data.shapes import KINDS, draw_shape
from diffad_lite.data.source import DEFAULT_CATEGORIES, Source, name_images, require_root

# Axes along which training may flip images, as these have no preferred direction there: -1 is
# left-right, -2 up-down. Images of other data sets are not flipped.
FLIP_AXES: dict[str, tuple[int, ...]] = {"elpv": (-1, -2), "shapes": (-1,)}
LICENCES = {"elpv": "CC BY-NC-SA 4.0", "medmnist": "CC BY 4.0", "digits": "CC BY 4.0"}
LICENCES |= {"visa": "CC BY 4.0", "shapes": "CC0 1.0"}
CALIBRATION_FOLDERS = ("calibration", "validation")
GOOD = ("good", "ok")  # names of folders with normal images
FILE_TYPES = "png, jpg, bmp, tif or webp files, or stacks in npy"


def read_elpv(category: str | None, root: Path | None) -> Source:
    """Read electroluminescence images of solar cells, from the PyPI package ``elpv-dataset``.

    Deitsch et al. 2019, doi 10.1016/j.solener.2019.02.067; CC BY-NC-SA 4.0. The experts' defect
    probability is 0 (normal), 1 (defective), or 1/3 and 2/3 (uncertain, excluded from scores).
    """
    category = category or DEFAULT_CATEGORIES["elpv"]
    if category not in ("mono", "poly"):
        raise unknown_name("elpv category", category, ("mono", "poly"))
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package elpv-dataset is missing: pip install elpv-dataset")
    folder = Path(spec.origin).parent / "data"
    remark = "mean brightness alone separates many defective cells from normal ones"
    source = Source(category, {}, (0.2, 0.2), remarks=(remark,))
    for line in (folder / "labels.csv").read_text().splitlines():
        file, probability, cell_type = line.split()
        if cell_type != category:
            continue
        path = folder / file
        if float(probability) == 0:
            source.normals[f"good/{path.stem}"] = path
        elif float(probability) == 1:
            source.add_test("defective", path.stem, path)
        else:
            source.uncertain[f"uncertain/{path.stem}"] = path
    return source


def read_folder(category: str | None, root: Path | None) -> Source:
    """Read a folder in MVTec layout, or a folder that simply holds normal images.

    MVTec layout: ``train/good``, ``test/good``, ``test/<defect>``, and masks at
    ``ground_truth/<defect>/<stem>_mask.png`` (or ``<stem>.png``, or all files of a folder
    ``<stem>``); ``calibration/good`` or ``validation/good`` is used if it exists. MVTec AD,
    MVTec LOCO, MPDD, PCB-Bank and BTAD ("ok" for "good") have this layout. ``subjects.csv``, lines
    of ``file,subject`` with files relative to the category's folder, names the patient, part or
    wafer of each image.
    """
    root = require_root(root, "folder", "a folder of images")
    base = root / category if category else root
    if not base.is_dir():
        folders = [p.name for p in root.iterdir() if p.is_dir()]
        raise unknown_name(f"category in {root}", str(category), folders)
    if (good := _good_folder(base / "train")) is None:
        source = _read_loose_folder(base, category or base.name)
    else:
        source = _read_mvtec(base, category or base.name, good)
    source.subjects = _read_subjects(base, source)
    return source


def _good_folder(folder: Path) -> Path | None:
    """Return the sub-folder of normal images, if there is one."""
    return next((folder / name for name in GOOD if (folder / name).is_dir()), None)


def _read_mvtec(base: Path, category: str, good: Path) -> Source:
    normals = name_images(good, "train/")
    if not normals:
        raise ValueError(f"{good} holds no images ({FILE_TYPES}); put normal images there")
    source = Source(category, normals, (0.2, 0.0))
    for name in CALIBRATION_FOLDERS:
        if not source.calibration and (folder := _good_folder(base / name)):
            source.calibration = name_images(folder, f"{name}/")
    for folder in sorted(p for p in (base / "test").glob("[!.]*") if p.is_dir()):
        kind = "good" if folder.name in GOOD else folder.name
        masks = base / "ground_truth" / folder.name
        for stem, path in name_images(folder).items():
            mask = None if kind == "good" else _mask_file(masks, path.stem)
            source.add_test(kind, stem, path, mask)
    if all(item.defect_type != "good" for item in source.test.values()):
        source.fractions = (0.2, 0.2)
    return source


def _mask_file(folder: Path, stem: str) -> Path | tuple[Path, ...] | None:
    """Return the mask of an image: one file, or all files of the folder ``stem``."""
    if (folder / stem).is_dir():
        return tuple(list_images(folder / stem)) or None
    names = (f"{stem}_mask.png", f"{stem}.png", f"{stem}.bmp")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_subjects(base: Path, source: Source) -> dict[str, str]:
    """Return name -> subject from ``subjects.csv``, empty without such a file."""
    path = base / "subjects.csv"
    if not path.is_file():
        return {}
    subjects = {}
    for number, row in enumerate(read_rows(path), start=1):
        if len(row) != 2:
            raise ValueError(f"line {number} of {path} is not 'file,subject': {short_repr(row)}")
        subjects[row[0].strip()] = row[1].strip()
    files = {name: path.relative_to(base).as_posix() for name, path in source.images.items()}
    if missing := [file for file in files.values() if file not in subjects]:
        raise ValueError(
            f"{path} does not name the subject of {len(missing)} images, e.g. {missing[0]}; add "
            "them, or remove that file"
        )
    return {name: subjects[file] for name, file in files.items()}


def _read_loose_folder(base: Path, category: str) -> Source:
    """Read normal images without any layout, for training and planted defects."""
    normals = name_images(base, "good/")
    if not normals:
        content = ", ".join(sorted(p.name for p in base.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{base} has neither train/good (MVTec layout) nor images in it ({FILE_TYPES}); put "
            f"normal images there, or give another folder; it holds: {content}"
        )
    return Source(category, normals, (0.2, 0.2))


def read_shapes(category: str | None, root: Path | None) -> Source:
    """Draw synthetic scenes with structural and logical defects: ``diffad_lite.data.shapes``."""
    category = category or DEFAULT_CATEGORIES["shapes"]
    if category != "disc":
        raise unknown_name("shapes category", category, ("disc",))
    normals = {f"good/{i:03d}": draw_shape("good", i)[0] for i in range(300)}
    source = Source(category, normals, (0.2, 0.2))
    for kind in KINDS:
        for i in range(15):
            source.add_test(kind, f"{i:03d}", *draw_shape(kind, i))
    return source


def read_digits(category: str | None, root: Path | None) -> Source:
    """Read handwritten digits, 8x8, from scikit-learn.

    The category is one digit, the normal class, or ``all``. Each digit of another class gives 20
    anomalous test images.
    """
    from sklearn.datasets import load_digits

    category = category or DEFAULT_CATEGORIES["digits"]
    categories = ("all", *map(str, range(10)))
    if category not in categories:
        raise unknown_name("digits category", category, categories)
    digits = load_digits()
    images = (digits.images / 16 * 255).round().astype(np.uint8)[:, None]
    source = Source(category, {}, (0.2, 0.2))
    for i, (image, label) in enumerate(zip(images, map(str, digits.target), strict=True)):
        if category in ("all", label):
            source.normals[f"{label}/{i:04d}"] = image
        elif sum(item.defect_type == label for item in source.test.values()) < 20:
            source.add_test(label, f"{i:04d}", image)
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
