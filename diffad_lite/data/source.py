"""What a reader returns: the images of a data set, before they are split, resized or opened."""

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffad_lite.core.config import short_repr, unknown_name
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
        notices: what the reader assumed or left out, one sentence each, for a warning.
        bits: depth of grey images of more than 8 bits, see :mod:`diffad_lite.data.depth`.
    """

    category: str
    normals: dict[str, Any]
    fractions: tuple[float, float]
    calibration: dict[str, Any] = field(default_factory=dict)
    test: dict[str, Labelled] = field(default_factory=dict)
    uncertain: dict[str, Any] = field(default_factory=dict)
    subjects: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    notices: list[str] = field(default_factory=list)
    bits: int = 16

    @property
    def images(self) -> dict[str, Any]:
        """All images with a certain label, by name."""
        return self.normals | self.calibration | {n: t.image for n, t in self.test.items()}

    def add_test(self, defect_type: str, stem: str, image: Any, mask: Any = None) -> None:
        """Add a test image; ``defect_type`` is "good" for a normal one.

        Raises:
            ValueError: another test image has this name.
        """
        add_name(self.test, f"{defect_type}/{stem}", Labelled(image, defect_type, mask))

    def add_normal(self, name: str, image: Any) -> None:
        """Add a normal image without a fixed role; raise ValueError if the name is taken."""
        add_name(self.normals, name, image)


def add_name(images: dict[str, Any], name: str, image: Any) -> None:
    """Add an image to a part of a data set; raise ValueError if its name is taken."""
    if name in images:
        where = getattr(image, "image", image)
        where = f", e.g. {where}" if isinstance(where, Path) else ""
        raise ValueError(f"two images have the name {name}{where}; rename one of them")
    images[name] = image


def count_of(items: Collection[Any], noun: str) -> str:
    """Return the number of items with a noun, as in "1 mask", "3 masks" and "2 files of ..."."""
    first, *rest = noun.split(" of ")
    return " of ".join([f"{len(items)} {first}{'' if len(items) == 1 else 's'}", *rest])


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


def require_category(what: str, category: str | None, known: Collection[str]) -> str:
    """Return the category; raise ValueError with the choices if it is missing or unknown."""
    if category is None:
        raise ValueError(f"{what} is missing; choose --category {join_or(sorted(known))}")
    if category not in known:
        raise unknown_name(what, category, known)
    return category


def join_or(words: Iterable[str]) -> str:
    """Return "a, b or c"."""
    *most, final = [*words] or ["none"]
    return f"{', '.join(most)} or {final}" if most else final


def check_inside(name: str, what: str) -> None:
    """Check that a path from a table or a command line stays inside its folder.

    Raises:
        ValueError: it is absolute, or contains ``..`` or a null character.
    """
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{what} must lie inside its folder, got {short_repr(name)}")


def walk_folders(folder: Path) -> list[Path]:
    """Return a folder and its sub-folders, sorted, without hidden and without linked ones."""

    def refuse(error: OSError) -> None:
        raise error

    folders = []
    for parent, names, _ in os.walk(folder, onerror=refuse):
        names[:] = sorted(name for name in names if not name.startswith("."))
        folders.append(Path(parent))
    return folders


def walk_images(folder: Path) -> list[Path]:
    """Return the image files of a folder, then those of its sub-folders."""
    return [path for place in walk_folders(folder) for path in list_images(place)]


def name_images(paths: Iterable[Path], folder: Path, prefix: str = "") -> dict[str, Path]:
    """Return images in ``folder`` by stem, or by file name where two files share a stem.

    The name of an image in a sub-folder begins with the sub-folder: ``camera-000``.

    Raises:
        ValueError: two images would have the same name.
    """
    places = {path: path.relative_to(folder).parts[:-1] for path in paths}
    stems = {path: "-".join((*place, path.stem)) for path, place in places.items()}
    files = {path: "-".join((*place, path.name)) for path, place in places.items()}
    counts = Counter(stems.values())
    taken = {files[path] for path in places if counts[stems[path]] > 1}
    images: dict[str, Path] = {}
    for path, stem in stems.items():
        is_unique = counts[stem] == 1 and stem not in taken
        add_name(images, prefix + (stem if is_unique else files[path]), path)
    return images
