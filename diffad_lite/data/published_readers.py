"""Readers of published sets that have a layout of their own; the rest is read by ``folder``."""

from pathlib import Path

import numpy as np

from diffad_lite.core.config import unknown_name
from diffad_lite.core.files import read_rows
from diffad_lite.data.images import list_images
from diffad_lite.data.source import DEFAULT_CATEGORIES, Source, check_inside, existing_root

VISA_SPLIT = Path("split_csv") / "1cls.csv"


def read_visa(category: str | None, root: Path | None) -> Source:
    """VisA (Zou et al. 2022), CC BY 4.0, by its own table ``split_csv/1cls.csv``.

    The table has the columns object, split, label, image and mask, with paths as seen from the
    root: one line for each image, of which the normal ones of "train" train.
    """
    root = existing_root(root, "visa", "the folder with split_csv/ and one folder a category")
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
    objects: list[str] = sorted({row["object"] for row in rows})
    if category not in objects:
        raise unknown_name("visa category", str(category), objects)
    source = Source(category, {}, (0.2, 0.0))
    for row in rows:
        if row["object"] != category:
            continue
        normal, path = row["label"] == "normal", root / row["image"]
        if row["split"] == "train" and normal:
            source.normals[f"train/{path.stem}"] = path
        elif row["split"] == "test":
            name = f"{'good' if normal else 'anomaly'}/{path.stem}"
            source.test[name] = path
            source.defect_types[name] = "good" if normal else "anomaly"
            source.masks[name] = root / row["mask"] if row["mask"] else None
    return source


def read_dagm(category: str | None, root: Path | None) -> Source:
    """DAGM 2007 (Wieler and Hahn), ten made textures: ``<root>/Class1/Train``, ``.../Test``.

    Images with a file in the folder ``Label`` beside them are defective; those of "Train" are left
    out. Masks are ellipses around the defects, not their outlines.
    """
    root = existing_root(root, "dagm", "the folder with Class1 to Class10")
    known = sorted(p.name for p in root.iterdir() if (p / "Train").is_dir())
    if category not in known:
        raise unknown_name(f"dagm category in {root}", str(category), known)
    source = Source(category, {}, (0.2, 0.0), remarks=("masks are ellipses around the defects",))
    for part in ("Train", "Test"):
        folder = root / category / part
        labels = folder / "Label"
        found = list_images(labels) if labels.is_dir() else []
        masks = {path.stem.removesuffix("_label"): path for path in found}
        for path in list_images(folder):
            if part == "Test":
                kind = "defect" if path.stem in masks else "good"
                source.test[name := f"{kind}/{path.stem}"] = path
                source.defect_types[name], source.masks[name] = kind, masks.get(path.stem)
            elif path.stem not in masks:
                source.normals[f"train/{path.stem}"] = path
    return source


MEDMNIST_LABELS = {  # by number, as in the files; "good" is normal
    "pneumoniamnist": ("good", "pneumonia"),
    "octmnist": ("cnv", "dme", "drusen", "good"),
}


def read_medmnist(category: str | None, root: Path | None) -> Source:
    """PneumoniaMNIST or OCTMNIST (Yang et al. 2023, doi 10.1038/s41597-022-01721-8), CC BY 4.0.

    Reads ``<root>/<category>.npz`` as it is published, of any size (``octmnist_64``). Their own
    split is kept: normal images of "train" train, those of "val" calibrate, "test" is the test.
    """
    category = category or DEFAULT_CATEGORIES["medmnist"]
    kind = category.partition("_")[0]
    if kind not in MEDMNIST_LABELS:
        raise unknown_name("medmnist category", category, MEDMNIST_LABELS)
    what = f"the folder with {category}.npz; download that file from medmnist.com first, nothing is"
    path = existing_root(root, "medmnist", f"{what} downloaded here") / f"{category}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; download it from medmnist.com into that folder")
    try:
        with np.load(path) as arrays:  # no pickles
            parts = {
                part: _checked(arrays[f"{part}_images"], arrays[f"{part}_labels"], part)
                for part in ("train", "val", "test")
            }
    except PermissionError:
        raise
    except Exception as error:  # archives and headers that are spoilt raise what they like
        why = (str(error) or type(error).__name__)[:200]
        fault = f"{path} is broken, or not a file of MedMNIST ({why})"
        raise ValueError(f"{fault}; download it again") from None
    types = dict(enumerate(MEDMNIST_LABELS[kind]))
    named: dict[str, dict[str, np.ndarray]] = {}
    source = Source(category, {}, (0.0, 0.0))
    for part, (images, labels) in parts.items():
        named[part] = {}
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            defect_type = types.get(int(label))
            if defect_type is None:
                raise ValueError(f"{path} is broken: it has label {label}; download it again")
            if part == "test":
                source.defect_types[name := f"{defect_type}/{i:05d}"] = defect_type
            elif defect_type != "good":
                continue
            else:
                name = f"{part}/{i:05d}"
            named[part][name] = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    source.normals, source.calibration, source.test = named.values()
    return source


def _checked(images: np.ndarray, labels: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, H, W) or (n, H, W, 3) and labels (n,) of one part, if they are so."""
    labels, shape = labels.reshape(-1), images.shape
    grey, colour = images.ndim == 3, images.ndim == 4 and shape[-1] == 3
    if images.dtype != np.uint8 or not (grey or colour) or 0 in shape:
        raise ValueError(f"the images of {part} are {images.dtype} {shape}")
    if labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise ValueError(f"the labels of {part} are {labels.dtype} {labels.shape}")
    return images, labels
