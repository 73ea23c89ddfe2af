"""Folders as people have them: what is read is right, or a warning or an error says otherwise.

The generator knows what it wrote. An image has a bright defect exactly where its mask says, so
each image that was read can be recognised, and its label, its mask and its pixels can be checked.
"""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from fuzzing import TOTAL, Case, check_inputs, choose
from PIL import Image

from diffad_lite.data.datasets import AnomalyData, load_dataset
from diffad_lite.data.images import to_uint8

pytestmark = pytest.mark.timeout(max(300, TOTAL))

SIDE = 16  # pixels of each image, so that reading resizes nothing
NORMAL = ("good", "Good", "GOOD", "normal", "Normal", "NORMAL", "ok", "OK", "Ok")
MASK_FOLDERS = ("ground_truth", "Ground_Truth", "masks", "GT", "mask")
MASK_ENDINGS = ("_mask", "_Mask", "_MASK", "_gt", "_GT", "-mask", "")
SUFFIXES = (".png", ".PNG", ".bmp", ".tif", ".TIFF", ".jpg", ".JPEG")
SUB_FOLDERS = ("", "", "", "cam1", "day 1/cam2")
DEPTHS = (8, 8, 8, 16, 12, 0)  # bits of the values; 0 is a mixture
MASK_VALUES = ("255", "255", "1", "classes", "16 bits", "16 bits, 1", "inverted", "other size")
TOLERANCE = 12  # grey levels: lossy files
WORDS = {  # kind of fault -> what a warning about it says
    "images": "not read|sub-folder|directly|only the first",
    "labels": "normal|good|count as defects",
    "masks": "lossy|more than half|no mask, or an empty one|of no test image",
    "pixels": "bits|values|channels",
}


@dataclass
class Tree:
    """What was written: uint8 images (SIDE, SIDE) by content, with label and mask."""

    images: list[np.ndarray] = field(default_factory=list)
    is_test: list[bool] = field(default_factory=list)
    truth: list[np.ndarray] = field(default_factory=list)  # bool, all False for normal images
    has_mask: list[bool] = field(default_factory=list)

    def draw(self, rng: np.random.Generator, *, is_test: bool, is_anomalous: bool) -> np.ndarray:
        """Draw an image unlike all others; one corner has the largest value of the camera."""
        # A coarse pattern, which lossy files keep and which tells images apart.
        pixels = np.kron(rng.integers(20, 100, (4, 4)), np.ones((4, 4))).astype(np.uint8)
        truth = np.zeros((SIDE, SIDE), dtype=bool)
        if is_anomalous:
            top, left = rng.integers(4, 10, 2)
            truth[top : top + 4, left : left + 5] = True
        pixels[truth] = 200
        pixels[:4, :4] = 255
        self.images.append(pixels)
        self.is_test.append(is_test)
        self.truth.append(truth)
        self.has_mask.append(False)
        return pixels


