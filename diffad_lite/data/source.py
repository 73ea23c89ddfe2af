"""What a reader finds in a data set, before anything is split, resized or even opened."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffad_lite.core.config import short_repr
from diffad_lite.data.images import list_images

DEFAULT_CATEGORIES = {"elpv": "mono", "medmnist": "pneumoniamnist"}
DEFAULT_CATEGORIES |= {"shapes": "disc", "digits": "all"}


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
        subjects: name -> whose image it is, where that is known; a split keeps them together.
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
    subjects: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def existing_root(root: Path | None, name: str, what: str, takes: str = "") -> Path:
    """``root``, if it is a folder.

    Args:
        root: what the user gave.
        name: the data set.
        what: that it needs there, for people.
        takes: the same in other words, for a root that is no folder; default ``what``.

    Raises:
        ValueError: none was given.
        FileNotFoundError: it does not exist, or is a file.
    """
    if root is None:
        raise ValueError(f"data set {name!r} needs root=, {what} (--root DIR)")
    if not root.is_dir():
        fault = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"the folder {root} {fault}; --root takes {takes or what}")
    return root


def check_inside(name: str, what: str) -> None:
    """Check that a name out of a file or a command leads to no place outside its folder.

    Raises:
        ValueError: it is absolute, or goes up.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{what} must lie inside its folder, got {short_repr(name)}")


def named_images(folder: Path, prefix: str) -> dict[str, Path]:
    """Name -> path of the images in a folder; two files of one stem keep their suffixes."""
    paths = list_images(folder)
    stems = [p.stem for p in paths]
    return {prefix + (p.stem if stems.count(p.stem) == 1 else p.name): p for p in paths}
