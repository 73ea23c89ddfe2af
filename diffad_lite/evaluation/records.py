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
from diffad_lite.evaluation.metrics import (
    bootstrap_auroc,
    paired_bootstrap_auroc,
    percentile_interval,
)
from diffad_lite.evaluation.pseudo_values import resampled_means

Result = dict[str, Any]
Key = tuple[str, str, int, str]  # method, variant, image size, training
VARIANTS = ("raw", "default", "calibrated")  # first in tables, in this order
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "aupro", "dice_oracle")  # None without masks
# Fields that tables need, with their types; a record may have more.
TEXTS = ("method", "dataset", "category", "resize", "profile", "variant", "training")
NUMBERS = ["image_auroc", "image_ap", "f1_at_normal_threshold", "false_alarms_at_normal_threshold"]
NUMBERS += ["train_seconds", "train_steps", "ms_per_image", "network_evaluations_per_image"]
FIELD_TYPES: dict[str, Any] = dict.fromkeys(TEXTS, str) | dict.fromkeys(NUMBERS, float)
FIELD_TYPES |= dict.fromkeys(PIXEL_METRICS, float | None) | {"seed": int, "image_size": int}
FIELD_TYPES |= {"plant": str | None, "config": dict[str, Any]}
FIELD_TYPES |= {"per_defect": dict[str, dict[str, float | None]]}
# What an older record lacks, or what could not be measured, is None: no masks, too few normal
# pixels for AUPIMO, no reconstruction, no planted defects.
NEWER_NUMBERS = ["aupro_05", "aupimo", "pixel_threshold", "pixel_f1_at_normal_threshold"]
NEWER_NUMBERS += ["psnr_normal", "remaining_contrast"]
NEWER_TYPES: dict[str, Any] = dict.fromkeys(NEWER_NUMBERS, float | None)
NEWER_TYPES |= {"false_alarms_ci": tuple[float, float] | None, "measures": str | None}
FIELD_TYPES |= NEWER_TYPES
# Further values per image: squared error of the reconstruction, fraction of a planted defect that
# remains in it, AUPIMO, and pseudo-values of pixel metrics; NaN where there is none.
MEASURES = ("squared_error", "remaining_contrast", "aupimo", "pixel_ap", "aupro", "dice_oracle")
Measures = dict[str, np.ndarray]
# Quantities whose differences have intervals besides image AUROC -> the values behind them.
MEASURE_OF = {"psnr_normal": "squared_error", "remaining_contrast": "remaining_contrast"}
MEASURE_OF |= {name: name for name in ("pixel_ap", "aupro", "dice_oracle", "aupimo")}
# Column of a table of scores -> the field of a record that names its array in the archive.
ARRAY_FIELDS = dict.fromkeys(("id", "label", "defect_type"), "test_set") | {"image_score": "scores"}
SPEED_TYPES = {"ms": tuple[float, ...], "mb": float, "evaluations": float, "parameters": int}


def read_results(folder: str | Path) -> list[Result]:
    """Read all records of a folder: its ``<grid>.jsonl``, and each ``result.json`` below it.

    A record is a mapping with two more keys: ``name``, the run's path below the folder, such as
    ``pca/elpv-mono/s0/raw``, and ``file``, which it was read from. If a file holds several records
    of one name, the last one counts; so a new line may simply be appended.

    Raises:
        FileNotFoundError: the folder has no records.
        ValueError: a record is broken (the message names it), or two files hold the same name.
    """
    folder = Path(folder)
    records: list[Result] = []
    for path in sorted(folder.glob("*.jsonl")):
        records += _read_lines(path).values()
    for path in sorted(folder.rglob("result.json")):
        name = path.parent.relative_to(folder).as_posix()
        fix = f"{path} is incomplete; run 'diffad evaluate' again"
        records.append(_checked(read_json(path, "result"), path, name, fix))
    if not records:
        expected = "no <grid>.jsonl in it and no result.json below it"
        raise FileNotFoundError(
            f"{folder} has no records ({expected}); run 'diffad evaluate' first"
        )
    by_name: dict[str, Result] = {}
    for record in records:
        name, path = record["name"], record["file"]
        if name in by_name:
            clash = by_name[name]["file"]
            raise ValueError(f"{path} and {clash} both hold {name}; remove one of them")
        by_name[name] = record
    return [by_name[name] for name in sorted(by_name, key=lambda name: name.split("/"))]