def save(path: Path, pixels: np.ndarray, bits: int = 8, *, in_colour: bool = False) -> None:
    """Write grey values 0 .. 255 with 8 bits, or in a 16-bit file with values of ``bits`` bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if bits > 8:
        deep = (pixels * ((2**bits - 1) / 255)).round().astype(np.uint16)
        image = Image.fromarray(deep)
    else:
        image = Image.fromarray(pixels).convert("RGB" if in_colour else "L")
    lossy = {"quality": 100} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    image.save(path, **lossy)


def write_images(
    rng: np.random.Generator, tree: Tree, folder: Path, n: int, look: dict, *, kind: str
) -> list[Path]:
    """Write ``n`` images of a kind: ``train``, ``good`` or ``defect``."""
    paths, place = [], choose(rng, SUB_FOLDERS)
    for i in range(n):
        pixels = tree.draw(rng, is_test=kind != "train", is_anomalous=kind == "defect")
        bits = look["bits"] or choose(rng, (8, 12, 16))
        suffix = ".png" if bits > 8 else look["suffix"]
        in_colour = rng.random() < look["coloured"]
        path = folder / place / f"{i:03d}{suffix}"
        save(path, pixels, bits, in_colour=in_colour)
        paths.append(path)
    return paths


def save_mask(rng: np.random.Generator, path: Path, truth: np.ndarray, values: str) -> None:
    mask, suffix = truth.astype(np.uint16), path.suffix.lower()
    if values.startswith("16 bits") and suffix in (".png", ".tif", ".tiff"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask * (1 if values.endswith("1") else 65535)).save(path)
        return
    if values == "classes":
        mask[truth] = rng.choice([1, 100, 200, 255], truth.sum())
    elif values == "inverted":
        mask = 255 * (1 - mask)
    elif values == "other size":
        mask = np.ones((SIDE + 1, SIDE), dtype=np.uint16)
    elif values != "1":
        mask = 255 * mask
    save(path, mask.astype(np.uint8))


def write_masks(rng: np.random.Generator, base: Path, tree: Tree, paths: list[Path]) -> str:
    """Write masks of the newest images; return what kind of masks they are."""
    layout = choose(rng, ("mirrored", "mirrored", "beside", "folders", "none"))
    ending, suffix = choose(rng, MASK_ENDINGS), choose(rng, SUFFIXES)
    name, values = choose(rng, MASK_FOLDERS), choose(rng, MASK_VALUES)
    if layout == "none":
        return "no masks"
    if layout == "beside":
        ending = ending or "_mask"
    missing = rng.random() < 0.2
    for number, path in zip(range(-len(paths), 0), paths, strict=True):
        if missing and number == -1:
            continue
        inside = path.relative_to(base / "test").parent
        target = {
            "mirrored": base / name / inside / f"{path.stem}{ending}{suffix}",
            "beside": path.with_name(f"{path.stem}{ending}{suffix}"),
            "folders": base / name / inside / path.stem / f"0{suffix}",
        }[layout]
        save_mask(rng, target, tree.truth[number], values)
        tree.has_mask[number] = True
    return f"{layout} {name} {ending}{suffix} {values}"


def write_extra(rng: np.random.Generator, base: Path, extra: str) -> None:
    """Write a file that is no image of the data set, or an image in an odd place."""
    other = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))
    (base / "ground_truth" / "crack").mkdir(parents=True, exist_ok=True)
    if extra == "text":
        (base / "train" / "notes.txt").write_text("hello")
    elif extra == "hidden":
        other.save(base / "test" / ".hidden.png")
    elif extra == "image":
        other.save(base / choose(rng, ("a.png", "test/a.png", "train/a.png")))
    elif extra == "mask":
        other.save(base / "ground_truth" / "crack" / "999_mask.png")
    elif extra == "other format":
        other.save(base / "train" / "a.gif")


def write_tree(rng: np.random.Generator, base: Path) -> tuple[Tree, str]:
    """Write a data set with some oddities; return what it holds, and a description."""
    tree = Tree()
    look = {
        "bits": choose(rng, DEPTHS),
        "suffix": choose(rng, SUFFIXES),
        "coloured": choose(rng, (0, 0, 1, 0.2)),
    }
    names = [choose(rng, NORMAL) for _ in range(3)]
    write_images(rng, tree, base / "train" / names[0], 14, look, kind="train")
    if rng.random() < 0.3:
        write_images(rng, tree, base / "calibration" / names[1], 8, look, kind="train")
    normal = {names[1]: 3, names[2]: 2} if rng.random() < 0.3 else {names[1]: 3}
    for name, n in normal.items() if rng.random() < 0.9 else ():
        write_images(rng, tree, base / "test" / name, n, look, kind="good")
    masks = []
    for name in ("crack", "Big hole")[: int(rng.integers(1, 3))]:
        paths = write_images(rng, tree, base / "test" / name, 3, look, kind="defect")
        masks.append(write_masks(rng, base, tree, paths))
    extra = choose(rng, ("nothing", "nothing", "text", "hidden", "image", "mask", "other format"))
    write_extra(rng, base, extra)
    return tree, f"{look}, {names}, masks {masks}, extra: {extra}"


def standardise(image: np.ndarray) -> np.ndarray:
    return (image - image.mean()) / max(image.std(), 1e-6)


def faults_of(data: AnomalyData, tree: Tree) -> set[str]:
    """Return the kinds of faults in what was read, keys of ``WORDS``."""
    written = np.stack(tree.images).astype(int)
    patterns = np.stack([standardise(image) for image in tree.images])

    def recognise(image: np.ndarray) -> int:
        """Return the number of the written image, whatever became of its brightness."""
        return int(np.abs(patterns - standardise(image)).mean((1, 2)).argmin())

    faults = set()
    normals = to_uint8(data.train)[:, 0], to_uint8(data.calibration)[:, 0]
    tested = to_uint8(data.test_images)[:, 0]
    indices = [recognise(image) for part in (*normals, tested) for image in part]
    if sorted(indices) != list(range(len(tree.images))):
        faults.add("images")
    for index, image in zip(indices, np.concatenate([*normals, tested]), strict=True):
        if np.abs(written[index] - image.astype(int)).max() > TOLERANCE:
            faults.add("pixels")
    n_fitted = len(indices) - len(tested)
    if any(tree.is_test[index] for index in indices[:n_fitted]):
        faults.add("labels")
    for number, index in enumerate(indices[n_fitted:]):
        truth = tree.truth[index]
        if bool(data.test_labels[number]) != bool(truth.any()):
            faults.add("labels")
        mask = data.test_masks[number] if data.test_masks else None
        expected = truth if tree.has_mask[index] or not truth.any() else None
        if any(tree.has_mask) and not (mask is expected or np.array_equal(mask, expected)):
            faults.add("masks")
    return faults


def tree_case(rng: np.random.Generator, folder: Path) -> Case:
    base = folder / "plate"
    tree, description = write_tree(rng, base)

    def load() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = load_dataset("folder", root=base, image_size=SIDE)
        said = [str(warning.message) for warning in caught]
        for fault in sorted(faults_of(data, tree)):
            if not any(re.search(WORDS[fault], message) for message in said):
                raise AssertionError(f"wrong {fault}, and nothing said; warnings: {said}")

    return Case(description, load, (base, "the mask of "))


def test_folders_are_read_right_or_it_is_said(tmp_path):
    check_inputs("trees", tmp_path, tree_case)
