"""Records of runs: reading them, grouping their seeds, comparing two settings image by image."""

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffad_lite.config import convert, read_json, write_atomically
from diffad_lite.metrics import bootstrap_auroc, paired_bootstrap_auroc
from diffad_lite.source import read_rows

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
SPEED = {"ms": tuple[float, ...], "mb": float, "evaluations": float, "parameters": int}


def read_results(folder: str | Path) -> list[Result]:
    """All ``result.json`` below a folder, each with its own ``folder`` added.

    Raises:
        FileNotFoundError: none there.
        ValueError: one is broken, which is named.
    """
    paths = sorted(Path(folder).rglob("result.json"))
    if not paths:
        raise FileNotFoundError(f"no result.json below {folder}; run 'diffad evaluate' first")
    results = []
    for path in paths:
        result: Result = read_json(path, "result")
        if not isinstance(result, dict) or "image_auroc" not in result:
            raise ValueError(f"{path} is no record of a run; delete it, or run 'diffad evaluate'")
        result = {"training": ""} | result | {"folder": path.parent}
        where = f"{path} is not whole; run 'diffad evaluate' again: its record"
        _check_forms(result, FORMS, where)
        _check_forms(result["config"], {"calibrate": bool}, f"{where}: config")
        for kind, found in result["per_defect"].items():
            _check_forms(found, {"aupro": float | None}, f"{where}: per_defect.{kind:.100}")
        if len({result[key] is None for key in MASKED}) > 1:
            raise ValueError(f"{where} has some of {', '.join(MASKED)}, but not all")
        results.append(result)
    return results


def _check_forms(values: Any, forms: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where ``values`` is no mapping, lacks a key, or has it wrong."""
    convert(values, dict[str, Any], where)
    for key, form in forms.items():
        if key not in values:
            raise ValueError(f"{where} lacks {key!r}")
        convert(values[key], form, f"{where}: {key}")


def read_scores(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and image scores (n,) of a run, in the order of the data set.

    Raises:
        FileNotFoundError: no ``scores.csv`` there.
        ValueError: it is broken.
    """
    path = folder / "scores.csv"
    head, *rows = read_rows(path) or [[]]
    try:
        label, score = head.index("label"), head.index("image_score")
        labels = np.array([int(row[label]) for row in rows])
        scores = np.array([float(row[score]) for row in rows])
        if not np.isfinite(scores).all():
            raise ValueError("a score is not finite")
    except (ValueError, IndexError, OverflowError) as error:
        fault = f"{path} is no table of scores ({str(error)[:200]})"
        raise ValueError(f"{fault}; run 'diffad evaluate' again") from None
    return labels, scores


def read_speeds(folder: str | Path) -> dict[str, Any]:
    """What ``diffad speed`` measured in one run, setting by setting; empty where it did not run.

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
        raise ValueError(f"{where} differ in their number of rounds; run 'diffad speed' again")
    return settings


def collect(runs: str | Path, results: str | Path) -> int:
    """Copy the records (not weights) of finished runs into ``results``; returns how many."""
    runs, results = Path(runs), Path(results)
    found = read_results(runs)
    for result in found:
        target = results / result["folder"].relative_to(runs)
        for name in ("scores.csv", "result.json"):
            source = result["folder"] / name
            write_atomically(target / name, partial(shutil.copyfile, source))
    return len(found)


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
            folders = ", ".join(str(r["folder"]) for r in group)
            raise ValueError(f"these results differ in more than their seed, part them: {folders}")
    return {k: sorted(groups[k], key=lambda r: r["seed"]) for k in sorted(groups, key=place)}


def auroc_over_seeds(group: Sequence[Result]) -> tuple[float, float, float]:
    """Mean image AUROC of the seeds and its bootstrap interval over images."""
    low, high = bootstrap_auroc(*_scores_over_seeds(group))
    return float(np.mean([r["image_auroc"] for r in group])), low, high


def _scores_over_seeds(group: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and image scores (seeds, n); ValueError where runs scored different images."""
    found = [read_scores(result["folder"]) for result in group]
    labels = found[0][0]
    if not all(np.array_equal(labels, others) for others, _ in found):
        folders = ", ".join(str(r["folder"]) for r in group)
        raise ValueError(f"these runs did not score the same test images: {folders}")
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
