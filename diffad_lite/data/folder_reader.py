"""Read a folder of images in MVTec layout, or a folder of normal images.

Whatever is understood in another way than the layout says, or is not read, becomes a notice.
"""

import os
from collections import Counter
from pathlib import Path

from diffad_lite.core.config import short_repr, unknown_name
from diffad_lite.core.files import read_rows
from diffad_lite.data.formats import describe_foreign, foreign_format
from diffad_lite.data.images import IMAGE_SUFFIXES, list_images
from diffad_lite.data.masks import (
    MASK_ENDING,
    MASK_FOLDERS,
    MaskIndex,
    is_mask_beside,
    without_masks,
)
from diffad_lite.data.source import (
    Source,
    add_name,
    count_of,
    join_or,
    name_images,
    require_root,
    walk_folders,
    walk_images,
)

CALIBRATION_FOLDERS = ("calibration", "validation")
GOOD = ("good", "normal", "ok")  # names of folders with normal images, in any case of letters
FILE_TYPES = "png, jpg, bmp, tif or webp files, or stacks in npy"


def read_folder(category: str | None, root: Path | None) -> Source:
    """Read a folder in MVTec layout, or a folder that simply holds normal images.

    MVTec layout: ``train/good``, ``test/good``, ``test/<defect>``, and masks at
    ``ground_truth/<defect>/<stem>_mask.png`` (or ``<stem>.png``, or all files of a folder
    ``<stem>``); ``calibration/good`` or ``validation/good`` is used if it exists. MVTec AD,
    MVTec LOCO, MPDD, PCB-Bank and BTAD have this layout. ``normal`` and ``ok`` mean ``good``, in
    any case of letters, and sub-folders of all these folders are read, too. ``subjects.csv``, lines
    of ``file,subject`` with files relative to the category's folder, names the patient, part or
    wafer of each image.
    """
    root = require_root(root, "folder", "a folder of images")
    base = root / category if category else root
    if not base.is_dir():
        raise unknown_name(f"category in {root}", str(category), [p.name for p in _folders(root)])
    masks = MaskIndex()
    if (normals := _read_normals(base, "train")) is None:
        source = _read_loose_folder(base, category)
    else:
        source = Source(category or base.name, normals, (0.2, 0.0))
        for name in CALIBRATION_FOLDERS:
            source.calibration = source.calibration or _read_normals(base, name) or {}
        _read_test(base, source, masks)
        source.notices += _describe_places(base, source)
    source.notices += _describe_unread(base, source, masks)
    source.subjects = _read_subjects(base, source)
    return source


def _folders(folder: Path) -> list[Path]:
    """Return the sub-folders, sorted, without hidden ones."""
    return sorted(p for p in folder.glob("[!.]*") if p.is_dir())


def _sub_folder(folder: Path, name: str) -> Path | None:
    """Return the sub-folder of this name, in any case of letters, if there is one."""
    folders = [p for p in _folders(folder) if p.name.lower() == name]
    return min(folders, key=lambda p: p.name != name, default=None)


def _good_folders(folder: Path) -> list[Path]:
    """Return the sub-folders of normal images, ``good`` first."""
    folders = [p for p in _folders(folder) if p.name.lower() in GOOD]
    return sorted(folders, key=lambda p: GOOD.index(p.name.lower()))


def _read_normals(base: Path, part: str) -> dict[str, Path] | None:
    """Return the normal images of a part by name, or None if the part has none.

    Images that lie directly in the part are taken if it has no folder of normal images.
    """
    if (folder := _sub_folder(base, part)) is None:
        return None
    good = _good_folders(folder)
    if not good:
        return name_images(without_masks(list_images(folder)), folder, f"{part}/") or None
    images: dict[str, Path] = {}
    for place in good:
        prefix = f"{part}/" if place == good[0] else f"{part}/{place.name}-"
        for name, path in name_images(without_masks(walk_images(place)), place, prefix).items():
            add_name(images, name, path)
    if not images:
        fault = f"{good[0]} holds no images ({FILE_TYPES}); put normal images there"
        raise ValueError(f"{fault}{describe_foreign(good[0])}")
    return images


# --------------------------------------------------------------------------------- the test


def _read_test(base: Path, source: Source, masks: MaskIndex) -> None:
    """Add the images of the folder ``test``, one sub-folder for each kind, with their masks."""
    test = _sub_folder(base, "test")
    _index_mask_folders(base, masks)
    if test is not None:
        _index_mask_folders(test, masks)
        kinds = [p for p in _folders(test) if p.name.lower() not in MASK_FOLDERS]
        images = {folder: _sort_images(folder, masks) for folder in kinds}
        for folder in kinds:
            _add_kind(folder, images[folder], source, masks)
    defects = {item.defect_type for item in source.test.values()} - {"good"}
    if all(item.defect_type != "good" for item in source.test.values()):
        source.fractions = (0.2, 0.2)
        if defects:
            source.notices.append(
                f"{test} has no folder of normal images ({', '.join(GOOD)}), so a fifth of the "
                "normal training images is held out for the test; these folders count as defects: "
                f"{', '.join(sorted(defects)[:4])}"
            )


def _index_mask_folders(folder: Path, masks: MaskIndex) -> None:
    """Index the masks in ``ground_truth`` and the like, one sub-folder for each kind."""
    for place in _folders(folder):
        if place.name.lower() in MASK_FOLDERS:
            for path in list_images(place):
                masks.add(path, ("",))
            for kind in _folders(place):
                masks.add_folder(kind)


