"""The measurements of ``make gpu``: each fills a result, so that a part stays if it is stopped.

Steps are those of the package's own loop and losses. Networks have random weights.
"""

import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from trainings import N_IMAGES, fit_stages, offline_config

from diffad_lite.core.config import field_names, with_values
from diffad_lite.data.datasets import load_dataset
from diffad_lite.experiments.evaluate import evaluate, train
from diffad_lite.experiments.run import Run
from diffad_lite.methods.base import METHODS, MethodConfig
from diffad_lite.training import loop, processes
from diffad_lite.training.loop import LossFunction, TrainReport, train_network
from diffad_lite.training.state import TrainConfig

PAPER_SIZE, SMOKE_SIZE = 256, 32
WARM_UP, TIMED = 3, 10  # training steps; a smoke test times two without a warm-up
TIMED_IN_FLOAT32 = 3  # which is slow
LARGER_BATCH = 16  # where the paper's is 1
N_PREDICTED = 2  # images scored at once
BUDGET = 50.0  # seconds of a training whose quality is measured
PATTERNS = 8  # images of GRAD's pool that each of its networks draws here
NOT_TRAINED = TrainReport(0, 0.0, torch.zeros(0))
QUALITY = "profile image_size n_train n_test train_seconds train_steps image_auroc image_auroc_ci"
AT_MOST = {  # fields of the paper profiles in a smoke test; group norms need multiples of 32
    "denoiser.base_channels": 32,
    "denoiser.blocks_per_level": 1,
    "segmentation.base_channels": 8,
    "autoencoder.base_channels": 32,
    "autoencoder.blocks_per_level": 1,
    "autoencoder.codeword": 32,
    "base_channels": 32,
    "blocks_per_level": 1,
    "width": 32,
    "extra": 0,
    "weights.n_clusters": 2,
    "input_size": 32,
    "steps": 2,  # network evaluations
}
INSTEAD = {
    **dict.fromkeys(("backbone", "drift_features", "map_features"), "resnet18"),
    "blocks": [1, 2],
    "stride": 100,
}


# ------------------------------------------------------------------------------- cost model


def training_hours(
    seconds: float, config: TrainConfig, batch: int, n_images: int = N_IMAGES
) -> float:
    """Return the hours of a whole training that sees as many images as the profile's.

    Args:
        seconds: of a training step.
        config: of the profile.
        batch: images in that step; a larger batch than the profile's needs fewer steps.
        n_images: training images, for profiles that count epochs.
    """
    return config.total_steps(n_images) * config.batch_size / batch * seconds / 3600


def spread(times: list[float]) -> dict[str, Any]:
    """Return the median of times in seconds, their minimum and maximum, and their number."""
    ends = [min(times), max(times)]
    return {"seconds": statistics.median(times), "seconds_range": ends, "n_times": len(times)}


# ----------------------------------------------------------------------------- measurements


def paper_config(name: str, smoke: bool) -> MethodConfig:
    """Return the paper profile for MVTec's bottle, without downloads; tiny for a smoke test."""
    size = SMOKE_SIZE if smoke else PAPER_SIZE
    config = offline_config(name, "paper", size, dataset="folder", category="bottle")
    known, changes = field_names(config), {}
    if smoke:
        limits = AT_MOST | {n: 2 for n in known if n.endswith("batch_size")}
        values = {n: attrgetter(n)(config) for n in known if n in limits}
        changes = {n: min(limits[n], v) for n, v in values.items() if v is not None}
        changes |= {n: value for n, value in INSTEAD.items() if n in known}
    if name == "grad":
        parts = changes.get("blocks", config.blocks)
        changes["n_patterns"] = (2 if smoke else PATTERNS) * len(parts)
    return with_values(config, changes)


def pictures(size: int, n: int) -> Tensor:
    """Return drawn objects (n, 3, size, size): speed does not depend on the kind of object."""
    return load_dataset("shapes", image_size=size).train[:n].expand(-1, 3, -1, -1).contiguous()


