"""``make bench``: speed, memory, start-up and scale, written to ``performance.json`` and
``speed.json`` in ``data/results``.

Every measure runs in a new process. Each figure is compared within one run on one machine; those
of two machines do not compare. Nothing else should run meanwhile.
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

from diffad_lite.core.files import write_json
from diffad_lite.evaluation.tables import read_performance
from diffad_lite.experiments.machine import machine_record

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "data" / "results" / "performance.json"
SPEEDS = OUT.with_name("speed.json")  # of every method at inference: claims are judged by it
PAPER_SIZE = 256


def alone(work: Callable, *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def against_diffusers() -> dict[str, Any]:
    """Time and memory of ours and theirs, for each pair of stems."""
    found = {}
    for name in measures.PAIRS:
        found[name] = alone(measures.pair, name)
        for side in ("ours", "theirs"):
            found[name][side]["mb"] = alone(measures.training_memory, name, side)
    return found


def paper_profiles() -> dict[str, Any]:
    """Method -> stage -> counted cost of the paper profile."""
    return {name: alone(measures.stages, name, "paper", PAPER_SIZE) for name in measures.PUBLISHED}


def predictions() -> dict[str, Any]:
    """Image side -> counted and measured cost of a step of the lite denoiser."""
    return {str(size): alone(measures.prediction, size) for size in (32, 64, 128, 256)}


def latency() -> dict[str, Any] | None:
    """From a key to another picture, as the browser test measures it; None without a browser."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"DIFFAD_BROWSER_OUT": folder}
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "tests/browser", "--timeout=1800"],
            cwd=ROOT,
            env=env,
            check=True,
        )
        found = Path(folder) / "latency.json"
        return json.loads(found.read_text()) if found.exists() else None


TOPICS: dict[str, Callable[[], Any]] = {
    "speed": lambda: alone(speed.measure_bundled, SPEEDS),
    "diffusers": against_diffusers,
    "metrics": lambda: alone(measures.metrics),
    "start": lambda: alone(measures.start),
    "scale": lambda: alone(measures.scale),
    "predicted": predictions,
    "paper": paper_profiles,
    "latency": latency,
}


def main() -> None:
    """Measure the topics that are named, all by default; the others keep what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topics", nargs="*", help=f"some of {', '.join(TOPICS)}; default: all")
    chosen = parser.parse_args().topics or list(TOPICS)
    record = read_performance(OUT.parent)
    machine = machine_record(torch.device("cpu"))  # where all of it is measured
    machine["versions"]["diffusers"] = version("diffusers")
    machine["load_before"] = round(os.getloadavg()[0], 2)
    for topic in chosen:
        print(f"{topic} ...", flush=True)
        found = TOPICS[topic]()
        print(json.dumps(found, indent=1), flush=True)
        if topic == "speed":  # it has a record of its own
            continue
        record[topic] = found
        record.setdefault("machines", {})[topic] = machine
        write_json(OUT, record)


if __name__ == "__main__":
    main()
