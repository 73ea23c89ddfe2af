"""Records of runs: reading them, grouping their seeds, comparing two settings image by image."""

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffad_lite.core.config import config_hash, convert
from diffad_lite.core.files import read_json, read_rows, write_atomically
from diffad_lite.evaluation.metrics import bootstrap_auroc, paired_bootstrap_auroc

Result = dict[str, Any]
Key = tuple[str, str, int, str]  # method, variant, image size, training
METHOD_NAMES = {
    "brightness": "brightness (control)",
    "mean_image": "mean image",
    "pca": "PCA residual",
    "padim": "PaDiM",
    "bank": "patch bank",
    "anoddpm": "AnoDDPM, Gaussian noise",
    "anoddpm_simplex": "AnoDDPM, simplex noise",
    "diffusionad": "DiffusionAD",
    "glad": "GLAD",
    "mdps": "MDPS",
    "bernoulli": "masked Bernoulli",
    "grad": "GRAD-style",
}
VARIANTS = ("raw", "default", "calibrated")  # first in tables, in this order
# What tables need of a record; its other fields are as they are.
WORDS = ("method", "dataset", "category", "resize", "profile", "variant", "training")
NUMBERS = ["image_auroc", "image_ap", "f1_at_normal_threshold", "false_alarms_at_normal_threshold"]
NUMBERS += ["train_seconds", "train_steps", "ms_per_image", "network_evaluations_per_image"]
MASKED = ("pixel_auroc", "pixel_ap", "aupro", "dice_oracle")  # None where no mask is known
FORMS: dict[str, Any] = dict.fromkeys(WORDS, str) | dict.fromkeys(NUMBERS, float)
FORMS |= dict.fromkeys(MASKED, float | None) | {"plant": str | None, "seed": int, "image_size": int}
FORMS |= {"config": dict[str, Any], "per_defect": dict[str, dict[str, float | None]]}
# Arrays of an archive of scores -> the field of a record that says which.
ARRAYS = dict.fromkeys(("id", "label", "defect_type"), "test_set") | {"image_score": "scores"}
SPEED = {"ms": tuple[float, ...], "mb": float, "evaluations": float, "parameters": int}


def read_results(folder: str | Path) -> list[Result]:
    """Read all records of a folder: its ``<grid>.jsonl``, and each run's ``result.json`` below it.

    A record is a mapping with two more keys: ``name``, its run's place below the folder, such as
    ``pca/elpv-mono/s0/raw``, and ``file``, where it was read. Of records with one name in one file
    the last counts, so that a line may simply be appended.

    Raises:
        FileNotFoundError: none there.
        ValueError: one is broken, which is named; or two files have a record of one name.
    """
    folder = Path(folder)
    found: dict[str, Result] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for name, result in _read_lines(path).items():
            if name in found:
                raise _twice(name, path, found[name]["file"])
            found[name] = result
    for path in sorted(folder.rglob("result.json")):
        name = path.parent.relative_to(folder).as_posix()
        if name in found:
            raise _twice(name, path, found[name]["file"])
        fix = f"{path} is incomplete; run 'diffad evaluate' again"
        found[name] = _checked(read_json(path, "result"), path, name, fix)
    if not found:
        what = "no <grid>.jsonl in it and no result.json below it"
        raise FileNotFoundError(f"{folder} has no records ({what}); run 'diffad evaluate' first")
    return [found[name] for name in sorted(found, key=lambda name: name.split("/"))]


def _twice(name: str, path: Path, other: Path) -> ValueError:
    return ValueError(f"{path} and {other} both hold {name}; remove one of them")


def _read_lines(path: Path) -> dict[str, Result]:
    """Name -> record of a file with one record a line; a last line cut short is left out."""
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); restore it") from None
    for number, line in enumerate(lines, 1):
        where = f"line {number} of {path}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no line break behind it: the writing was interrupted
                warnings.warn(f"{where} is cut short and left out", stacklevel=3)
                continue
            raise ValueError(f"{where} is not JSON ({str(error)[:200]}); delete it") from None
        name = values.get("name") if isinstance(values, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"{where} has no name; delete it, or collect that run again")
        fix = f"{where} is incomplete; collect that run again by 'diffad report --runs'"
        found[name] = _checked(values, path, name, fix)
        _check_forms(values, dict.fromkeys(ARRAYS.values(), str), f"{fix}: its record")
    return found


