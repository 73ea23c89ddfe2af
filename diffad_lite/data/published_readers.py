"""Readers of published data sets with a special layout; ``folder`` reads all others.

A new reader is also listed in ``READERS`` (and ``LICENCES``, ``FLIP_AXES``) of ``readers.py``.
"""

from pathlib import Path

import numpy as np

from diffad_lite.core.config import unknown_name
from diffad_lite.core.files import read_rows
from diffad_lite.data.images import error_reason, list_images
from diffad_lite.data.source import DEFAULT_CATEGORIES, Source, check_inside, require_root

VISA_SPLIT = Path("split_csv") / "1cls.csv"
MEDMNIST_LABELS = {  # by number, as in the files; "good" is normal
    "pneumoniamnist": ("good", "pneumonia"),
    "octmnist": ("cnv", "dme", "drusen", "good"),
}


def read_visa(category: str | None, root: Path | None) -> Source:
    """Read VisA (Zou et al. 2022), CC BY 4.0, with the split of its ``split_csv/1cls.csv``.

    The table has the columns object, split, label, image and mask, and one line per image; paths
    are relative to the root. The normal images of "train" are for training.
    """
    root = require_root(root, "visa", "the folder with split_csv/ and one folder per category")
    table = root / VISA_SPLIT
    if not table.is_file():
        raise FileNotFoundError(f"no table {table}; --root takes {root.name} as it is unpacked")
    head, *lines = read_rows(table) or [[]]
    columns = {"object", "split", "label", "image", "mask"}
    if not lines or not columns <= set(head):
        raise ValueError(f"{table} lacks rows, or one of the columns {sorted(columns)}")
    rows: list[dict[str, str]] = []
    for number, line in enumerate(lines, start=2):
        if len(line) != len(head):
            raise ValueError(f"line {number} of {table} has {len(line)} columns, not {len(head)}")
        rows.append(row := dict(zip(head, line, strict=True)))
        for key in ("image", "mask"):
            check_inside(row[key], f"the {key} in line {number} of {table}")
    categories = {row["object"] for row in rows}
    if category not in categories:
        raise unknown_name("visa category", str(category), categories)
    source = Source(category, {}, (0.2, 0.0))
    for row in rows:
        if row["object"] != category:
            continue
        is_normal, path = row["label"] == "normal", root / row["image"]
        if row["split"] == "train" and is_normal:
            source.normals[f"train/{path.stem}"] = path
        elif row["split"] == "test":
            mask = root / row["mask"] if row["mask"] else None
            source.add_test("good" if is_normal else "anomaly", path.stem, path, mask)
    return source


def read_dagm(category: str | None, root: Path | None) -> Source:
    """Read DAGM 2007 (Wieler and Hahn), ten synthetic textures, from ``<root>/Class1/Train`` etc.

    An image with a mask in the folder ``Label`` beside it is defective. Defective images of
    "Train" are left out. Masks are ellipses around the defects, not their outlines.
    """
    root = require_root(root, "dagm", "the folder with Class1 to Class10")
    categories = [p.name for p in root.iterdir() if (p / "Train").is_dir()]
    if category not in categories:
        raise unknown_name(f"dagm category in {root}", str(category), categories)
    source = Source(category, {}, (0.2, 0.0), remarks=("masks are ellipses around the defects",))
    for part in ("Train", "Test"):
        folder = root / category / part
        files = list_images(folder / "Label") if (folder / "Label").is_dir() else []
        masks = {path.stem.removesuffix("_label"): path for path in files}
        for path in list_images(folder):
            mask = masks.get(path.stem)
            if part == "Test":
                source.add_test("defect" if mask else "good", path.stem, path, mask)
            elif mask is None:
                source.normals[f"train/{path.stem}"] = path
    return source


def read_medmnist(category: str | None, root: Path | None) -> Source:
    """Read PneumoniaMNIST or OCTMNIST, CC BY 4.0, from ``<root>/<category>.npz``.

    Yang et al. 2023, doi 10.1038/s41597-022-01721-8. The file may have any size of images
    (``octmnist_64``). The published split is kept: the normal images of "train" are for training,
    those of "val" for calibration, all of "test" for the test.
    """
    category = category or DEFAULT_CATEGORIES["medmnist"]
    kind = category.partition("_")[0]
    if kind not in MEDMNIST_LABELS:
        raise unknown_name("medmnist category", category, MEDMNIST_LABELS)
    content = f"the folder with {category}.npz from medmnist.com (nothing is downloaded here)"
    path = require_root(root, "medmnist", content) / f"{category}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; download it from medmnist.com into that folder")
    try:
        with np.load(path) as arrays:  # no pickles
            parts = {part: _read_part(arrays, part) for part in ("train", "val", "test")}
    except PermissionError:
        raise
    except Exception as error:  # damaged archives and headers raise errors of any type
        fault = f"{path} is broken, or not a file of MedMNIST ({error_reason(error)})"
        raise ValueError(f"{fault}; download it again") from None
    defect_types = dict(enumerate(MEDMNIST_LABELS[kind]))
    source = Source(category, {}, (0.0, 0.0))
    normals = {"train": source.normals, "val": source.calibration}
    for part, (images, labels) in parts.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            if int(label) not in defect_types:
                raise ValueError(f"{path} is broken: it has label {label}; download it again")
            defect_type = defect_types[int(label)]
            pixels = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
            if part == "test":
                source.add_test(defect_type, f"{i:05d}", pixels)
            elif defect_type == "good":
                normals[part][f"{part}/{i:05d}"] = pixels
    return source


def _read_part(arrays: np.lib.npyio.NpzFile, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, H, W) or (N, H, W, 3), uint8, and the labels (N,) of one part."""
    images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].reshape(-1)
    is_colour = images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (images.ndim == 3 or is_colour) or 0 in images.shape:
        raise ValueError(f"the images of {part} are {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise ValueError(f"the labels of {part} are {labels.dtype} {labels.shape}")
    return images, labels
