"""One reader per kind of data set; it returns a :class:`~diffad_lite.data.source.Source`."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffad_lite.core.config import unknown_name
from diffad_lite.data.folder_reader import read_folder
from diffad_lite.data.published_readers import read_dagm, read_medmnist, read_visa
from diffad_lite.data.shapes import KINDS, draw_shape
from diffad_lite.data.source import DEFAULT_CATEGORIES, Source

# Axes along which training may flip images, as these have no preferred direction there: -1 is
# left-right, -2 up-down. Images of other data sets are not flipped.
FLIP_AXES: dict[str, tuple[int, ...]] = {"elpv": (-1, -2), "shapes": (-1,)}
LICENCES = {"elpv": "CC BY-NC-SA 4.0", "medmnist": "CC BY 4.0", "digits": "CC BY 4.0"}
LICENCES |= {"visa": "CC BY 4.0", "shapes": "CC0 1.0"}


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
    remark = "all digits are normal; choose a category from 0 to 9 to have anomalous images"
    source = Source(category, {}, (0.2, 0.2), remarks=(remark,) if category == "all" else ())
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
