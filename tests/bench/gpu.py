"""``make gpu``: measure on one GPU what the paper profiles cost, and that trainings work there.

Writes ``gpu.json`` and ``gpu.png`` into a folder, in at most eight minutes. A second call measures
only what is missing or failed; on another machine or commit it starts anew. To publish a record,
copy ``gpu.json`` to ``data/results`` and call ``make tables``.

Without a GPU all parts run with tiny networks: ``smoke.json`` says nothing about speed.

Nothing is downloaded. On a machine without the package elpv-dataset, give ``--root`` a folder that
``--export`` wrote elsewhere. On a copy without git, name its ``--commit``.
"""

import argparse
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_measures import SMOKE_SIZE, inference, launch, quality, training
from gpu_tables import draw_costs
from PIL import Image
from trainings import N_IMAGES, NO_DOWNLOADS, PUBLISHED

from diffad_lite.core.files import read_json, write_atomically, write_json
from diffad_lite.data.datasets import load_dataset
from diffad_lite.experiments.machine import machine_record
from diffad_lite.experiments.run import Run
from diffad_lite.training import loop, processes

MINUTES, SMOKE_MINUTES = 8.0, 5.0  # a smoke test takes less than one minute on two idle cores
SMOKE_PATIENCE = 4.0  # its limits are longer: it must not fail on a busy machine
BATCH_OF_ONE = ("anoddpm", "glad")  # in their papers; measured with a larger batch, too
IN_FLOAT32 = ("anoddpm", "diffusionad")  # measured in float32, too
TRAINING_PRECISION = "trainings are in bfloat16 autocast, unless a variant is named"
SCORING_PRECISION = "scoring is in float32 without TF32"
TINY = "smoke test with tiny networks: no time here says anything about the paper profiles"


class TimeIsUp(Exception):
    """A measurement has reached its limit."""


@dataclass(frozen=True)
class Measurement:
    """A measurement: its name, the function that fills its result, its limit in seconds."""

    name: str
    work: Callable[[dict[str, Any]], None]
    limit: float


def plan(smoke: bool, root: str | None) -> list[Measurement]:
    """Return all measurements, the most valuable first; their limits add up to eight minutes."""
    of = {"dataset": "elpv", "category": "mono"} if root is None else {"dataset": "folder"}
    of |= {"root": root, "profile": "ci" if smoke else "lite"}
    runs = [
        Run("anoddpm", image_size=SMOKE_SIZE if smoke else 64, **of),
        Run("diffusionad", image_size=SMOKE_SIZE if smoke else 128, **of),
    ]
    scored = [Measurement(f"quality {r.method}", partial(quality, run=r), 75) for r in runs]
    train = {n: partial(training, name=n, smoke=smoke) for n in PUBLISHED}
    predict = {n: partial(inference, name=n, smoke=smoke) for n in PUBLISHED}
    return [
        *(Measurement(f"train {n}", work, 22) for n, work in train.items()),
        scored[0],
        *(Measurement(f"predict {n}", work, 15) for n, work in predict.items()),
        Measurement("launch", launch, 40),
        *(
            Measurement(f"train {n}, larger batch", partial(train[n], larger=True), 10)
            for n in BATCH_OF_ONE
        ),
        scored[1],
        *(
            Measurement(f"train {n}, {variant}", partial(train[n], variant=variant), 12)
            for n in IN_FLOAT32
            for variant in ("tf32", "float32")
        ),
    ]


# ------------------------------------------------------------------------------- the record


def describe_machine(commit: str | None) -> dict[str, Any]:
    """Return what all numbers of a record depend on."""
    device = processes.device()
    known = machine_record(device)
    machine = {key: known[key] for key in ("device", "threads", "versions")}
    machine |= {"commit": commit or known["commit"], "cores": os.cpu_count()}
    machine |= {"bf16": loop.supports_bf16(device), "cuda": torch.version.cuda}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine |= {"gpu_gib": gpu.total_memory / 2**30, "tf32": gpu.major >= 8}
        machine["capability"] = f"{gpu.major}.{gpu.minor}"
    return machine


