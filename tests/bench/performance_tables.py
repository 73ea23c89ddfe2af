"""``make tables``: render the records of ``make bench`` and ``make gpu`` into documents.

    python tests/bench/performance_tables.py docs/performance.md

The cost model of a training: seconds are operations over the rate that this machine reached on the
lite denoiser at the same image size; gigabytes are what autograd keeps of a batch, and 22 bytes per
weight (the weight, its gradient, two moments, average, and a copy in bfloat16).
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gpu_tables import gpu_tables, read_gpu
from numpy.typing import NDArray

from diffad_lite.core.files import read_json
from diffad_lite.evaluation.records import markdown_table, method_names
from diffad_lite.evaluation.tables import replace_tables, write_changed

RESULTS = Path(__file__).resolve().parents[2] / "data" / "results"
Record = Mapping[str, Any]
PAIRS = {  # name in measures.PAIRS -> name in tables
    "as used": "ours with its stem, theirs as it comes",
    "same stem": "both behind the same pixel-unshuffle",
    "no stem": "both without",
}
SCALES = {  # row of the table -> key of the record, milliseconds per recorded unit
    "training step, image side": ("size", 1000),
    "training step, batch": ("batch", 1000),
    "training step, training images": ("images", 1000),
    "scoring an image, noises averaged": ("noises", 1),
}
METRICS = {  # key of the record of metrics -> row of the table
    "aupimo": "AUPIMO",
    "pseudo_values": "values per image, for intervals of pixel metrics,",
}
GPU_TFLOPS = 100.0  # assumed, not measured: what a large GPU sustains in bfloat16


def read_performance(folder: str | Path) -> dict[str, Any]:
    """Read what ``make bench`` wrote to ``performance.json``, by topic; empty if it never ran.

    Raises ValueError if the file is broken.
    """
    path = Path(folder) / "performance.json"
    if not path.exists():
        return {}
    record = read_json(path, "record of performance")
    if not isinstance(record, dict):
        raise ValueError(f"{path} is no record of performance; run 'make bench' again")
    return record


def performance_tables(record: Record) -> dict[str, str]:
    """Render the topics that are recorded: table name -> Markdown.

    Raises ValueError if a topic lacks something.
    """
    topics = {"diffusers": diffusers_table, "start": targets_table, "scale": scale_table}
    topics |= {"predicted": prediction_table, "paper": paper_table}
    rendered = {}
    for topic, table in topics.items():
        if topic in record:
            try:
                rendered[f"performance-{topic}"] = table(record)
            except (KeyError, TypeError, AttributeError) as error:
                why = f"{type(error).__name__}: {error}"
                raise ValueError(f"performance.json, {topic}: {why}; run 'make bench'") from None
    return rendered


def diffusers_table(record: Record) -> str:
    """Compare speed and memory with diffusers' U-Net; ratios above 1 mean that ours is better."""
    head = ["networks", "weights, ours / theirs", "ms a training step", "faster"]
    head += ["images a second", "more", "MB of training", "less"]
    rows = []
    for pair, label in PAIRS.items():
        sides = [record["diffusers"][pair][side] for side in ("ours", "theirs")]
        weights, mb = ([side[key] for side in sides] for key in ("parameters", "mb"))
        step, images = ([np.array(side[key]) for side in sides] for key in ("step", "images"))
        rows.append(
            [
                label,
                "{:.2f} / {:.2f} M".format(*(w / 1e6 for w in weights)),
                "{:.0f} / {:.0f}".format(*(1000 * np.median(s) for s in step)),
                _spread(step[1] / step[0]),
                "{:.1f} / {:.1f}".format(*map(np.median, images)),
                _spread(images[0] / images[1]),
                "{:.0f} / {:.0f}".format(*mb),
                f"{mb[1] / mb[0]:.2f}",
            ]
        )
    return markdown_table(head, rows)


def _spread(ratios: NDArray) -> str:
    return f"{np.median(ratios):.2f} [{ratios.min():.2f}, {ratios.max():.2f}]"


