"""Tables and figures rendered from result files; no number in the course is typed by hand."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffad_lite.core.files import read_json, write_atomically
from diffad_lite.evaluation.claims import Judged, claims_table, judge_all
from diffad_lite.evaluation.metrics import verdict
from diffad_lite.evaluation.records import (
    METHOD_NAMES,
    Result,
    auroc_over_seeds,
    difference_of,
    grouped,
    is_ablation,
    is_default,
    label_of,
    markdown_table,
    mean,
    read_results,
    read_speeds,
    select,
)

MARKS = "<!-- {}: rendered by 'make tables' -->", "<!-- end -->"


def auroc_cell(group: Sequence[Result]) -> str:
    """Mean image AUROC and its interval, as tables write them."""
    auroc, low, high = auroc_over_seeds(group)
    return f"{auroc:.3f} [{low:.3f}, {high:.3f}]"


def image_table(results: Iterable[Result]) -> str:
    """Image metrics as Markdown, one row for each method and variant."""
    head = ["method", "seeds", "image AUROC [95 %]", "AP", "F1 at threshold", "false alarms"]
    head += ["training", "ms / image", "evaluations"]
    rows = [
        [
            label_of(group),
            _seeds(group),
            auroc_cell(group),
            f"{mean(group, 'image_ap'):.3f}",
            f"{mean(group, 'f1_at_normal_threshold'):.3f}",
            f"{100 * mean(group, 'false_alarms_at_normal_threshold'):.0f} %",
            f"{mean(group, 'train_seconds') / 60:.1f} min",
            f"{mean(group, 'ms_per_image'):.1f}",
            f"{mean(group, 'network_evaluations_per_image'):.0f}",
        ]
        for group in grouped(results).values()
    ]
    return markdown_table(head, rows)


def _seeds(group: Sequence[Result]) -> str:
    return ", ".join(str(r["seed"]) for r in group)


def pixel_table(results: Iterable[Result], dice: bool = False) -> str:
    """Pixel metrics as Markdown: overall, with or without Dice, and AUPRO for each defect."""
    results = list(results)
    kinds = sorted({kind for r in results for kind in r["per_defect"]})
    metrics = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP"}
    metrics |= {"aupro": "AUPRO"} | ({"dice_oracle": "Dice, oracle threshold"} if dice else {})
    head = ["method", "seeds", *metrics.values(), *(f"AUPRO {kind}" for kind in kinds)]
    rows = []
    for group in grouped(results).values():
        cells = [label_of(group), _seeds(group)]
        cells += [f"{mean(group, metric):.3f}" for metric in metrics]
        for kind in kinds:
            values = [r["per_defect"].get(kind, {}).get("aupro") for r in group]
            cells.append("-" if None in values else f"{np.mean(values):.3f}")
        rows.append(cells)
    return markdown_table(head, rows)


def ablation_table(results: Iterable[Result]) -> str:
    """Runs of one method as Markdown, each compared with the default one on the same images."""
    groups, rows = grouped(results), []
    head = [
        "what is changed",
        "seeds",
        "steps",
        "image AUROC [95 %]",
        "lost by it [95 %]",
        "verdict",
    ]
    for (method, variant, size, training), group in groups.items():
        name = (training or "full") + ("" if variant == "default" else f", {variant}")
        cells = [name, _seeds(group), f"{mean(group, 'train_steps'):.0f}", auroc_cell(group)]
        full = groups.get((method, "default", size, ""))
        if full and full is not group:
            less, low, high = difference_of(full, group)
            cells += [f"{less:+.3f} [{low:+.3f}, {high:+.3f}]", verdict(low, high)]
        else:
            cells += ["-", "-"]
        rows.append(cells)
    return markdown_table(head, rows)


def overview_table(results: Iterable[Result]) -> str:
    """Image AUROC with intervals on every data set as Markdown, default settings only."""
    chosen = [result for result in results if is_default(result)]
    columns, rows = {}, []
    for dataset, category in sorted({(r["dataset"], r["category"]) for r in chosen}):
        own = select(chosen, dataset=dataset, category=category)
        columns[category or dataset] = grouped(own)
    for key in dict.fromkeys(key for groups in columns.values() for key in groups):
        found = [groups.get(key) for groups in columns.values()]
        cells = [auroc_cell(group) if group else "-" for group in found]
        rows.append([label_of(next(filter(None, found))), *cells])
    return markdown_table(["method", *columns], rows)


def speed_table(speeds: Mapping[str, Any]) -> str:
    """Settings that were timed in one run as Markdown, the fastest first; the median round."""
    head = ["setting", "ms / image [least, most]", "network evaluations", "MB of tensors"]
    rows = []
    for name, found in sorted(speeds.items(), key=lambda item: np.median(item[1]["ms"])):
        ms = found["ms"]
        times = f"{np.median(ms):.1f} [{min(ms):.1f}, {max(ms):.1f}]"
        cells = [name, times, f"{found['evaluations']:.0f}", f"{found['mb']:.1f}"]
        rows.append([*cells, f"{found['parameters'] / 1e6:.2f} M"])
    return markdown_table([*head, "parameters"], rows)


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


# --------------------------------------------------------------- what `make bench` measured
#
# Against diffusers, targets, scale, and predicted costs. The cost of a training is modelled by two
# lines. Seconds are operations over a rate that this machine reached on the lite denoiser at the
# same image size; gigabytes are what autograd keeps of a batch, and 22 bytes a weight (itself,
# gradient, two moments, average, and a copy in bfloat16).

Record = Mapping[str, Any]
PAIRS = {  # as tests/bench names them -> as tables do
    "as used": "ours with its stem, theirs as it comes",
    "same stem": "both behind the same pixel-unshuffle",
    "no stem": "both without",
}
GPU_TFLOPS = 100.0  # assumed, not measured: what a large GPU sustains in bfloat16


def read_performance(folder: str | Path) -> dict[str, Any]:
    """What ``make bench`` wrote to ``performance.json``, by topic; empty where it did not run.

    Raises:
        ValueError: the file is broken.
    """
    path = Path(folder) / "performance.json"
    if not path.exists():
        return {}
    record = read_json(path, "record of performance")
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record of performance; run 'make bench' again")
    return record


def performance_tables(record: Record) -> dict[str, str]:
    """Table name -> Markdown, for the topics that are recorded.

    Raises:
        ValueError: a topic lacks something.
    """
    makers = {
        "diffusers": diffusers_table,
        "start": targets_table,
        "scale": scale_table,
        "predicted": prediction_table,
        "paper": paper_table,
    }
    found = {}
    for topic, make in makers.items():
        if topic in record:
            try:
                found[f"performance-{topic}"] = make(record)
            except (KeyError, TypeError, AttributeError) as error:
                why = f"{type(error).__name__}: {error}"
                raise ValueError(f"performance.json, {topic}: {why}; run 'make bench'") from None
    return found


def _ratio(more: list[float], less: list[float]) -> str:
    ratios = np.array(more) / np.array(less)
    return f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"


def diffusers_table(record: Record) -> str:
    """Speed and memory beside diffusers' U-Net; ratios above 1 say that ours is better."""
    head = ["networks", "weights, ours / theirs", "ms a training step", "faster"]
    head += ["images a second", "more", "MB of training", "less"]
    rows = []
    for name, words in PAIRS.items():
        ours, theirs = (record["diffusers"][name][side] for side in ("ours", "theirs"))

        def both(key: str, unit: float = 1, digits: int = 0) -> str:
            return " / ".join(f"{unit * np.median(s[key]):.{digits}f}" for s in (ours, theirs))  # noqa: B023

        cells = [
            words,
            both("parameters", 1e-6, 2) + " M",
            both("step", 1000),
            _ratio(theirs["step"], ours["step"]),
            both("images", digits=1),
            _ratio(ours["images"], theirs["images"]),
            both("mb"),
            f"{theirs['mb'] / ours['mb']:.2f}",
        ]
        rows.append(cells)
    return markdown_table(head, rows)


