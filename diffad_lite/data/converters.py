"""Convert MVTec AD 2 and Real-IAD, as they are unpacked, to the layout that ``folder`` reads."""

import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffad_lite.core.config import convert, short_repr, unknown_name
from diffad_lite.core.files import read_json, staged, write_rows
from diffad_lite.data.folder_reader import GOOD
from diffad_lite.data.images import list_images, names_image
from diffad_lite.data.masks import MASK_FOLDERS
from diffad_lite.data.source import (
    Source,
    add_name,
    check_inside,
    count_of,
    require_category,
    require_root,
)

DATASETS = ("mvtec_ad_2", "real_iad")
KIND = re.compile(r"\w([\w -]*\w)?")  # of a defect; it becomes the name of a folder


def convert_dataset(
    name: str,
    root: str | Path,
    category: str | None,
    out: str | Path,
    *,
    splits: str | Path | None = None,
) -> Path:
    """Write one category to ``<out>/<category>`` in MVTec AD layout; return that folder.

    Files are hard links to those in ``root``, so they need no space; they are copies where the file
    system has no such links, for example on another disk. The folder is written as a whole or, on
    an error, not at all. Masks are not opened: :func:`~diffad_lite.data.datasets.load_dataset`
    refuses one of another size than its image.

    Args:
        name: ``mvtec_ad_2`` or ``real_iad``.
        root: folder with one folder for each category, as unpacked.
        category: one of them.
        out: where to write.
        splits: of Real-IAD, folder of the JSON files; None for the one beside ``root``.

    Raises:
        FileNotFoundError: ``root``, the JSON file, an image or a mask does not exist.
        ValueError: unknown name or category; the JSON file is invalid; the output exists already.
    """
    root, out = Path(root), Path(out)
    if name not in DATASETS:
        raise unknown_name("data set to convert", name, DATASETS)
    if name == "real_iad":
        source = _read_real_iad(root, category, None if splits is None else Path(splits))
    elif splits is not None:
        raise ValueError(f"splits are JSON files of real_iad, and {name} has none; leave them out")
    else:
        source = _read_mvtec_ad_2(root, category)
    folder = out / source.category
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it, or choose another output folder")
    _write(source, out)
    for notice in source.notices:
        warnings.warn(notice, stacklevel=2)
    return folder


def _read_mvtec_ad_2(root: Path, category: str | None) -> Source:
    """Read the public part of MVTec AD 2 (Heckler-Kram et al. 2025), CC BY-NC-SA 4.0.

    ``train/good``, ``validation/good`` for calibration, ``test_public/good`` and ``/bad``. Masks
    are ``test_public/ground_truth/bad/<stem>_mask.png``. The private sets have no labels.
    """
    require_root(root, "mvtec_ad_2", "the folder with can/, fabric/ and so on")
    known = [path.name for path in root.iterdir() if (path / "test_public").is_dir()]
    category = require_category(f"mvtec_ad_2 category in {root}", category, known)
    base, test = root / category, root / category / "test_public"
    source = Source(category, {}, (0.2, 0.0))
    for path in _images_in(base / "train" / "good"):
        source.add_normal(f"train/{path.stem}", path)
    for path in _images_in(base / "validation" / "good"):
        add_name(source.calibration, f"validation/{path.stem}", path)
    for path in _images_in(test / "good"):
        source.add_test("good", path.stem, path)
    for path in _images_in(test / "bad"):
        mask = test / "ground_truth" / "bad" / f"{path.stem}_mask.png"
        source.add_test("bad", path.stem, path, mask)
    return source


def _images_in(folder: Path) -> list[Path]:
    """Return the images of a folder that must have some."""
    paths = list_images(folder) if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"no images in {folder}; unpack the whole archive again")
    return paths


def _read_real_iad(root: Path, category: str | None, splits: Path | None) -> Source:
    """Read Real-IAD (Wang et al. 2024), with the split of a JSON file.

    The file has ``meta`` (``normal_class``, and ``prefix``, the folder of the category), ``train``
    and ``test``: lists of ``anomaly_class``, ``image_path``, ``mask_path``. The views of one object
    lie in one folder, such as ``OK/S0001``, and are one subject.
    """
    require_root(root, "real_iad", "the folder of one size, such as realiad_1024")
    splits = _find_splits(root, splits)
    known = [path.stem for path in splits.glob("*.json")]
    category = require_category(f"real_iad category in {splits}", category, known)
    path = splits / f"{category}.json"
    values = convert(read_json(path, "split of Real-IAD"), dict[str, Any], str(path))
    meta = convert(values.get("meta"), dict[str, Any], f"{path}.meta")
    normal_class = convert(meta.get("normal_class"), str, f"{path}.meta.normal_class")
    prefix = convert(meta.get("prefix", category), str, f"{path}.meta.prefix")
    check_inside(prefix, f"prefix in {path}")
    source = Source(category, {}, (0.2, 0.0))
    for part in ("train", "test"):
        entries = convert(values.get(part), list[dict[str, str | None]], f"{path}.{part}")
        for i, entry in enumerate(entries):
            _add_entry(source, root / prefix, part, entry, normal_class, f"{path}.{part}[{i}]")
    files = Counter(source.images.values())
    if repeated := [file for file, times in files.items() if times > 1]:
        raise ValueError(f"{path} has {repeated[0]} twice; an image must be in one part, once")
    _separate_subjects(source)
    return source