def _read_lines(path: Path) -> dict[str, Result]:
    """Read a file with one record a line, as name -> record; skip a truncated last line."""
    records = {}
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
            if number == len(lines):  # without a line break at its end: writing was interrupted
                warnings.warn(f"{where} is truncated and skipped", stacklevel=3)
                continue
            raise ValueError(f"{where} is not JSON ({str(error)[:200]}); delete it") from None
        name = values.get("name") if isinstance(values, dict) else None
        if not isinstance(name, str):
            raise ValueError(f"{where} has no name; delete it, or collect that run again")
        fix = f"{where} is incomplete; collect that run again by 'diffad report --runs'"
        records[name] = _checked(values, path, name, fix)
        _check_types(values, dict.fromkeys(ARRAY_FIELDS.values(), str), f"{fix}: its record")
    return records


def _checked(values: Any, path: Path, name: str, fix: str) -> Result:
    """Return a record with the fields that older versions lack; raise ValueError if it is none."""
    if not isinstance(values, dict) or "image_auroc" not in values:
        raise ValueError(f"{path} is no record of a run; delete it, or run 'diffad evaluate'")
    record: Result = {"training": ""} | dict.fromkeys(NEWER_TYPES) | values | {"name": name}
    where = f"{fix}: its record"
    _check_types(record, FIELD_TYPES, where)
    _check_types(record["config"], {"calibrate": bool}, f"{where}: config")
    for kind, metrics in record["per_defect"].items():
        _check_types(metrics, {"aupro": float | None}, f"{where}: per_defect.{kind:.100}")
    if len({record[key] is None for key in PIXEL_METRICS}) > 1:
        raise ValueError(f"{where} has some of {', '.join(PIXEL_METRICS)}, but not all")
    return record | {"file": path}


def _check_types(values: Any, types: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless ``values`` is a mapping that has all keys with their types."""
    convert(values, dict[str, Any], where)
    for key, kind in types.items():
        if key not in values:
            raise ValueError(f"{where} lacks {key!r}")
        convert(values[key], kind, f"{where}: {key}")


class ScoreTable(NamedTuple):
    """Scores of one run in the order of its test set; each array is (n,).

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


def read_score_table(record: Result) -> ScoreTable:
    """Read the scores of a record's run, image by image.

    They are in ``scores.csv`` beside ``result.json``, or in ``<grid>-scores.npz`` beside
    ``<grid>.jsonl``. Raises FileNotFoundError if that file is missing, ValueError if it is broken.
    """
    path: Path = record["file"]
    if path.suffix != ".jsonl":
        return _read_csv(path.with_name("scores.csv"))[0]
    arrays = _read_archive(path)
    keys = [f"{column}/{record.get(field)}" for column, field in ARRAY_FIELDS.items()]
    if not set(keys) <= arrays.keys():
        fix = "collect that run again by 'diffad report --runs'"
        raise ValueError(f"{_archive_path(path)} lacks the scores of {record['name']}; {fix}")
    return ScoreTable(*(arrays[key] for key in keys))


def read_scores(record: Result) -> tuple[np.ndarray, np.ndarray]:
    """Read labels (n,) and image scores (n,) of a record's run, as :func:`read_score_table`."""
    table = read_score_table(record)
    return table.label, table.image_score


def read_measures(record: Result) -> Measures:
    """Read further values per image of a record's run: name in ``MEASURES`` -> (n,), NaN for none.

    A record of an older run has none: empty. Raises as :func:`read_score_table`.
    """
    path: Path = record["file"]
    if path.suffix != ".jsonl":
        return _read_csv(path.with_name("scores.csv"))[1]
    if record.get("measures") is None:
        return {}
    arrays = _read_archive(path)
    stored = {name: arrays.get(f"{name}/{record['measures']}") for name in MEASURES}
    measures = {name: values for name, values in stored.items() if values is not None}
    n = len(read_score_table(record).id)
    if not measures or any(v.shape != (n,) or np.isinf(v).any() for v in measures.values()):
        fault = f"{_archive_path(path)} lacks the measures of {record['name']}, or has broken ones"
        raise ValueError(f"{fault}; collect that run again by 'diffad report --runs'")
    return measures


def _read_csv(path: Path) -> tuple[ScoreTable, Measures]:
    head, *rows = read_rows(path) or [[]]
    types = (np.str_, np.int64, np.str_, np.float64)
    try:
        columns = ([row[head.index(name)] for row in rows] for name in ScoreTable._fields)
        table = ScoreTable(*(np.array(c, dtype=t) for c, t in zip(columns, types, strict=True)))
        if not np.isfinite(table.image_score).all():
            raise ValueError("a score is not finite")
        measures = {
            name: np.array([float(row[head.index(name)] or "nan") for row in rows])
            for name in MEASURES
            if name in head
        }
        if any(np.isinf(values).any() for values in measures.values()):
            raise ValueError("a measure is infinite")
    except (ValueError, IndexError, OverflowError) as error:
        fault = f"{path} is no table of scores ({str(error)[:200]})"
        raise ValueError(f"{fault}; run 'diffad evaluate' again") from None
    return table, measures


def _archive_path(path: Path) -> Path:
    """``<grid>-scores.npz`` beside ``<grid>.jsonl``."""
    return path.with_name(f"{path.stem}-scores.npz")


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the archive beside ``<grid>.jsonl``."""
    archive = _archive_path(path)
    if not archive.exists():
        raise FileNotFoundError(f"no {archive} beside {path.name}; restore it")
    return _load_arrays(archive, archive.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _load_arrays(path: Path, modified: int) -> dict[str, np.ndarray]:
    """Load an archive; ``modified``, its time of modification, is part of the cache's key."""
    try:
        with np.load(path) as arrays:  # no pickles
            return {key: arrays[key] for key in arrays.files}
    except PermissionError:
        raise
    except Exception as error:  # a damaged archive can raise any error
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} is no archive of scores ({why}); restore it") from None