def _checked(values: Any, path: Path, name: str, fix: str) -> Result:
    """Add what records of older versions lack; raise ValueError for what no record has."""
    if not isinstance(values, dict) or "image_auroc" not in values:
        raise ValueError(f"{path} is no record of a run; delete it, or run 'diffad evaluate'")
    result: Result = {"training": ""} | values | {"name": name}
    where = f"{fix}: its record"
    _check_forms(result, FORMS, where)
    _check_forms(result["config"], {"calibrate": bool}, f"{where}: config")
    for kind, quality in result["per_defect"].items():
        _check_forms(quality, {"aupro": float | None}, f"{where}: per_defect.{kind:.100}")
    if len({result[key] is None for key in MASKED}) > 1:
        raise ValueError(f"{where} has some of {', '.join(MASKED)}, but not all")
    return result | {"file": path}


def _check_forms(values: Any, forms: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where ``values`` is no mapping, lacks a key, or has it wrong."""
    convert(values, dict[str, Any], where)
    for key, form in forms.items():
        if key not in values:
            raise ValueError(f"{where} lacks {key!r}")
        convert(values[key], form, f"{where}: {key}")


class ScoreTable(NamedTuple):
    """Scores of one run, in the order of the data set; (n,) each.

    Attributes:
        id: name of the test image, ``<defect type>/<file stem>``.
        label: int64, 0 normal, 1 anomalous.
        defect_type: ``good`` or a kind of defect.
        image_score: float64, larger = more anomalous.
    """

    id: np.ndarray
    label: np.ndarray
    defect_type: np.ndarray
    image_score: np.ndarray


def read_score_table(result: Result) -> ScoreTable:
    """Return the scores of a record's run, image by image.

    They are in ``scores.csv`` beside ``result.json``, or in ``<grid>-scores.npz`` beside
    ``<grid>.jsonl``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is broken.
    """
    path: Path = result["file"]
    if path.suffix != ".jsonl":
        return _read_csv(path.with_name("scores.csv"))
    archive = _archive_of(path)
    keys = [f"{kind}/{result.get(field)}" for kind, field in ARRAYS.items()]
    if not set(keys) <= archive.keys():
        fix = "collect that run again by 'diffad report --runs'"
        raise ValueError(f"{_archive_path(path)} lacks the scores of {result['name']}; {fix}")
    return ScoreTable(*(archive[key] for key in keys))


def read_scores(result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (n,) and image scores (n,) of a record's run; see :func:`read_score_table`."""
    table = read_score_table(result)
    return table.label, table.image_score


def _read_csv(path: Path) -> ScoreTable:
    head, *rows = read_rows(path) or [[]]
    try:
        ids, labels, kinds, scores = (
            [row[head.index(name)] for row in rows] for name in ScoreTable._fields
        )
        table = ScoreTable(
            np.array(ids, dtype=np.str_),
            np.array([int(text) for text in labels], dtype=np.int64),
            np.array(kinds, dtype=np.str_),
            np.array([float(text) for text in scores]),
        )
        if not np.isfinite(table.image_score).all():
            raise ValueError("a score is not finite")
    except (ValueError, IndexError, OverflowError) as error:
        fault = f"{path} is no table of scores ({str(error)[:200]})"
        raise ValueError(f"{fault}; run 'diffad evaluate' again") from None
    return table


def _archive_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}-scores.npz")