def _find_splits(root: Path, splits: Path | None) -> Path:
    """Return the folder of the JSON files: by default those of the split over all views.

    Archives unpack them to ``realiad_jsons`` beside ``root``, or to a folder of that name in it.
    """
    beside = root.absolute().parent / "realiad_jsons"
    places = [beside / "realiad_jsons", beside] if splits is None else [splits]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"no folder {places[-1]} with the split; unpack realiad_jsons beside {root.name}, or name "
        "its folder (--splits DIR)"
    )


def _add_entry(
    source: Source,
    folder: Path,
    part: str,
    entry: dict[str, str | None],
    normal_class: str,
    where: str,
) -> None:
    """Add one image of a split of Real-IAD."""
    kind, image, mask = (entry.get(key) for key in ("anomaly_class", "image_path", "mask_path"))
    if not kind or not image:
        raise ValueError(f"{where} must have anomaly_class and image_path, got {short_repr(entry)}")
    for name in (image, mask or ""):
        check_inside(name, where)
    path = folder / image
    if not names_image(path):
        raise ValueError(f"{where}.image_path must name an image file, got {image!r}")
    is_normal = kind == normal_class
    reserved = (*GOOD, *MASK_FOLDERS)
    if not is_normal and (not KIND.fullmatch(kind) or kind.lower() in reserved):
        raise ValueError(f"{where}.anomaly_class cannot name a folder of defects, got {kind!r}")
    if part == "train" and not is_normal:
        raise ValueError(
            f"{where} is anomalous ({kind}): this is a noisy split, and training images must be "
            "normal here; take the split realiad_jsons or realiad_jsons_sv"
        )
    if part == "train":
        name = f"train/{path.stem}"
        source.add_normal(name, path)
    else:
        kind = "good" if is_normal else kind
        name = f"{kind}/{path.stem}"
        source.add_test(kind, path.stem, path, folder / mask if mask and not is_normal else None)
    place = Path(image).parent.as_posix()
    source.subjects[name] = path.stem if place == "." else place


def _separate_subjects(source: Source) -> None:
    """Keep a published split that has views of one object on both sides; say so in a notice."""
    subjects = source.subjects
    train, test = ({subjects[name] for name in part} for part in (source.normals, source.test))
    if shared := sorted(train & test):
        source.notices.append(
            f"{count_of(shared, 'object')} with views in train and in test, e.g. {shared[0]}; the "
            "published split is kept, and these views count as different objects"
        )
        for name in source.normals:
            if subjects[name] in shared:
                subjects[name] += " (train)"


def _write(source: Source, out: Path) -> None:
    """Link the files of a source into ``<out>/<category>``; write ``subjects.csv``."""
    images = {name: f"train/good/{Path(name).name}" for name in source.normals}
    images |= {name: f"validation/good/{Path(name).name}" for name in source.calibration}
    images |= {name: f"test/{name}" for name in source.test}
    targets = {f"{images[name]}{path.suffix}": path for name, path in source.images.items()}
    masks = {name: item.mask for name, item in source.test.items() if item.mask is not None}
    targets |= {f"ground_truth/{name}_mask{path.suffix}": path for name, path in masks.items()}
    _check_files(targets.values(), source.category)
    _check_names(targets)
    rows = [
        (f"{images[name]}{source.images[name].suffix}", subject)
        for name, subject in source.subjects.items()
    ]
    with staged(out) as stage:
        for target, path in targets.items():
            place = stage / source.category / target
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(path, place)
        if rows:
            write_rows(stage / source.category / "subjects.csv", rows)


def _check_files(paths: Collection[Path], category: str) -> None:
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} images and masks of {category} do not exist, e.g. "
            f"{missing[0]}; unpack the whole archive again"
        )


def _check_names(targets: Collection[str]) -> None:
    """Raise ValueError for targets that are one file where capitals do not count."""
    names: dict[str, str] = {}
    for target in targets:
        if (known := names.setdefault(target.casefold(), target)) != target:
            raise ValueError(f"{known} and {target} differ in capitals only; rename one of them")


def _link(path: Path, place: Path) -> None:
    """Make a hard link; a copy where the file system has none."""
    try:
        os.link(path.resolve(), place)
    except FileExistsError:  # never write through a link into the original
        raise
    except OSError:
        shutil.copyfile(path, place)