def targets_table(record: Record) -> str:
    """What has a target of its own: start-up, metrics, the sliders."""
    start, metrics = record["start"], record["metrics"]
    maps = f"{metrics['maps']} maps of {metrics['size']} x {metrics['size']}"
    rows = [
        ("`import diffad_lite`", f"{start['import diffad_lite']:.2f} s", "0.2 s"),
        (
            "`import diffad_lite.experiments`, beyond torch",
            f"{start['import diffad_lite.experiments']:.2f} s",
            "-",
        ),
        ("`diffad --help`", f"{start['diffad --help']:.2f} s", "1 s"),
        (f"all pixel metrics of {maps}", f"{metrics['seconds']:.1f} s", "5 s"),
        ("memory that they take beside the maps", f"{metrics['mb']:.0f} MB", "1000 MB"),
    ]
    if "bootstrap" in metrics:
        words = "interval of a difference of two methods, 430 images, three seeds"
        rows.append((words, f"{metrics['bootstrap']:.2f} s", "0.5 s"))
    if latency := record.get("latency"):
        found = f"{latency['median_ms']:.0f} ms, median of {latency['presses']}"
        rows.append(("from a key to the next picture of a slider", found, "200 ms"))
    return markdown_table(["what", "measured", "at most"], rows)


def scale_table(record: Record) -> str:
    """How cost grows; the lite denoiser, or AnoDDPM with it."""
    scale = record["scale"]
    rows = [
        ("training step, image side", "size", 1000),
        ("training step, batch", "batch", 1000),
        ("training step, training images", "images", 1000),
        ("scoring an image, noises averaged", "noises", 1),
    ]
    cells = [
        (words, ", ".join(f"{k}: {unit * v:.0f}" for k, v in scale[key].items()))
        for words, key, unit in rows
    ]
    return markdown_table(["what grows", "milliseconds"], cells)