def peak_gib(reset: bool = False) -> float | None:
    """Return the peak of allocated GPU memory since the latest reset; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 2**30


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Train as usual (``bf16``), or in float32 with (``tf32``) or without TF32 (``float32``)."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    with contextlib.ExitStack() as stack:
        if name != "bf16":
            stack.enter_context(mock.patch.object(loop, "supports_bf16", lambda device: False))
            for switch in switches:
                switch.allow_tf32 = name == "tf32"
        try:
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.allow_tf32 = value


def training(
    result: dict[str, Any], name: str, smoke: bool, variant: str = "bf16", larger: bool = False
) -> None:
    """Time some steps of each stage by the package's loop and losses; stages fill up in turn.

    ``larger``: only stages with a batch of 1, with a larger one. Out of memory is a result.
    """
    config = paper_config(name, smoke)
    method, stages = METHODS[name](config), {}
    method.network.to(processes.device())
    images = pictures(config.image_size, 4 if smoke else 16)
    warm_up, n_timed = (0, 2) if smoke else (WARM_UP, TIMED)
    if variant != "bf16":
        n_timed = min(n_timed, TIMED_IN_FLOAT32)
    result |= {"kind": "training", "method": name, "variant": variant, "stages": stages}
    result |= {"image_size": config.image_size, "larger_batch": larger}

    def timed(network, loss, data, full, *, stage="train", **options):
        if larger and full.batch_size > 1:
            return NOT_TRAINED
        batch = LARGER_BATCH if larger else full.batch_size
        stages[stage] = cost = {"batch": batch, "profile_steps": full.total_steps(N_IMAGES)}
        cost["parameters"] = sum(p.numel() for p in network.parameters())
        steps, starts = warm_up + n_timed + 1, []
        few = replace(full, steps=steps, epochs=None, batch_size=batch)
        peak_gib(reset=True)
        try:
            marked = with_clock(loss, starts)
            return train_network(network, marked, data, few, stage=stage, **options)
        except torch.OutOfMemoryError:
            cost["out_of_memory"] = True
            network.zero_grad()
            return NOT_TRAINED
        finally:  # steps before a time limit count, too
            if times := [b - a for a, b in itertools.pairwise(starts)][warm_up:]:
                cost |= spread(times) | {"peak_gib": peak_gib()}
                cost["hours"] = training_hours(cost["seconds"], full, batch)

    with precision(variant):
        fit_stages(method, images, timed)
        result["autocast"] = "bfloat16" if loop.supports_bf16(method.device) else "none"
    if name == "grad" and not larger:
        n = offline_config(name, "paper", PAPER_SIZE).n_patterns
        started = time.perf_counter()
        method.draw_pool(images, 0)
        each = (time.perf_counter() - started) / config.n_patterns
        result["pool"] = {"seconds_per_image": each, "images": n, "hours": n * each / 3600}


def with_clock(loss: LossFunction, starts: list[float]) -> LossFunction:
    """Return the same loss; ``starts`` gets the time in seconds at the start of each step."""

    def marked(network: nn.Module, batch: Tensor, generator: torch.Generator) -> Tensor:
        starts.append(time.perf_counter())  # the step before has read its loss from the GPU
        return loss(network, batch, generator)

    return marked


def inference(result: dict[str, Any], name: str, smoke: bool) -> None:
    """Time the scoring of a few images in float32, with random weights in all networks."""
    config = paper_config(name, smoke)
    method = METHODS[name](config)
    method.network.to(processes.device())
    method.network.eval()
    images = pictures(config.image_size, N_PREDICTED)
    result |= {"kind": "inference", "method": name, "image_size": config.image_size}
    peak_gib(reset=True)
    times: list[float] = []
    with method.count_evaluations() as evaluations:
        while len(times) < (1 if smoke else 4) and sum(times) * len(images) < 5:
            started = time.perf_counter()
            method.predict(images)
            times.append((time.perf_counter() - started) / len(images))
            result["network_evaluations"] = evaluations[0] / len(times) / len(images)
            result |= spread(times[1:] or times)  # the first call is the warm-up
            result |= {"batch": len(images), "peak_gib": peak_gib()}


def quality(result: dict[str, Any], run: Run) -> None:
    """Train in a limited time and score real test images: the code path of ``diffad evaluate``."""
    result |= {"kind": "quality", "method": run.method, "dataset": run.dataset, "budget": BUDGET}
    with tempfile.TemporaryDirectory() as folder:
        scored = evaluate(run, folder, budget=BUDGET, progress=False)
    result |= {key: scored[key] for key in QUALITY.split()}
    result["autocast"] = "bfloat16" if loop.supports_bf16(processes.device()) else "none"


def launch(result: dict[str, Any]) -> None:
    """Train by ``accelerate launch`` with one process, and without it; compare the losses."""
    run = Run("anoddpm", "shapes", profile="ci", image_size=32)
    words = "accelerate.commands.launch --num_processes 1 -m diffad_lite.cli train --quiet"
    words += f" --method {run.method} --dataset {run.dataset} --profile ci --image-size 32 --out"
    with tempfile.TemporaryDirectory() as parent:
        folders = Path(parent) / "alone", Path(parent) / "accelerate"
        train(run, run.load_data(), folders[0], progress=False)
        command = [sys.executable, "-m", *words.split(), str(folders[1])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"accelerate launch failed: {done.stderr.strip()[-200:]}")
        states = [load_file(f / "state" / "diffusion.state.safetensors") for f in folders]
    alone, launched = (state["losses"] for state in states)
    result |= {"kind": "launch", "steps": len(alone)}
    result |= {"losses": {"alone": alone.tolist(), "accelerate": launched.tolist()}}
    result["largest_difference"] = float((alone - launched).abs().max())
