"""Tables of what ``make bench`` measured: against diffusers, targets, scale, and predicted costs.

The cost of a training is modelled by two lines. Seconds are operations over a rate that this
machine reached on the lite denoiser at the same image size; gigabytes are what autograd keeps of a
batch, and 22 bytes a weight (itself, gradient, two moments, average, and a copy in bfloat16).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffad_lite.config import read_json
from diffad_lite.results import METHOD_NAMES

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
    lines = [
        "| networks | weights, ours / theirs | ms a training step | faster | images a second | "
        "more | MB of training | less |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
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
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets_table(record: Record) -> str:
    """What has a target of its own: start-up, metrics, the sliders."""
    start, metrics = record["start"], record["metrics"]
    maps = f"{metrics['maps']} maps of {metrics['size']} x {metrics['size']}"
    rows = [
        ("`import diffad_lite`, beyond torch", f"{start['import diffad_lite']:.2f} s", "1 s"),
        (
            "`import diffad_lite.experiments`, beyond torch",
            f"{start['import diffad_lite.experiments']:.2f} s",
            "-",
        ),
        ("`diffad --help`", f"{start['diffad --help']:.2f} s", "1 s"),
        (f"all pixel metrics of {maps}", f"{metrics['seconds']:.1f} s", "5 s"),
        ("memory that they take beside the maps", f"{metrics['mb']:.0f} MB", "1000 MB"),
    ]
    if latency := record.get("latency"):
        found = f"{latency['median_ms']:.0f} ms, median of {latency['presses']}"
        rows.append(("from a key to the next picture of a slider", found, "200 ms"))
    lines = ["| what | measured | at most |", "| --- | --- | --- |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def scale_table(record: Record) -> str:
    """How cost grows; the lite denoiser, or AnoDDPM with it."""
    scale = record["scale"]
    rows = [
        ("training step, image side", "size", 1000),
        ("training step, batch", "batch", 1000),
        ("training step, training images", "images", 1000),
        ("scoring an image, noises averaged", "noises", 1),
    ]
    lines = ["| what grows | milliseconds |", "| --- | --- |"]
    for words, key, unit in rows:
        cells = ", ".join(f"{k}: {unit * v:.0f}" for k, v in scale[key].items())
        lines.append(f"| {words} | {cells} |")
    return "\n".join(lines)


def prediction_table(record: Record) -> str:
    """The model of costs beside what was measured: a step of the lite denoiser."""
    found = record["predicted"]
    rate = found["64"]["flops"] / found["64"]["seconds"]
    lines = [
        "| image side | GFLOP a step | seconds, predicted from 64 | measured | GB, predicted | "
        "measured |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size, one in found.items():
        cells = [size, f"{one['flops'] / 1e9:.0f}", f"{one['flops'] / rate:.3f}"]
        cells += [f"{one['seconds']:.3f}", f"{one['gb']:.2f}", f"{one['measured_gb']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paper_table(record: Record) -> str:
    """Predicted cost of the paper profiles' trainings."""
    largest = list(record["predicted"].values())[-1]
    rate = largest["flops"] / largest["seconds"]
    lines = [
        "| method | stage | weights | steps x batch | TFLOP a step | GB | hours here | "
        f"hours at {GPU_TFLOPS:.0f} TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
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
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