def prediction_table(record: Record) -> str:
    """The model of costs beside what was measured: a step of the lite denoiser."""
    found = record["predicted"]
    rate = found["64"]["flops"] / found["64"]["seconds"]
    head = ["image side", "GFLOP a step", "seconds, predicted from 64", "measured"]
    rows = []
    for size, one in found.items():
        cells = [size, f"{one['flops'] / 1e9:.0f}", f"{one['flops'] / rate:.3f}"]
        cells += [f"{one['seconds']:.3f}", f"{one['gb']:.2f}", f"{one['measured_gb']:.2f}"]
        rows.append(cells)
    return markdown_table([*head, "GB, predicted", "measured"], rows)


def paper_table(record: Record) -> str:
    """Predicted cost of the paper profiles' trainings."""
    largest = list(record["predicted"].values())[-1]
    rate = largest["flops"] / largest["seconds"]
    head = ["method", "stage", "weights", "steps x batch", "TFLOP a step", "GB", "hours here"]
    rows = []
    for method, stages in record["paper"].items():
        for stage, one in stages.items():
            total = one["steps"] * one["flops"]
            cells = [
                METHOD_NAMES[method],
                stage.replace("_", " "),
                f"{one['parameters'] / 1e6:.1f} M",
                f"{one['steps']:,} x {one['batch']}",
                f"{one['flops'] / 1e12:.2f}",
                f"{one['gb']:.1f}",
                f"{total / rate / 3600:,.0f}",
                f"{total / (GPU_TFLOPS * 1e12) / 3600:,.1f}",
            ]
            rows.append(cells)
    return markdown_table([*head, f"hours at {GPU_TFLOPS:.0f} TFLOP/s"], rows)