def read_speeds(folder: str | Path) -> dict[str, Any]:
    """Read what ``make bench TOPICS=speed`` measured, as setting -> times; empty if it never ran.

    Raises ValueError if ``speed.json`` in the folder is broken.
    """
    path = Path(folder) / "speed.json"
    if not path.exists():
        return {}
    content, where = read_json(path, "record of times"), f"{path}: settings"
    settings = content.get("settings") if isinstance(content, dict) else None
    settings = convert(settings, dict[str, Any], where)
    for name, setting in settings.items():
        _check_types(setting, SPEED_TYPES, f"{where}.{name:.100}")
        if min(*setting["ms"], setting["mb"], 1) <= 0:
            raise ValueError(f"{where}.{name:.100}: times and memory must be above 0")
    if 0 in (rounds := {len(setting["ms"]) for setting in settings.values()}) or len(rounds) > 1:
        raise ValueError(f"{where} differ in their number of rounds; run 'make bench TOPICS=speed'")
    return settings


def collect(
    runs: str | Path, results: str | Path, grid: str, grids: Mapping[str, str] | None = None
) -> int:
    """Copy the records and scores (not weights) of finished runs into the files of their grids.

    ``<grid>.jsonl`` in ``results`` has one record a line, ``<grid>-scores.npz`` all their scores.
    A record replaces the one of the same name, in the file that holds it.

    Args:
        runs: folder of finished runs.
        results: folder of the files.
        grid: grid of the records that ``grids`` does not name.
        grids: record name -> grid name.

    Returns:
        the number of records copied.

    Raises:
        FileNotFoundError: ``runs`` has no records.
        ValueError: a record or a table of scores is broken.
    """
    results = Path(results)
    files: dict[Path, dict[str, Result]] = defaultdict(dict)
    arrays: dict[Path, dict[str, np.ndarray]] = defaultdict(dict)
    file_of: dict[str, Path] = {}
    for path in sorted(results.glob("*.jsonl")):
        files[path], arrays[path] = _read_lines(path), dict(_read_archive(path))
        file_of |= dict.fromkeys(files[path], path)
    finished = [record for record in read_results(runs) if record["file"].suffix != ".jsonl"]
    changed = set()
    for record in finished:
        name = record["name"]
        path = file_of.get(name, results / f"{(grids or {}).get(name, grid)}.jsonl")
        keys, new_arrays = _score_arrays(record)
        files[path][name] = record | keys
        arrays[path] |= new_arrays
        changed.add(path)
    for path in changed:
        _write_grid(path, files[path], arrays[path])
    return len(finished)


