"""What a reader returns: the images of a data set, before they are split, resized or opened."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffad_lite.core.config import short_repr
from diffad_lite.data.images import list_images

DEFAULT_CATEGORIES = {"elpv": "mono", "medmnist": "pneumoniamnist"}
DEFAULT_CATEGORIES |= {"shapes": "disc", "digits": "all"}


class Labelled(NamedTuple):
    """A test image.

    ``image`` is a path or uint8 (C, H, W). ``mask`` is a path, one path per defect, bool (H, W), or
    None where it is not known.
    """

    image: Any
    defect_type: str = "good"
    mask: Any = None


@dataclass
class Source:
    """Images of one category by name; an image is a path or uint8 (C, H, W).

    Attributes:
        category: the category read.
        normals: normal images without a fixed role.
        fractions: of ``normals`` for calibration and for the test; the others are for training.
        calibration: normal images that the data set itself reserves for calibration.
        test: images of the data set's own test set, by ``<defect type>/<file stem>``.
        uncertain: images without a usable label.
        subjects: the patient, part or wafer of an image, if known; a split keeps each together.
        remarks: known faults and shortcuts, for readers of the results.
    """

    category: str
    normals: dict[str, Any]
    fractions: tuple[float, float]
    calibration: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Labelled] = field(default_factory=dict)
    uncertain: dict[str, Any] = field(default_factory=dict)
    subjects: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def images(self) -> dict[str, Any]:
        """All images with a certain label, by name."""
        return self.normals | self.calibration | {n: t.image for n, t in self.test.items()}

    def add_test(self, defect_type: str, stem: str, image: Any, mask: Any = None) -> None:
        """Add a test image; ``defect_type`` is "good" for a normal one."""
        self.test[f"{defect_type}/{stem}"] = Labelled(image, defect_type, mask)


def require_root(root: Path | None, dataset: str, content: str) -> Path:
    """Return ``root``, the folder of a data set; ``content`` tells the user what it must hold.

    Raises:
        ValueError: no root was given.
        FileNotFoundError: it does not exist, or is a file.
    """
    if root is None:
        raise ValueError(f"data set {dataset!r} needs root=, {content} (--root DIR)")
    if not root.is_dir():
        fault = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"the folder {root} {fault}; --root takes {content}")
    return root


def check_inside(name: str, what: str) -> None:
    """Check that a path from a table or a command line stays inside its folder.

    Raises:
        ValueError: it is absolute, or contains ``..`` or a null character.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{what} must lie inside its folder, got {short_repr(name)}")


def name_images(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Return the images of a folder by stem, or by file name where two files share a stem."""
    paths = list_images(folder)
    stems = [p.stem for p in paths]
    return {prefix + (p.stem if stems.count(p.stem) == 1 else p.name): p for p in paths}
