"""Describe this machine: for the record of every result, and for ``diffad doctor``."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from diffad_lite.core.config import Profile
from diffad_lite.data.datasets import bundled_checkpoints
from diffad_lite.methods import METHODS
from diffad_lite.methods.base import get_method
from diffad_lite.training import processes
from diffad_lite.training.loop import supports_bf16

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "diffad-lite")
MIN_FREE_GB = 2.0


def machine_record(device: torch.device) -> dict[str, Any]:
    """Return what the numbers of a run were computed on."""
    return {
        "peak_memory_mb": peak_memory_mb(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "versions": {"python": platform.python_version()} | {n: version(n) for n in LIBRARIES},
        "commit": _commit(),
    }


def peak_memory_mb(device: torch.device) -> float | None:
    """Return the peak memory of the GPU, else of the process; None if the system has no count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _commit() -> str | None:
    """Return the repository's commit, with ``+`` if files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", os.path.dirname(__file__), *arguments]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()

    try:
        changed = git("status", "--porcelain", "-uno")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _describe_gpu(device: torch.device) -> str:
    """Return the name of the GPU that is used, or why none is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.backends.mps.is_available():
        return (
            "Apple's (mps) is not used, as it has no float64, which the noise schedules need, and "
            "no result was checked on it; CPU is used"
        )
    return "none, CPU is used"


@dataclass(frozen=True)
class Check:
    """One line of ``diffad doctor``: what was checked, the outcome, and the fix."""

    ok: bool
    what: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"[{'OK' if self.ok else 'FAIL'}] {self.what}"
        return line if self.ok else f"{line}\n       fix: {self.fix}"


def run_checks() -> Iterator[Check]:
    """Check what a run needs, and what would make it faster."""
    python = platform.python_version()
    yield Check(sys.version_info >= (3, 11), f"Python {python}", "install Python 3.11 or newer")
    for name in (*LIBRARIES, "matplotlib", "jupyterlab", "ipywidgets", "papermill", "safetensors"):
        try:
            yield Check(True, f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Check(False, f"{name} is missing", "pip install -e . in the repository")
    device = processes.device()
    yield Check(True, f"GPU: {_describe_gpu(device)}")
    yield Check(True, f"threads: {torch.get_num_threads()} of {os.cpu_count()} cores")
    bf16 = "yes" if supports_bf16(device) else "no, training in float32 takes 2-3 times as long"
    yield Check(True, f"bfloat16: {bf16}")
    free = shutil.disk_usage(os.curdir).free / 1e9
    yield Check(free > MIN_FREE_GB, f"free disk: {free:.1f} GB", f"free {MIN_FREE_GB:.0f} GB")
    try:
        yield Check(True, f"bundled checkpoints: {', '.join(bundled_checkpoints()) or 'none'}")
    except FileNotFoundError as error:
        yield Check(False, "data folder", str(error))
    installed = importlib.util.find_spec("elpv_dataset") is not None
    yield Check(installed, "data set elpv (solar cells)", "pip install elpv-dataset")


def check_methods(profile: Profile, names: Sequence[str]) -> Iterator[Check]:
    """Check the files that methods need to train in a profile; all methods, if none is named.

    Raises:
        ValueError: unknown method or profile.
    """
    for name in names or METHODS:
        method = get_method(name)
        config = method.Config.for_profile(profile, channels=3, image_size=256)
        missing = list(method.find_missing(config))
        for message in missing:
            what, _, fix = message.partition("; ")
            yield Check(False, f"{name}, profile {profile}: {what}", fix)
        if not missing:
            yield Check(True, f"{name}, profile {profile}: all files are there")