def targets_table(record: Record) -> str:
    """Compare start-up, metrics and sliders with their targets."""
    start, metrics = record["start"], record["metrics"]
    maps = f"{metrics['maps']} maps of {metrics['size']} x {metrics['size']}"
    beyond = "import diffad_lite.experiments"
    rows = [
        ("`import diffad_lite`", f"{start['import diffad_lite']:.2f} s", "0.2 s"),
        (f"`{beyond}`, beyond torch", f"{start[beyond]:.2f} s", "-"),
        ("`diffad --help`", f"{start['diffad --help']:.2f} s", "1 s"),
        (f"all pixel metrics of {maps}", f"{metrics['seconds']:.1f} s", "5 s"),
        ("memory that they take beside the maps", f"{metrics['mb']:.0f} MB", "1000 MB"),
    ]
    for key, what in METRICS.items():
        if key in metrics:
            rows.append((f"{what} of {maps}", f"{metrics[key]:.1f} s", "5 s"))
    if "bootstrap" in metrics:
        what = "interval of a difference of two methods, 430 images, three seeds"
        rows.append((what, f"{metrics['bootstrap']:.2f} s", "0.5 s"))
    if latency := record.get("latency"):
        measured = f"{latency['median_ms']:.0f} ms, median of {latency['presses']}"
        rows.append(("from a key to the next picture of a slider", measured, "200 ms"))
    return markdown_table(["what", "measured", "at most"], rows)


def scale_table(record: Record) -> str:
    """Show how cost grows, for the lite denoiser or AnoDDPM with it."""
    rows = [
        (label, ", ".join(f"{k}: {unit * v:.0f}" for k, v in record["scale"][key].items()))
        for label, (key, unit) in SCALES.items()
    ]
    return markdown_table(["what grows", "milliseconds"], rows)


def prediction_table(record: Record) -> str:
    """Compare the cost model with measurements: one training step of the lite denoiser."""
    costs = record["predicted"]
    rate = costs["64"]["flops"] / costs["64"]["seconds"]
    head = ["image side", "GFLOP a step", "seconds, predicted from 64", "measured"]
    rows = []
    for size, cost in costs.items():
        cells = [size, f"{cost['flops'] / 1e9:.0f}", f"{cost['flops'] / rate:.3f}"]
        cells += [f"{cost['seconds']:.3f}", f"{cost['gb']:.2f}", f"{cost['measured_gb']:.2f}"]
        rows.append(cells)
    return markdown_table([*head, "GB, predicted", "measured"], rows)


def paper_table(record: Record) -> str:
    """Predict the cost of training with the paper profiles."""
    largest = list(record["predicted"].values())[-1]
    rate = largest["flops"] / largest["seconds"]
    head = ["method", "stage", "weights", "steps x batch", "TFLOP a step", "GB", "hours here"]
    rows = []
    for method, stages in record["paper"].items():
        for stage, cost in stages.items():
            total = cost["steps"] * cost["flops"]
            cells = [method_names()[method], stage.replace("_", " ")]
            cells += [f"{cost['parameters'] / 1e6:.1f} M", f"{cost['steps']:,} x {cost['batch']}"]
            cells += [f"{cost['flops'] / 1e12:.2f}", f"{cost['gb']:.1f}"]
            cells += [f"{total / r / 3600:,.{d}f}" for r, d in ((rate, 0), (GPU_TFLOPS * 1e12, 1))]
            rows.append(cells)
    return markdown_table([*head, f"hours at {GPU_TFLOPS:.0f} TFLOP/s"], rows)


def rendered_tables() -> dict[str, str]:
    """Render all tables of the records in ``data/results``."""
    tables = performance_tables(read_performance(RESULTS))
    return tables | {"performance-gpu": gpu_tables(read_gpu(RESULTS))}


def main() -> None:
    """Refresh the marked tables of documents."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("documents", nargs="+", type=Path, help="Markdown files to refresh")
    documents = parser.parse_args().documents
    rendered = rendered_tables()
    for path in write_changed({path: replace_tables(path, rendered) for path in documents}):
        print(f"rendered {path}")


if __name__ == "__main__":
    main()
