"""The record that ``make gpu`` wrote, as Markdown tables and as a figure."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from diffad_lite.core.files import read_json
from diffad_lite.evaluation.records import markdown_table, method_names
from diffad_lite.plots import COLOURS, Result, styled

Record = Mapping[str, Any]
NO_RECORD = (
    "No GPU run has been recorded yet. `make gpu` on a machine with a GPU makes one in `runs/gpu`."
)
VARIANTS = {  # name -> marker of the figure; colours follow in this order
    "bf16": "o",
    "bf16, larger batch": "D",
    "float32, TF32": "s",
    "float32": "^",
}
PRECISIONS = {"bf16": "bf16", "tf32": "float32, TF32", "float32": "float32"}


def read_gpu(folder: str | Path) -> dict[str, Any] | None:
    """Read the record of a GPU; None if there is none.

    Raises ValueError if the file is broken, or is the record of a smoke test.
    """
    path = Path(folder) / "gpu.json"
    if not path.exists():
        return None
    record = read_json(path, "record of a GPU")
    if not isinstance(record, dict) or record.get("smoke") is not False:
        raise ValueError(f"{path} is no record of a GPU; take the gpu.json of 'make gpu'")
    return record


def rows_of(record: Record) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield method, stage, variant and cost of each stage that was trained."""
    for result in record["measurements"].values():
        if result.get("kind") != "training":
            continue
        variant = PRECISIONS[result["variant"]]
        variant += ", larger batch" if result["larger_batch"] else ""
        for stage, cost in result["stages"].items():
            yield method_names()[result["method"]], stage.replace("_", " "), variant, cost


def gpu_tables(record: Record | None) -> str:
    """Render the record: the machine, then trainings, scoring, quality and processes.

    Raises ValueError if the record lacks something.
    """
    if record is None:
        return NO_RECORD
    try:
        parts = [heading(record), training_table(record), inference_table(record)]
        return "\n\n".join([*parts, *remarks(record)])
    except (KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"gpu.json: {why}; call 'make gpu' again") from None


def heading(record: Record) -> str:
    """Name the machine and what all numbers share."""
    m = record["machine"]
    sizes = {
        r["image_size"] for r in record["measurements"].values() if r.get("kind") == "training"
    }
    return (
        f"{m['device']}, PyTorch {m['versions']['torch']}, commit {m['commit']}; images of "
        f"{', '.join(map(str, sorted(sizes)))} pixels a side; epochs are those of "
        f"{record['n_images']} images. {'; '.join(record['notes'])}."
    )


def training_table(record: Record) -> str:
    """Show seconds and memory of a training step, and the hours of the whole training."""
    rows = []
    for method, stage, variant, cost in rows_of(record):
        cells = [method, stage, variant, str(cost["batch"]), f"{cost['profile_steps']:,}"]
        if cost.get("out_of_memory"):
            cells += ["out of memory", "-", "-"]
        elif "seconds" in cost:
            cells += [f"{cost[key]:.{d}f}" for key, d in (("seconds", 3), ("peak_gib", 1))]
            cells += [f"{cost['hours']:,.1f}"]
        else:  # stopped at its limit
            cells += ["not measured", "-", "-"]
        rows.append(cells)
    head = ["method", "stage", "precision", "batch", "steps of the profile", "s per step", "GiB"]
    return markdown_table([*head, "hours in all"], rows)


def inference_table(record: Record) -> str:
    """Show the cost of scoring an image."""
    rows = []
    for result in record["measurements"].values():
        if result.get("kind") == "inference" and "seconds" in result:
            cells = [method_names()[result["method"]], f"{result['network_evaluations']:.0f}"]
            rows.append([*cells, f"{result['seconds']:.3f}", f"{result['peak_gib']:.1f}"])
    return markdown_table(["method", "network evaluations", "s per image", "GiB"], rows)


def remarks(record: Record) -> Iterator[str]:
    """Say how good short trainings were, and whether accelerate changes a training."""
    for result in record["measurements"].values():
        if result.get("kind") == "quality" and "image_auroc" in result:
            low, high = result["image_auroc_ci"]
            yield (
                f"{method_names()[result['method']]}, {result['profile']} profile, "
                f"{result['image_size']} pixels, {result['train_steps']:,.0f} steps in "
                f"{result['train_seconds']:.0f} s: image AUROC {result['image_auroc']:.3f} "
                f"[{low:.3f}, {high:.3f}] on {result['n_test']} test images of {result['dataset']}."
            )
        if pool := result.get("pool"):
            yield f"GRAD draws its pool of {pool['images']} images in {pool['hours']:.2f} hours."
        if result.get("kind") == "launch" and "largest_difference" in result:
            yield (
                "`accelerate launch --num_processes 1` trains as without it: the losses differ by "
                f"at most {result['largest_difference']:.1g}."
            )


# ---------------------------------------------------------------------------------- figure


@styled
def draw_costs(record: Record) -> Result:
    """Draw seconds per training step and hours of the whole training, on logarithmic axes."""
    costs = [row for row in rows_of(record) if {"seconds", "out_of_memory"} & row[3].keys()]
    labels = list(dict.fromkeys(f"{method}, {stage}" for method, stage, _, _ in costs))
    plt.rcParams["font.size"] = 14
    fig, axes = plt.subplots(1, 2, sharey=True, figsize=(14, 2.4 + 0.42 * len(labels)))
    for ax, key in zip(axes, ("seconds", "hours"), strict=True):
        for (variant, marker), colour in zip(VARIANTS.items(), COLOURS, strict=False):
            points = [
                (cost[key], labels.index(f"{m}, {stage}"))
                for m, stage, v, cost in costs
                if v == variant and key in cost
            ]
            if points:
                ax.plot(*zip(*points, strict=True), marker, color=colour, label=variant, ms=10)
        _finish(ax, labels)
    for method, stage, variant, cost in costs:
        if "out_of_memory" in cost:
            where = axes[0].get_yaxis_transform()
            row = labels.index(f"{method}, {stage}")
            axes[0].text(0.02, row, f"{variant}: out of memory", va="center", transform=where)
    axes[0].set_xlabel("seconds per training step")
    axes[1].set_xlabel("hours of the whole training, modelled")
    axes[0].invert_yaxis()
    axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    m, smoke = record["machine"], "Smoke test with tiny networks: no claim about speed. "
    what = f"{m['device']}, PyTorch {m['versions']['torch']}; medians of steps in one run"
    fig.suptitle((smoke if record["smoke"] else "Paper profiles: ") + what, fontsize=16)
    return fig, {"labels": labels, "costs": costs}


def _finish(ax: Axes, labels: list[str]) -> None:
    """Set the axes of a panel: rows are stages, the scale is logarithmic."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xscale("log")
    ax.grid(axis="both", color="0.88", linewidth=0.8)
    ax.set_axisbelow(True)