def _sort_images(folder: Path, masks: MaskIndex) -> dict[Path, tuple[str, ...]]:
    """Return the images of one kind with their sub-folders; index the masks among them."""
    images = {}
    paths = walk_images(folder)
    stems = {(path.parent, path.stem) for path in paths}
    for path in paths:
        parts = path.relative_to(folder).parts[:-1]
        place = (folder.name, *(part for part in parts if part.lower() not in MASK_FOLDERS))
        if len(place) <= len(parts) or is_mask_beside(path, stems):
            masks.add(path, place)
            continue
        if folder.name.lower() not in GOOD and any(part.lower() in GOOD for part in parts):
            raise ValueError(
                f"{folder} holds a folder of normal images ({'/'.join(parts)}), so the class of "
                f"its images is not clear; move normal images to {folder.parent / 'good'}, and "
                "each kind of defect into a folder beside it"
            )
        images[path] = place
        masks.images.add(masks.key(place, path.stem))
    return images


def _add_kind(
    folder: Path, images: dict[Path, tuple[str, ...]], source: Source, masks: MaskIndex
) -> None:
    """Add the test images of one folder."""
    good = _good_folders(folder.parent)
    kind = "good" if folder in good else folder.name
    prefix = f"{folder.name}-" if folder in good[1:] else ""
    for name, path in name_images(images, folder, prefix).items():
        source.add_test(kind, name, path, masks.find(images[path], path.stem))


# ------------------------------------------------------------------------------- the notices


def _describe_places(base: Path, source: Source) -> list[str]:
    """Return notices about images that were read from other places than the layout names."""
    notices, deeper, direct, good = [], [], [], {}
    for name, path in source.images.items():
        part, *parts = path.relative_to(base).parts[:-1]
        is_normal = name not in source.test or source.test[name].defect_type == "good"
        if not parts:
            direct.append(path)
        elif is_normal and parts[0] != "good":
            good[f"{part}/{parts[0]}"] = path
        if len(parts) > 1:
            deeper.append(path)
    if good:
        notices.append(f"images in {', '.join(good)} are taken as normal")
    if direct:
        notices.append(
            f"{count_of(direct, 'image')} directly in {direct[0].parent}, e.g. {direct[0].name}, "
            "taken as normal"
        )
    stems = Counter((path.parent, path.stem) for path in source.images.values())
    if twice := [folder / stem for (folder, stem), count in stems.items() if count > 1]:
        notices.append(
            f"{count_of(twice, 'name')} of several files, e.g. {twice[0]}.*; each is read as an "
            "image of its own: move masks to ground_truth, and remove copies"
        )
    if deeper:
        notices.append(
            f"{count_of(deeper, 'image')} in deeper sub-folders, e.g. "
            f"{deeper[0].relative_to(base)}, read as images of the folder above"
        )
    return notices


def _describe_unread(base: Path, source: Source, masks: MaskIndex) -> list[str]:
    """Return notices about masks of no image, masks beside images, and files not read."""
    notices = []
    if unmatched := masks.unmatched():
        notices.append(
            f"{count_of(unmatched, 'mask')} of no test image, e.g. {unmatched[0]}; the mask of "
            "test/crack/000.png is ground_truth/crack/000_mask.png"
        )
    beside = [path for path in masks.paths() if path.relative_to(base).parts[0].lower() == "test"]
    if beside:
        notices.append(
            f"{count_of(beside, 'file')} among the test images, e.g. {beside[0]}, taken as masks"
        )
    read = {*source.images.values(), *masks.paths()}
    fixes = {
        "image": "only train/good, test/good, test/<defect> and their sub-folders are read, or "
        "images directly in a folder without these",
        "mask": "only masks of test images are",
        "linked folder": "copy its images, or link each of them",
        "file of another format": "",
    }
    for what, paths in _find_unread(base, read).items():
        fix = fixes[what] or foreign_format(paths[0])
        notices.append(f"{count_of(paths, what)} not read, e.g. {paths[0]}; {fix}")
    return notices


def _find_unread(base: Path, read: set[Path]) -> dict[str, list[Path]]:
    """Return the files that were not read but look like images, by what they are."""
    unread: dict[str, list[Path]] = {}
    folders = {parent for path in read for parent in path.parents}
    for folder in walk_folders(base):
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if name.startswith(".") or path in read or path in folders:
                continue
            if path.is_symlink() and path.is_dir():
                unread.setdefault("linked folder", []).append(path)
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                what = "mask" if MASK_ENDING.search(path.stem) else "image"
                unread.setdefault(what, []).append(path)
            elif foreign_format(path):
                unread.setdefault("file of another format", []).append(path)
    return unread


# -------------------------------------------------------------------- subjects, loose folders


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


def _read_loose_folder(base: Path, category: str | None) -> Source:
    """Read normal images without any layout, for training and planted defects."""
    if categories := [p.name for p in _folders(base) if _sub_folder(p, "train")]:
        inside = [f"{category}/{name}" if category else name for name in categories]
        raise ValueError(
            f"{base} holds one folder for each category; choose --category {join_or(inside)}"
        )
    normals = name_images(without_masks(list_images(base)), base, "good/")
    if not normals:
        content = ", ".join(sorted(p.name for p in base.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{base} has neither train/good (MVTec layout) nor images in it ({FILE_TYPES}); put "
            f"normal images there, or give another folder{describe_foreign(base)}; it holds: "
            f"{content}"
        )
    return Source(category or base.name, normals, (0.2, 0.2))
