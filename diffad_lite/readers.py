"""One reader for each kind of data set: what images there are, and what is known of them."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffad_lite.config import unknown_name
from diffad_lite.images import list_images

# Axes along which a set has no preferred direction, so that training may flip its images.
FLIP_AXES: dict[str, tuple[int, ...]] = {"elpv": (-1, -2), "shapes": (-1,)}
DEFAULT_CATEGORIES = {"elpv": "mono", "shapes": "disc", "digits": "all"}
LICENCES = {"elpv": "CC BY-NC-SA 4.0", "shapes": "CC0 1.0", "digits": "CC BY 4.0"}
CALIBRATION_FOLDERS = ("calibration", "validation")


@dataclass
class Source:
    """What a reader finds, before splitting and resizing. Images are paths or uint8 (C, H, W).

    Attributes:
        category: the category read.
        normals: name -> normal image without a fixed role.
        shares: of ``normals`` that go to calibration and to the test; training has the rest.
        calibration: name -> normal image that the source itself keeps for calibration.
        test: name -> test image that the source itself fixes.
        defect_types: name -> ``"good"`` or a defect type, for the images of ``test``.
        masks: name -> mask, a path or bool (H, W).
        uncertain: name -> image without a usable label.
        remarks: known faults and shortcuts, for people.
    """

    category: str
    normals: dict[str, Any]
    shares: tuple[float, float]
    calibration: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Any] = field(default_factory=dict)
    defect_types: dict[str, str] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)
    uncertain: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


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
    ``ground_truth/<defect>/<stem>_mask.png`` (or ``<stem>.png``); ``calibration/good`` or
    ``validation/good`` is used when there.
    """
    if root is None:
        raise ValueError("data set 'folder' needs root=, the folder of your images (--root DIR)")
    if not root.is_dir():
        fault = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"the folder {root} {fault}; --root takes a folder of images")
    base = root / category if category else root
    if not base.is_dir():
        folders = [p.name for p in root.iterdir() if p.is_dir()]
        raise unknown_name(f"category in {root}", str(category), folders)
    if not (base / "train" / "good").is_dir():
        return _loose_folder(base, category or base.name)
    normals = _named(base / "train" / "good", "train/")
    if not normals:
        good = base / "train" / "good"
        raise ValueError(f"{good} holds no images ({_suffixes()}); put normal images there")
    source = Source(category or base.name, normals, (0.2, 0.0))
    for name in CALIBRATION_FOLDERS:
        if not source.calibration and (base / name / "good").is_dir():
            source.calibration = _named(base / name / "good", f"{name}/")
    for folder in sorted(p for p in (base / "test").glob("[!.]*") if p.is_dir()):
        for name, path in _named(folder).items():
            source.test[name] = path
            source.defect_types[name] = folder.name
            if folder.name != "good":
                source.masks[name] = _mask_file(base / "ground_truth" / folder.name, path.stem)
    if "good" not in source.defect_types.values():
        source.shares = (0.2, 0.2)
    return source


def _loose_folder(base: Path, category: str) -> Source:
    """Normal images without any layout: good for training and planted defects."""
    normals = _named(base, "good/")
    if not normals:
        inside = ", ".join(sorted(p.name for p in base.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{base} has neither train/good (MVTec layout) nor images in it ({_suffixes()}); put "
            f"normal images there, or give another folder; it holds: {inside}"
        )
    return Source(category, normals, (0.2, 0.2))


def _suffixes() -> str:
    return "png, jpg, bmp, tif or webp files"


def _named(folder: Path, prefix: str | None = None) -> dict[str, Path]:
    """Name -> path of the images in a folder; two files of one stem keep their suffixes."""
    prefix = f"{folder.name}/" if prefix is None else prefix
    paths = list_images(folder)
    stems = [p.stem for p in paths]
    return {prefix + (p.stem if stems.count(p.stem) == 1 else p.name): p for p in paths}


def _mask_file(folder: Path, stem: str) -> Path | None:
    candidates = (folder / f"{stem}_mask.png", folder / f"{stem}.png")
    return next((p for p in candidates if p.is_file()), None)


SHAPES_SIZE = 64
SHAPES_KINDS = ("dent", "scratch", "stain", "missing", "second", "misplaced")


def read_shapes(category: str | None, root: Path | None) -> Source:
    """A made scene: a disc with a hole resting at the centre of a striped tray, grey, 64x64.

    Structural defects change the texture somewhere (dent, scratch, stain); logical ones keep
    every neighbourhood plausible and break the scene (object missing, a second one, misplaced).
    """
    category = category or DEFAULT_CATEGORIES["shapes"]
    if category != "disc":
        raise unknown_name("shapes category", category, ("disc",))
    normals = {f"good/{i:03d}": draw_shape("good", i)[0] for i in range(300)}
    source = Source(category, normals, (0.2, 0.2))
    for kind in SHAPES_KINDS:
        for i in range(15):
            name = f"{kind}/{i:03d}"
            source.test[name], source.masks[name] = draw_shape(kind, i)
            source.defect_types[name] = kind
    return source


def draw_shape(kind: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene of ``shapes``: image uint8 (1, 64, 64) and the mask of what is wrong."""
    number = 0 if kind == "good" else 1 + SHAPES_KINDS.index(kind)
    rng = np.random.default_rng([number, index])
    y, x = np.mgrid[:SHAPES_SIZE, :SHAPES_SIZE].astype(np.float64)
    tray = 0.35 + 0.08 * np.sin(2 * np.pi * (y + rng.uniform(0, 8)) / 8)
    cy, cx = 32 + rng.uniform(-2, 2, 2)
    radius, shade = rng.uniform(10, 12), rng.uniform(0.75, 0.85)
    angle = rng.uniform(0, 2 * np.pi)

    def disc(cy: float, cx: float) -> np.ndarray:
        distance = np.hypot(y - cy, x - cx)
        return np.clip(radius - distance, 0, 1) * np.clip(distance - 3, 0, 1)  # with its hole

    normal = tray + disc(cy, cx) * (shade - tray)
    scene = normal.copy()
    if kind in ("missing", "misplaced"):
        scene = tray.copy()
    if kind in ("second", "misplaced"):
        corner_y, corner_x = rng.choice([13, 51], 2) + rng.uniform(-1, 1, 2)
        alpha = disc(corner_y, corner_x)
        scene = scene + alpha * (shade - tray)
    py, px = cy + 0.8 * radius * np.sin(angle), cx + 0.8 * radius * np.cos(angle)
    if kind == "dent":
        scene = np.where(np.hypot(y - py, x - px) < rng.uniform(3, 5), tray, scene)
    if kind == "stain":
        spot = np.exp(-((y - py) ** 2 + (x - px) ** 2) / (2 * rng.uniform(2, 3.5) ** 2))
        scene = scene - 0.4 * spot
    if kind == "scratch":
        along = (y - py) * np.sin(angle + 1) + (x - px) * np.cos(angle + 1)
        across = (y - py) * np.cos(angle + 1) - (x - px) * np.sin(angle + 1)
        scene = scene + 0.35 * (np.abs(across) < 0.8) * (np.abs(along) < rng.uniform(6, 10))
    mask = np.abs(scene - normal) > 0.03
    noisy = scene + 0.02 * rng.standard_normal(scene.shape)
    return (noisy.clip(0, 1) * 255).round().astype(np.uint8)[None], mask


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
    "shapes": read_shapes,
    "digits": read_digits,
}