def _score_arrays(record: Result) -> tuple[dict[str, str | None], dict[str, np.ndarray]]:
    """Return the record's fields that name its score arrays, and the arrays for the archive.

    An array is named by its content: runs on one test set share ids, labels and defect types.
    """
    measures = read_measures(record)
    texts = {name: values.astype(str).tolist() for name, values in measures.items()}
    measured = config_hash(texts) if measures else None
    table = read_score_table(record)
    shared = {column: getattr(table, column).tolist() for column in ("id", "label", "defect_type")}
    keys: dict[str, str | None] = {"test_set": config_hash(shared)}
    keys["scores"] = config_hash({**keys, "image_score": table.image_score.tolist()})
    keys["measures"] = measured
    columns = table._asdict().items()
    arrays = {f"{column}/{keys[ARRAY_FIELDS[column]]}": array for column, array in columns}
    return keys, arrays | {f"{k}/{measured}": v.astype(np.float32) for k, v in measures.items()}


def _write_grid(
    path: Path, records: Mapping[str, Result], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write ``<grid>-scores.npz``, then ``<grid>.jsonl``, each complete or not at all.

    Scores are looked up by content, so an interruption between the two files never gives a record
    the scores of another. Arrays that no record needs are dropped.
    """
    named_by = ARRAY_FIELDS | dict.fromkeys(MEASURES, "measures")
    needed = {f"{c}/{r.get(field)}" for r in records.values() for c, field in named_by.items()}
    kept: dict[str, Any] = {key: arrays[key] for key in sorted(arrays) if key in needed}
    lines = []
    for name in sorted(records, key=lambda name: name.split("/")):
        fields = {k: v for k, v in records[name].items() if k not in ("name", "file")}
        line = json.dumps({"name": name} | fields, ensure_ascii=False, allow_nan=False)
        lines.append(f"{line}\n")

    def write_archive(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **kept)

    write_atomically(_archive_path(path), write_archive)
    write_atomically(path, partial(Path.write_text, data="".join(lines), encoding="utf-8"))


def grouped(results: Iterable[Result]) -> dict[Key, list[Result]]:
    """Group runs that differ only in their seed; key and order are those of tables.

    Raises ValueError if runs of one group differ in profile or resizing, or share a seed.
    """
    groups = defaultdict(list)
    for result in results:
        key = tuple(result[k] for k in ("method", "variant", "image_size", "training"))
        groups[key].append(result)
    for group in groups.values():
        settings = {(r["profile"], r["resize"]) for r in group}
        if len(settings) > 1 or len({r["seed"] for r in group}) < len(group):
            fault = "these results differ in more than their seed; separate them"
            raise ValueError(f"{fault}: {_names_of(group)}")
    return {k: sorted(groups[k], key=lambda r: r["seed"]) for k in sorted(groups, key=_table_order)}


def method_names() -> dict[str, str]:
    """Return the titles of the methods in tables, in the order of tables, by name."""
    from diffad_lite.methods import METHODS  # imports torch, which reading records does not need

    return {name: method.title for name, method in METHODS.items()}


def _table_order(key: Key) -> tuple:
    """Sort key of a group: unknown names last, t5 before t10, full before ablated training."""
    method, variant, image_size, training = key
    method_rank = [*method_names(), method].index(method)
    variant_rank = [*VARIANTS, variant].index(variant)
    return method_rank, method, image_size, variant_rank, len(variant), variant, training


def _names_of(group: Iterable[Result]) -> str:
    """List runs with their files, for messages."""
    return ", ".join(f"{r['name']} in {r['file']}" for r in group)


def auroc_over_seeds(group: Sequence[Result]) -> tuple[float, float, float]:
    """Return the mean image AUROC of the seeds and its bootstrap interval over images."""
    low, high = bootstrap_auroc(*_scores_over_seeds(group))
    return mean(group, "image_auroc"), low, high


def _scores_over_seeds(group: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (n,) and scores (seeds, n); ValueError if runs scored different images."""
    first, *others = scored = [read_score_table(record) for record in group]
    for table in others:
        if not (np.array_equal(table.id, first.id) and np.array_equal(table.label, first.label)):
            raise ValueError(f"these runs did not score the same test images: {_names_of(group)}")
    return first.label, np.stack([table.image_score for table in scored])


def select(results: Iterable[Result], **wanted: Any) -> list[Result]:
    """Return the results whose fields have these values."""
    return [r for r in results if all(r[key] == value for key, value in wanted.items())]


def label_of(group: Sequence[Result]) -> str:
    """Return a group's name in tables; it includes an image size other than the lite profile's."""
    first = group[0]
    method: str = first["method"]
    variant, size = first["variant"], first["image_size"]
    if variant in VARIANTS:
        variant = "calibrated" if first["config"]["calibrate"] else "raw maps"
    sizes = [] if size == 64 else [f"{size} px"]
    return ", ".join([method_names().get(method, method), *sizes, variant])


def is_default(result: Result) -> bool:
    """Tell whether a run has its profile's training and settings, on the real test set."""
    return (result["training"], result["variant"], result["plant"]) == ("", "default", None)


def is_ablation(result: Result) -> bool:
    """Tell whether a run has changed training, or settings named by a variant of another name."""
    return bool(result["training"]) or result["variant"] not in VARIANTS


def difference_of(
    a: Sequence[Result], b: Sequence[Result], quantity: str = "image_auroc"
) -> tuple[float, float, float]:
    """Return a quantity of runs ``a`` minus that of ``b``, with its paired bootstrap interval.

    If both have seeds in common, only these count: such pairs share their first stages. Images are
    resampled within each class, the same ones for both.

    Args:
        a: runs that differ only in their seed.
        b: runs to compare with, on the same test images.
        quantity: ``image_auroc``, or one of ``MEASURE_OF``: ``psnr_normal`` in dB; differences of
            the other ones are differences of fractions, for ``remaining_contrast`` of the absolute
            values of its means.

    Raises:
        ValueError: the runs scored different images, or some lack the values of each image.
    """
    common = {r["seed"] for r in a} & {r["seed"] for r in b}
    if common:
        a, b = ([r for r in group if r["seed"] in common] for group in (a, b))
    labels, scores = _scores_over_seeds([*a, *b])
    if quantity == "image_auroc":
        return paired_bootstrap_auroc(labels, scores[: len(a)], scores[len(a) :])
    values = np.stack([_values_of(record, quantity) for record in [*a, *b]])
    used = ~np.isnan(values).any(axis=0)
    if quantity == "psnr_normal":
        used &= labels == 0
    means = values[:, used].mean(axis=1)  # (runs,)
    draws = resampled_means(values[:, used], labels[used])  # (n_boot, runs)
    if quantity == "psnr_normal":  # the peak is the same for both
        means, draws = (-10 * np.log10(np.maximum(errors, 1e-20)) for errors in (means, draws))
    elif quantity == "remaining_contrast":  # an inverted defect is none that was removed
        means, draws = np.abs(means), np.abs(draws)
    full = float(_difference_of_means(means, len(a)))
    recorded = mean(a, quantity) - mean(b, quantity)
    effect = full if quantity == "remaining_contrast" else recorded
    # The mean of pseudo-values is not exactly the metric: take their spread alone.
    spread = _difference_of_means(draws, len(a)) - full
    return effect, *percentile_interval(effect + spread)


def _difference_of_means(values: np.ndarray, n: int) -> np.ndarray:
    """Return the mean of the first ``n`` runs minus that of the others, along the last axis."""
    return values[..., :n].mean(axis=-1) - values[..., n:].mean(axis=-1)


def has_values(record: Result, quantity: str) -> bool:
    """Tell whether a record has the values of each image that :func:`difference_of` needs."""
    return quantity == "image_auroc" or _find_values(record, quantity) is not None


def _values_of(record: Result, quantity: str) -> np.ndarray:
    """Return the values (n,) of each image behind a quantity, NaN for none."""
    values = _find_values(record, quantity)
    if values is None:
        fix = "run 'diffad evaluate' again"
        raise ValueError(f"{record['name']} has no values per image of {quantity}; {fix}")
    return values


def _find_values(record: Result, quantity: str) -> np.ndarray | None:
    """Return the values (n,) behind a quantity, None if it was not measured."""
    return None if record[quantity] is None else read_measures(record).get(MEASURE_OF[quantity])


def mean(group: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the mean of a field over runs."""
    return float(np.mean([result[key] for result in group]))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown: the head, a rule, and one line for each row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
