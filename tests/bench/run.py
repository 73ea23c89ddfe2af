"""``make bench``: measure speed, memory, start-up and scaling.

Writes ``performance.json`` and ``speed.json`` in ``data/results``. Every measurement runs in a new
process. Compare values of one run on one machine only. Nothing else should run at the same time.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measures
import speed
import torch
import trainings
from performance_tables import read_performance

from diffad_lite.core.files import write_json
from diffad_lite.experiments.machine import machine_record

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "data" / "results" / "performance.json"
SPEEDS = OUT.with_name("speed.json")  # of all methods at inference; verdicts on claims use it
PAPER_SIZE = 256


def in_new_process(work: Callable, *arguments: Any) -> Any:
    """Return the result of a function that runs in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def against_diffusers() -> dict[str, Any]:
    """Measure time and memory of our network and that of diffusers, for each pair of stems."""
    pairs = {}
    for name in measures.PAIRS:
        pairs[name] = in_new_process(measures.pair, name)
        for side in ("ours", "theirs"):
            pairs[name][side]["mb"] = in_new_process(measures.training_memory, name, side)
    return pairs


def paper_profiles() -> dict[str, Any]:
    """Return method -> stage -> counted cost of the paper profile."""
    return {
        name: in_new_process(measures.stages, name, "paper", PAPER_SIZE)
        for name in trainings.PUBLISHED
    }


def predictions() -> dict[str, Any]:
    """Return image side -> counted and measured cost of a step of the lite denoiser."""
    return {str(size): in_new_process(measures.prediction, size) for size in (32, 64, 128, 256)}


def latency() -> dict[str, Any] | None:
    """Return the time from a key to the next image in the browser test; None without a browser."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"DIFFAD_BROWSER_OUT": folder}
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/browser", "--timeout=1800"],
            cwd=ROOT,
            env=env,
            check=True,
        )
        path = Path(folder) / "latency.json"
        return json.loads(path.read_text()) if path.exists() else None


TOPICS: dict[str, Callable[[], Any]] = {
    "speed": lambda: in_new_process(speed.measure_bundled, SPEEDS),
    "diffusers": against_diffusers,
    "metrics": lambda: in_new_process(measures.metrics),
    "start": lambda: in_new_process(measures.start),
    "scale": lambda: in_new_process(measures.scale),
    "predicted": predictions,
    "paper": paper_profiles,
    "latency": latency,
}


def main() -> None:
    """Measure the named topics, by default all; the records of other topics stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topics", nargs="*", help=f"some of {', '.join(TOPICS)}; default: all")
    chosen = parser.parse_args().topics or list(TOPICS)
    record = read_performance(OUT.parent)
    machine = machine_record(torch.device("cpu"))  # all measurements use it
    machine["versions"]["diffusers"] = version("diffusers")
    machine["load_before"] = round(os.getloadavg()[0], 2)
    for topic in chosen:
        print(f"{topic} ...", flush=True)
        result = TOPICS[topic]()
        print(json.dumps(result, indent=1), flush=True)
        if topic == "speed":  # it writes another file
            continue
        record[topic] = result
        record.setdefault("machines", {})[topic] = machine
        write_json(OUT, record)


if __name__ == "__main__":
    main()
