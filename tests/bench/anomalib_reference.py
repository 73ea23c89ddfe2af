"""Compute AUPIMO and AUPRO of random maps by anomalib, which is no dependency of this project.

``python tests/bench/anomalib_reference.py`` builds a virtual environment in a temporary folder,
installs anomalib there and writes `REFERENCE`, which ``tests/evaluation/test_metrics.py`` compares
with our metrics. The packages of this Python are visible there, so torch is not downloaded again.

anomalib approximates both metrics: AUPIMO by evenly spaced thresholds and by the false-positive
rates nearest to its bounds, AUPRO by resampling the curve of each region. These maps make both
exact: scores are evenly spaced, every score occurs on normal pixels, all regions have equally many
scores above those, and one score reaches each bound.
"""

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ANOMALIB = "anomalib==2.7.0"
REFERENCE = Path(__file__).resolve().parents[1] / "evaluation" / "anomalib_reference.json"
LIMITS = (0.05, 0.3)  # of AUPRO
N_NORMAL, N_ANOMALOUS, SIDE = 20, 5, 100
N = N_NORMAL * SIDE**2  # normal pixels: 2 are a false-positive rate of 1e-5
TIES = {  # ranks of normal pixels, highest first, at which a new score starts
    "none": np.arange(N),
    "pairs": np.arange(0, N, 2),
    "few scores": np.array([0, 2, 6, 20, 200, 2000, 4000, 10_000, 12_000, 56_000, 60_000, 72_000]),
}
DEFECTS = ("random", "at most normal", "random", "constant", "perfect")
CONSTANT_RANKS = (4, 5000, 70_000, 100_000, 150_000)  # of the anomalous maps


def recipe(seed: int) -> dict[str, Any]:
    """Return the arguments of `random_maps` for a set: all pairs of kinds within 15 seeds."""
    return {
        "seed": seed,
        "ties": list(TIES)[seed % len(TIES)],
        "defects": DEFECTS[seed % len(DEFECTS)],
    }


def random_maps(seed: int, ties: str, defects: str) -> tuple[NDArray, NDArray, int]:
    """Make masks, maps (each (25, 100, 100), maps in [0, 1]) and the number of normal scores.

    Only ``rng.random`` is used, whose stream NumPy keeps. Scores are multiples of a power of two.
    """
    rng = np.random.default_rng(seed)
    masks = np.zeros((N_NORMAL + N_ANOMALOUS, SIDE, SIDE), bool)
    starts = []
    for mask in masks[N_NORMAL:]:  # a square of 1,600 pixels, and two blocks that touch diagonally
        y, x, v, w = (rng.random(4) * [60, 10, 80, 5]).astype(int)
        mask[y : y + 40, x : x + 40] = True
        mask[v : v + 10, w + 55 : w + 75] = mask[v + 10 : v + 20, w + 75 : w + 95] = True
        starts += [(y, x), (v, w + 55)]
    ranks = np.zeros(masks.shape)  # as if among the normal pixels; -1 is above all of them
    ranks[:N_NORMAL] = rng.random(N).argsort().reshape(N_NORMAL, SIDE, SIDE)
    background, inside = ~masks, masks.copy()
    background[:N_NORMAL] = False
    n_background = int(background.sum())
    ranks[background] = rng.random(n_background).argsort() * (N / n_background)
    strength = 0.3 + 6 * rng.random((N_ANOMALOUS, 1, 1))  # of the defects of an image
    draws = rng.random((N_ANOMALOUS, SIDE, SIDE)) ** strength
    ranks[inside] = (np.floor(N**draws) - 1)[masks[N_NORMAL:]]
    if defects == "random":
        ranks[inside] -= rng.random(inside.sum()) < 0.1
        for i, (y, x) in enumerate(starts):
            ranks[N_NORMAL + i // 2, y, x] = -1
    elif defects == "at most normal":
        ranks[inside] = np.maximum(ranks[inside], 0)
    elif defects == "constant":
        ranks[N_NORMAL:] = np.reshape(CONSTANT_RANKS, (-1, 1, 1))
    else:
        ranks[inside] = -1
    n_scores = len(TIES[ties])
    level = n_scores - np.searchsorted(TIES[ties], ranks, side="right")
    return masks, level / 2.0 ** n_scores.bit_length(), n_scores


def digest(masks: NDArray, maps: NDArray) -> str:
    """Return a hash of masks and maps: equal if NumPy drew the same numbers."""
    return hashlib.sha256(masks.tobytes() + maps.astype("<f8").tobytes()).hexdigest()[:16]


def compute(path: Path) -> None:
    """Write the reference; runs inside the environment that has anomalib."""
    import torch
    from anomalib.metrics.aupro import _AUPRO
    from anomalib.metrics.pimo.functional import aupimo_scores

    sets = []
    for seed in range(20):
        masks, maps, n_scores = random_maps(**recipe(seed))
        tensors = torch.from_numpy(maps), torch.from_numpy(masks)
        areas = aupimo_scores(*tensors, num_thresholds=n_scores, force=True)[4][N_NORMAL:]
        values: dict[str, Any] = {"digest": digest(masks, maps), "aupimo": areas.tolist()}
        for limit in LIMITS:
            metric = _AUPRO(fpr_limit=limit)
            metric.update(tensors[0], tensors[1].int())
            values[f"aupro_{limit}"] = float(metric.compute())
        sets.append(recipe(seed) | values)
        print(json.dumps(sets[-1]))
    packages = ("anomalib", "torch", "torchmetrics", "numpy", "opencv-python-headless")
    versions = {name: importlib.metadata.version(name) for name in packages}
    path.write_text(json.dumps({"versions": versions, "sets": sets}, indent=1) + "\n")


def main() -> None:
    """Build the environment, and run `compute` there; exits with a message if pip fails."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        packages = Path(sysconfig.get_path("purelib", vars={"base": folder}))
        (packages / "this_python.pth").write_text(sysconfig.get_path("purelib") + "\n")
        print(f"installing {ANOMALIB} in {folder}: about 500 MB")
        installed = subprocess.run([python, "-m", "pip", "install", "-q", ANOMALIB])
        if installed.returncode:
            sys.exit(
                f"pip could not install {ANOMALIB} (exit status {installed.returncode}, message "
                "above): check the network, the index (`pip config list`) and the free disk space. "
                f"{REFERENCE.name} is unchanged."
            )
        subprocess.run([python, __file__, "--inside"], check=True)


if __name__ == "__main__":
    compute(REFERENCE) if sys.argv[1:] == ["--inside"] else main()