def open_record(path: Path, smoke: bool, machine: dict[str, Any]) -> dict[str, Any]:
    """Read the record of this machine and commit, or begin a new one."""
    if path.exists():
        record = read_json(path, "record of a GPU")
        if record["machine"] == machine:
            return record
        print(f"{path} is of another machine or commit; all is measured anew")
    notes = [*NO_DOWNLOADS, TRAINING_PRECISION, SCORING_PRECISION, *([TINY] if smoke else [])]
    head = {"smoke": smoke, "machine": machine, "n_images": N_IMAGES, "notes": notes}
    return head | {"measurements": {}}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeIsUp` inside the block once ``seconds`` have passed."""

    def stop(signum: int, frame: Any) -> None:
        raise TimeIsUp(f"stopped after {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def measure(
    record: dict[str, Any], path: Path, measurements: list[Measurement], minutes: float
) -> bool:
    """Measure what is missing, and write the record after each; return whether all is there."""
    results, deadline = record["measurements"], time.monotonic() + 60 * minutes
    for m in measurements:
        if m.name in results and "error" not in results[m.name]:
            continue
        patience = SMOKE_PATIENCE if record["smoke"] else max(1.0, minutes / MINUTES)
        limit = min(m.limit * patience, deadline - time.monotonic())
        if limit < 1:
            break
        result = results[m.name] = {}
        started = time.monotonic()
        try:
            with time_limit(limit):
                m.work(result)
        except torch.OutOfMemoryError:
            result["out_of_memory"] = True
        except Exception as error:  # the others are still worth their time on a GPU
            result["error"] = f"{type(error).__name__}: {error}"[:300]
        result["took_s"] = round(time.monotonic() - started, 1)
        print(f"{m.name}: {result.get('error', 'done')} ({result['took_s']} s)", flush=True)
        write_json(path, record)
        gc.collect()
        torch.cuda.empty_cache()
    names = {m.name for m in measurements}
    return names <= results.keys() and not any("error" in results[n] for n in names)


def export_cells(folder: Path, side: int = 128) -> None:
    """Write the cells of elpv mono as PNG, split as always, for a machine without that package."""
    data = load_dataset("elpv", "mono", image_size=side)
    parts = {"train/good": data.train, "calibration/good": data.calibration}
    for label, kind in enumerate(("good", "defect")):
        parts[f"test/{kind}"] = data.test_images[torch.as_tensor(data.test_labels) == label]
    for part, images in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(((images[:, 0] + 1) * 127.5).round().byte().numpy()):
            Image.fromarray(pixels).save(folder / part / f"{i:04}.png")


def main() -> int:
    """Measure what is missing in the record; return 1 while something is missing or failed."""
    smoke = not torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the record")
    parser.add_argument("--minutes", type=float, default=SMOKE_MINUTES if smoke else MINUTES)
    parser.add_argument("--smoke", action="store_true", help="tiny networks also on a GPU")
    parser.add_argument("--root", help="folder of images in place of the package elpv-dataset")
    parser.add_argument(
        "--export", type=Path, help="only write the cells of elpv mono into this folder"
    )
    parser.add_argument("--commit", help="of this copy, where there is no git")
    arguments = parser.parse_args()
    if arguments.export is not None:
        export_cells(arguments.export)
        return 0
    if smoke:
        print("No GPU: a smoke test with tiny networks, which says nothing about speed.")
    smoke = smoke or arguments.smoke
    path = arguments.out / ("smoke.json" if smoke else "gpu.json")
    record = open_record(path, smoke, describe_machine(arguments.commit))
    complete = measure(record, path, plan(smoke, arguments.root), arguments.minutes)
    figure, _ = draw_costs(record)
    write_atomically(path.with_suffix(".png"), partial(figure.savefig, dpi=150))
    print(f"{path} is {'complete' if complete else 'not complete: call again'}")
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