def _archive_of(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of ``<grid>-scores.npz`` beside ``<grid>.jsonl``."""
    archive = _archive_path(path)
    if not archive.exists():
        raise FileNotFoundError(f"no {archive} beside {path.name}; restore it")
    return _read_archive(archive, archive.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read_archive(path: Path, changed: int) -> dict[str, np.ndarray]:
    """Read an archive once for as long as it is not ``changed``."""
    try:
        with np.load(path) as arrays:  # no pickles
            return {key: arrays[key] for key in arrays.files}
    except PermissionError:
        raise
    except Exception as error:  # spoilt archives raise what they like
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is no archive of scores ({why}); restore it") from None


def read_speeds(folder: str | Path) -> dict[str, Any]:
    """What ``make bench TOPICS=speed`` measured, setting by setting; empty where it did not run.

    Raises:
        ValueError: ``speed.json`` in the folder is broken.
    """
    path = Path(folder) / "speed.json"
    if not path.exists():
        return {}
    values, where = read_json(path, "record of times"), f"{path}: settings"
    found = values.get("settings") if isinstance(values, dict) else None
    settings: dict[str, Any] = convert(found, dict[str, Any], where)
    for name, setting in settings.items():
        here = f"{where}.{name:.100}"
        _check_forms(setting, SPEED, here)
        if min(*setting["ms"], setting["mb"], 1) <= 0:
            raise ValueError(f"{here}: times and memory must be above 0")
    if 0 in (rounds := {len(setting["ms"]) for setting in settings.values()}) or len(rounds) > 1:
        raise ValueError(f"{where} differ in their number of rounds; run 'make bench TOPICS=speed'")
    return settings


def collect(
    runs: str | Path, results: str | Path, grid: str, homes: Mapping[str, str] | None = None
) -> int:
    """Copy the records and scores (not weights) of finished runs into the files of grids.

    ``<grid>.jsonl`` in ``results`` has one record a line, ``<grid>-scores.npz`` the scores of all.
    A record that a file holds already is replaced there.

    Args:
        runs: folder of finished runs.
        results: folder of the files.
        grid: of records that ``homes`` does not name.
        homes: name of a record -> name of its grid.

    Returns:
        how many were copied.

    Raises:
        FileNotFoundError: ``runs`` has no records.
        ValueError: a record or a table of scores is broken.
    """
    results = Path(results)
    files: dict[Path, dict[str, Result]] = defaultdict(dict)
    arrays: dict[Path, dict[str, np.ndarray]] = defaultdict(dict)
    places: dict[str, Path] = {}
    for path in sorted(results.glob("*.jsonl")):
        files[path], arrays[path] = _read_lines(path), dict(_archive_of(path))
        places |= dict.fromkeys(files[path], path)
    copied = [result for result in read_results(runs) if result["file"].suffix != ".jsonl"]
    changed = set()
    for result in copied:
        name = result["name"]
        path = places.get(name, results / f"{(homes or {}).get(name, grid)}.jsonl")
        keys, scores = _score_arrays(result)
        files[path][name] = result | keys
        arrays[path] |= scores
        changed.add(path)
    for path in changed:
        _write_grid(path, files[path], arrays[path])
    return len(copied)


def _score_arrays(result: Result) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Return a run's scores as an archive keeps them, and the record's fields that name them.

    Each is named by its content; runs on one test set share ids, labels and types of defects.
    """
    table = read_score_table(result)
    shared = {kind: getattr(table, kind).tolist() for kind in ("id", "label", "defect_type")}
    keys = {"test_set": config_hash(shared)}
    keys["scores"] = config_hash({**keys, "image_score": table.image_score.tolist()})
    named = table._asdict().items()
    return keys, {f"{kind}/{keys[ARRAYS[kind]]}": array for kind, array in named}


def _write_grid(
    path: Path, results: Mapping[str, Result], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write ``<grid>-scores.npz``, then ``<grid>.jsonl``, each complete or not at all.

    Scores are found by their content, so that an interruption between the two parts no record from
    its own scores. Arrays that no record needs are left out.
    """
    needed = {(kind, r[key]) for r in results.values() for kind, key in ARRAYS.items()}
    kept: dict[str, Any] = {
        key: arrays[key] for key in sorted(arrays) if tuple(key.split("/")) in needed
    }
    named = sorted(results.items(), key=lambda item: item[0].split("/"))
    lines = []
    for name, result in named:
        values = {"name": name} | {k: v for k, v in result.items() if k not in ("name", "file")}
        lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")

    def write_archive(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **kept)

    write_atomically(_archive_path(path), write_archive)
    write_atomically(path, partial(Path.write_text, data="".join(lines), encoding="utf-8"))


def grouped(results: Iterable[Result]) -> dict[Key, list[Result]]:
    """Runs that differ in their seed only, by (method, variant, image size, training), in order.

    Raises:
        ValueError: runs of one group differ in profile or resizing, or share a seed.
    """
    groups = defaultdict(list)
    for result in results:
        key = tuple(result[k] for k in ("method", "variant", "image_size", "training"))
        groups[key].append(result)
    methods, variants = list(METHOD_NAMES), list(VARIANTS)

    def place(key: Key) -> tuple:
        method, variant, image_size, training = key
        known = variants.index(variant) if variant in variants else len(variants)
        rank = methods.index(method) if method in methods else len(methods)
        # t5 before t10, full before what is taken away from it
        return rank, method, image_size, known, len(variant), variant, training

    for group in groups.values():
        others = {(r["profile"], r["resize"]) for r in group}
        if len(others) > 1 or len({r["seed"] for r in group}) < len(group):
            fault = "these results differ in more than their seed; separate them"
            raise ValueError(f"{fault}: {_places(group)}")
    return {k: sorted(groups[k], key=lambda r: r["seed"]) for k in sorted(groups, key=place)}


def _places(group: Iterable[Result]) -> str:
    """Where records are, for messages."""
    return ", ".join(f"{r['name']} in {r['file']}" for r in group)


def auroc_over_seeds(group: Sequence[Result]) -> tuple[float, float, float]:
    """Mean image AUROC of the seeds and its bootstrap interval over images."""
    low, high = bootstrap_auroc(*_scores_over_seeds(group))
    return float(np.mean([r["image_auroc"] for r in group])), low, high


def _scores_over_seeds(group: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and image scores (seeds, n); ValueError where runs scored different images."""
    found = [read_scores(result) for result in group]
    labels = found[0][0]
    if not all(np.array_equal(labels, others) for others, _ in found):
        raise ValueError(f"these runs did not score the same test images: {_places(group)}")
    return labels, np.stack([scores for _, scores in found])


def select(results: Iterable[Result], **wanted: Any) -> list[Result]:
    """The results whose fields have these values."""
    return [r for r in results if all(r[key] == value for key, value in wanted.items())]


def label_of(group: Sequence[Result]) -> str:
    """How a table names a group; the size is named where it is not the lite profile's."""
    first = group[0]
    method: str = first["method"]
    variant, size = first["variant"], first["image_size"]
    words = [METHOD_NAMES.get(method, method)]
    words += [] if size == 64 else [f"{size} px"]
    if variant in VARIANTS:
        words.append("calibrated" if first["config"]["calibrate"] else "raw maps")
    else:
        words.append(variant)
    return ", ".join(words)


def is_default(result: Result) -> bool:
    """Whether it is of the profile's own training and settings, on the real test set."""
    return (result["training"], result["variant"], result["plant"]) == ("", "default", None)


def is_ablation(result: Result) -> bool:
    """Whether something was changed in it, in training or, by a variant of another name, later."""
    return bool(result["training"]) or result["variant"] not in VARIANTS


def difference_of(a: Sequence[Result], b: Sequence[Result]) -> tuple[float, float, float]:
    """Image AUROC of runs ``a`` minus that of runs ``b``, with its paired bootstrap interval.

    Where both have seeds in common, the others are left out: the pairs share their first stages.
    """
    common = {r["seed"] for r in a} & {r["seed"] for r in b}
    if common:
        a, b = ([r for r in group if r["seed"] in common] for group in (a, b))
    labels, scores = _scores_over_seeds([*a, *b])
    return paired_bootstrap_auroc(labels, scores[: len(a)], scores[len(a) :])


def mean(group: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean of a field over runs."""
    return float(np.mean([result[key] for result in group]))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown: one line for the head, one below it, one for each row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
