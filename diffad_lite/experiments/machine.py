"""What machine this is: the record that goes into every result, and ``diffad doctor``."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from diffad_lite.data.datasets import bundled_checkpoints
from diffad_lite.training import processes
from diffad_lite.training.loop import supports_bf16

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "diffad-lite")
MIN_FREE_GB = 2.0


def machine_record(device: torch.device) -> dict[str, Any]:
    """What the numbers were made on."""
    return {
        "peak_memory_mb": peak_memory_mb(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in LIBRARIES},
        "commit": _commit(),
    }


def peak_memory_mb(device: torch.device) -> float | None:
    """Largest memory so far: of the GPU, or of the process; None where the system cannot say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _commit() -> str | None:
    """The repository's commit, with ``+`` when files differ from it; None outside of git."""
    git = ["git", "-C", os.path.dirname(__file__)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, whether it is well, and the fix."""

    ok: bool
    what: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"[{'OK' if self.ok else 'FAIL'}] {self.what}"
        return line if self.ok else f"{line}\n       fix: {self.fix}"


def checks() -> Iterator[Check]:
    """Everything a run needs, and what would make it faster."""
    python = platform.python_version()
    yield Check(sys.version_info >= (3, 11), f"Python {python}", "install Python 3.11 or newer")
    for name in (*LIBRARIES, "matplotlib", "jupyterlab", "ipywidgets", "papermill", "safetensors"):
        try:
            yield Check(True, f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Check(False, f"{name} is missing", "pip install -e . in the repository")
    device = processes.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "none, CPU is used"
    yield Check(True, f"GPU: {name}")
    yield Check(True, f"threads: {torch.get_num_threads()} of {os.cpu_count()} cores")
    bf16 = "yes" if supports_bf16(device) else "no, training in float32 takes 2-3 times as long"
    yield Check(True, f"bfloat16: {bf16}")
    free = shutil.disk_usage(os.curdir).free / 1e9
    yield Check(free > MIN_FREE_GB, f"free disk: {free:.1f} GB", f"free {MIN_FREE_GB:.0f} GB")
    try:
        yield Check(True, f"bundled checkpoints: {', '.join(bundled_checkpoints()) or 'none'}")
    except FileNotFoundError as error:
        yield Check(False, "data folder", str(error))
    found = importlib.util.find_spec("elpv_dataset") is not None
    yield Check(found, "data set elpv (solar cells)", "pip install elpv-dataset")
