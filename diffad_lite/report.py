"""Tables and figures rendered from result files; no number in the course is typed by hand."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffad_lite.claims import Judged, claims_table, judge_all
from diffad_lite.config import write_atomically
from diffad_lite.metrics import verdict
from diffad_lite.performance import performance_tables, read_performance
from diffad_lite.results import (
    METHOD_NAMES,
    Result,
    auroc_over_seeds,
    collect,
    difference_of,
    grouped,
    is_ablation,
    is_default,
    label_of,
    mean,
    read_results,
    read_scores,
    read_speeds,
    select,
)

# What notebooks need of the records is at hand here, too.
__all__ = [
    "METHOD_NAMES",
    "ablation_table",
    "auroc_cell",
    "collect",
    "difference_of",
    "image_table",
    "mean",
    "overview_table",
    "pixel_table",
    "read_results",
    "read_scores",
    "read_speeds",
    "render",
    "select",
    "speed_table",
    "tables",
]

MARKS = "<!-- {}: rendered by 'make tables' -->", "<!-- end -->"


def auroc_cell(group: Sequence[Result]) -> str:
    """Mean image AUROC and its interval, as tables write them."""
    auroc, low, high = auroc_over_seeds(group)
    return f"{auroc:.3f} [{low:.3f}, {high:.3f}]"


def image_table(results: Iterable[Result]) -> str:
    """Image metrics as Markdown, one row for each method and variant."""
    lines = [
        "| method | seeds | image AUROC [95 %] | AP | F1 at threshold | false alarms | "
        "training | ms / image | evaluations |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for group in grouped(results).values():
        cells = [
            label_of(group),
            ", ".join(str(r["seed"]) for r in group),
            auroc_cell(group),
            f"{mean(group, 'image_ap'):.3f}",
            f"{mean(group, 'f1_at_normal_threshold'):.3f}",
            f"{100 * mean(group, 'false_alarms_at_normal_threshold'):.0f} %",
            f"{mean(group, 'train_seconds') / 60:.1f} min",
            f"{mean(group, 'ms_per_image'):.1f}",
            f"{mean(group, 'network_evaluations_per_image'):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pixel_table(results: Iterable[Result], dice: bool = False) -> str:
    """Pixel metrics as Markdown: overall, with or without Dice, and AUPRO for each defect."""
    results = list(results)
    kinds = sorted({kind for r in results for kind in r["per_defect"]})
    metrics = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP"}
    metrics |= {"aupro": "AUPRO"} | ({"dice_oracle": "Dice, oracle threshold"} if dice else {})
    head = ["method", "seeds", *metrics.values(), *(f"AUPRO {kind}" for kind in kinds)]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for group in grouped(results).values():
        cells = [label_of(group), ", ".join(str(r["seed"]) for r in group)]
        cells += [f"{mean(group, metric):.3f}" for metric in metrics]
        for kind in kinds:
            values = [r["per_defect"].get(kind, {}).get("aupro") for r in group]
            cells.append("-" if None in values else f"{np.mean(values):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablation_table(results: Iterable[Result]) -> str:
    """Runs of one method as Markdown, each compared with the default one on the same images."""
    groups = grouped(results)
    lines = [
        "| what is changed | seeds | steps | image AUROC [95 %] | lost by it [95 %] | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (method, variant, size, training), group in groups.items():
        name = (training or "full") + ("" if variant == "default" else f", {variant}")
        seeds = ", ".join(str(r["seed"]) for r in group)
        cells = [name, seeds, f"{mean(group, 'train_steps'):.0f}", auroc_cell(group)]
        full = groups.get((method, "default", size, ""))
        if full and full is not group:
            less, low, high = difference_of(full, group)
            cells += [f"{less:+.3f} [{low:+.3f}, {high:+.3f}]", verdict(low, high)]
        else:
            cells += ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overview_table(results: Iterable[Result]) -> str:
    """Image AUROC with intervals on every data set as Markdown, default settings only."""
    chosen = [result for result in results if is_default(result)]
    columns = {}
    for dataset, category in sorted({(r["dataset"], r["category"]) for r in chosen}):
        own = select(chosen, dataset=dataset, category=category)
        columns[category or dataset] = grouped(own)
    lines = ["| method | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for key in dict.fromkeys(key for groups in columns.values() for key in groups):
        found = [groups.get(key) for groups in columns.values()]
        cells = [label_of(next(filter(None, found)))]
        cells += [auroc_cell(group) if group else "-" for group in found]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed_table(speeds: Mapping[str, Any]) -> str:
    """Settings that were timed in one run as Markdown, the fastest first; the median round."""
    lines = [
        "| setting | ms / image [least, most] | network evaluations | MB of tensors | parameters |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in sorted(speeds.items(), key=lambda item: np.median(item[1]["ms"])):
        ms = found["ms"]
        times = f"{np.median(ms):.1f} [{min(ms):.1f}, {max(ms):.1f}]"
        cells = [name, times, f"{found['evaluations']:.0f}", f"{found['mb']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{found['parameters'] / 1e6:.2f} M"]) + " |")
    return "\n".join(lines)


def tables(results: Sequence[Result]) -> dict[str, str]:
    """Every table of the course: name -> Markdown."""
    found = {}
    if any(map(is_default, results)):
        found["overview"] = overview_table(results)
    data = sorted({(r["dataset"], r["category"]) for r in results})
    for dataset, category in data:
        chosen = select(results, dataset=dataset, category=category, training="")
        key = f"{dataset}-{category}"
        every = select(results, dataset=dataset, category=category, plant=None)
        for method in sorted({r["method"] for r in every if is_ablation(r)}):
            own = select(every, method=method)
            seeds = {r["seed"] for r in own if is_ablation(r)}
            own = [r for r in own if r["seed"] in seeds and (is_ablation(r) or is_default(r))]
            found[f"{key}-{method}-ablation"] = ablation_table(own)
        if real := [r for r in chosen if r["plant"] is None and not is_ablation(r)]:
            found[f"{key}"] = image_table(real)
            if all(r["aupro"] is not None for r in real):
                found[f"{key}-pixels"] = pixel_table(real, dice=True)
        for plant in sorted({r["plant"] for r in chosen} - {None}):
            planted = select(chosen, plant=plant)
            if all(r["aupro"] is not None for r in planted):
                found[f"{key}-{plant}"] = pixel_table(planted, dice=plant == "lesions")
            else:
                found[f"{key}-{plant}"] = image_table(planted)
    return found


def every_table(
    records: Sequence[Result], judged: Sequence[Judged], results: str | Path
) -> dict[str, str]:
    """:func:`tables`, and those of times, benchmarks and claims: name -> Markdown."""
    found = tables(records)
    if speeds := read_speeds(results):
        found["speed"] = speed_table(speeds)
    found |= performance_tables(read_performance(results))
    if judged:
        found["claims"] = claims_table(judged)
    return found


def render(results: str | Path, documents: Iterable[Path]) -> list[Path]:
    """Write ``tables.md`` into ``results`` and refresh the marked tables of documents.

    Claims are judged where ``claims.yaml`` stands beside that folder. A marked table stands
    between ``<!-- table NAME: rendered by 'make tables' -->`` and ``<!-- end -->``.

    Returns:
        the files that changed.

    Raises:
        ValueError: a document asks for a table that no result makes; ``claims.yaml`` is broken.
    """
    records = read_results(results)
    rendered = every_table(records, judge_all(records, results), results)
    parts = [f"## {name}\n\n{table}\n" for name, table in rendered.items()]
    head = "# Results\n\nRendered from the result files of this folder by `make tables`.\n"
    targets = {Path(results) / "tables.md": "\n".join([head, *parts])}
    for path in documents:
        targets[path] = _refresh(path, rendered)
    changed = []
    for path, text in targets.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
            changed.append(path)
    return changed


def _refresh(path: Path, rendered: Mapping[str, str]) -> str:
    """The document's text with its marked tables replaced."""
    text = path.read_text(encoding="utf-8")
    start, end = MARKS
    prefix, suffix = start.split("{}")
    pieces = text.split(prefix + "table ")
    for i, piece in enumerate(pieces[1:], 1):
        name, found, rest = piece.partition(suffix)
        if not found:  # another comment
            continue
        if name not in rendered:
            raise ValueError(f"{path} asks for the table {name!r}; there are: {list(rendered)}")
        if end not in rest:
            raise ValueError(f"{path}: the table {name!r} has no closing {end}")
        rest = rest.split(end, 1)[1]
        pieces[i] = f"{name}{suffix}\n{rendered[name]}\n{end}{rest}"
    return (prefix + "table ").join(pieces)
