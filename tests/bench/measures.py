"""The measurements of ``make bench``: one function per topic.

:mod:`run` calls each in a new process, so that memory and start-up are not shared.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers_twin as twin
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from trainings import N_IMAGES, fit_stages, offline_config

from diffad_lite.evaluation.metrics import aupimo, paired_bootstrap_auroc, pixel_metrics
from diffad_lite.evaluation.pseudo_values import pixel_pseudo_values
from diffad_lite.experiments.machine import peak_memory_mb
from diffad_lite.methods.base import METHODS
from diffad_lite.training.loop import TrainReport, supports_bf16
from diffad_lite.training.state import TrainConfig

BATCH, SIZE = 16, 64
BYTES_PER_WEIGHT = 4 * 5 + 2  # weight, gradient, Adam's two moments, average; a bfloat16 copy


def megabytes() -> float:
    """Return the peak memory of this process."""
    return peak_memory_mb(torch.device("cpu")) or 0.0


def images(n: int = 64, size: int = SIZE) -> Tensor:
    """Return random images (n, 1, size, size) in [-1, 1]; speed does not depend on the content."""
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ------------------------------------------------------------------------ against diffusers

PAIRS = {  # name -> pixel-unshuffle of our network, of that of diffusers
    "as used": (2, 1),  # each with its default
    "same stem": (2, 2),
    "no stem": (1, 1),
}


def pair(name: str, rounds: int = 10, steps: int = 8) -> dict[str, Any]:
    """Measure seconds per training step and sampled images per second, both networks in turn."""
    ours, theirs = twin.our_network(PAIRS[name][0]), twin.Unshuffled(PAIRS[name][1], SIZE)
    shape, data = (BATCH, 1, SIZE, SIZE), images()
    results: dict[str, Any] = {
        side: {"parameters": sum(p.numel() for p in network.parameters()), "step": [], "images": []}
        for side, network in (("ours", ours), ("theirs", theirs))
    }
    train = {"ours": (twin.train_ours, ours), "theirs": (twin.train_theirs, theirs)}
    sample = {"ours": (twin.sample_ours, ours), "theirs": (twin.sample_theirs, theirs)}
    for i in range(rounds + 1):  # the first round is a warm-up
        for side in ("ours", "theirs"):
            loop, network = train[side]
            step = twin.seconds(lambda: loop(network, data, steps, BATCH)) / steps  # noqa: B023
            draw, network = sample[side]
            images_per_second = BATCH / twin.seconds(lambda: draw(network, shape))  # noqa: B023
            if i:
                results[side]["step"].append(step)
                results[side]["images"].append(images_per_second)
    return results


def training_memory(name: str, side: str) -> float:
    """Return the megabytes of a training beyond the memory before its first step."""
    data, stems = images(), dict(zip(("ours", "theirs"), PAIRS[name], strict=True))
    if side == "ours":
        loop, network = twin.train_ours, twin.our_network(stems[side])
    else:
        loop, network = twin.train_theirs, twin.Unshuffled(stems[side], SIZE)
    before = megabytes()
    loop(network, data, 5, BATCH)
    return megabytes() - before


# --------------------------------------------------------------------------------- metrics


def metrics(n: int = 1000, size: int = 256) -> dict[str, float]:
    """Measure seconds and megabytes of all pixel metrics of n maps, a tenth of them with a defect.

    Also the seconds of AUPIMO, of the values per image behind intervals of pixel metrics, and of a
    paired interval of AUROC: 1000 resamples of 430 images with three seeds.
    """
    rng = np.random.default_rng(0)
    maps = rng.random((n, size, size), dtype=np.float32)
    masks = np.zeros((n, size, size), bool)
    for i in range(0, n, 10):
        y, x = rng.integers(0, size - 40, 2)
        masks[i, y : y + 40, x : x + 40] = True
    maps[masks] += 0.3
    before = megabytes()
    seconds = twin.seconds(lambda: pixel_metrics(masks, maps))
    results = {"seconds": seconds, "mb": megabytes() - before, "maps": n, "size": size}
    results["aupimo"] = twin.seconds(lambda: aupimo(masks, maps))
    results["pseudo_values"] = twin.seconds(lambda: pixel_pseudo_values(masks, maps))
    labels = (np.arange(430) < 117).astype(int)  # about the size of the test set of elpv mono
    scores = rng.normal(size=(3, 430)) + labels
    work = partial(paired_bootstrap_auroc, labels, scores, scores[::-1])
    return results | {"bootstrap": twin.seconds(work)}


# -------------------------------------------------------------------------------- start-up


def start(rounds: int = 5) -> dict[str, float]:
    """Measure the seconds of new processes: the minimum over rounds, as load only adds time.

    The import of the package counts beyond the start of Python, that of a room beyond torch.
    """
    calls = {
        "python": ("-c", "pass"),
        "import torch": ("-c", "import torch"),
        "import diffad_lite": ("-c", "import diffad_lite"),
        "import diffad_lite.experiments": ("-c", "import torch, diffad_lite.experiments"),
        "diffad --help": ("-m", "diffad_lite.cli", "--help"),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, words in calls.items():
            call = [sys.executable, *words]
            run = partial(subprocess.run, call, check=True, capture_output=True)
            best[name] = min(best[name], twin.seconds(run))
    beyond = {"import diffad_lite": "python", "import diffad_lite.experiments": "import torch"}
    for name, base in beyond.items():
        best[name] = max(0.0, best[name] - best[base])
    return best


# ----------------------------------------------------------------------------------- scale


def step_seconds(size: int, batch: int, n: int = 64, steps: int = 4) -> float:
    """Measure the seconds of a training step of the lite denoiser, after a warm-up."""
    network, data = twin.our_network(2), images(n, size)
    twin.train_ours(network, data, 2, batch)
    return twin.seconds(lambda: twin.train_ours(network, data, steps, batch)) / steps


def scale() -> dict[str, Any]:
    """Measure seconds per step against image size, batch, and number of training images."""
    return {
        "size": {str(s): step_seconds(s, BATCH) for s in (32, 64, 128, 256)},
        "batch": {str(b): step_seconds(SIZE, b) for b in (4, 16, 64)},
        "images": {str(n): step_seconds(SIZE, BATCH, n) for n in (64, 512, 4096)},
        "noises": noises(),
    }


def noises() -> dict[str, float]:
    """Measure milliseconds per image of AnoDDPM against the number of averaged noises."""
    milliseconds = {}
    for n in (1, 4, 16):
        method = METHODS["anoddpm"](METHODS["anoddpm"].Config(n_noises=n))
        method.network.eval()
        method.predict(images(BATCH))
        milliseconds[str(n)] = 1000 * twin.seconds(lambda: method.predict(images(BATCH))) / BATCH  # noqa: B023
    return milliseconds


# --------------------------------------------------------- predicted cost of paper profiles


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass, without weights and copies."""

    def __init__(self, network: nn.Module) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.weight_shapes = {s for p in network.parameters() for s in (p.shape, p.shape[::-1])}
        self.bytes = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a saved tensor; one with the shape of a weight is its copy for autocast."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known and tensor.shape not in self.weight_shapes:
            self.known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def count_step(
    network: nn.Module, loss: Callable, data: Tensor, config: TrainConfig
) -> dict[str, float]:
    """Count operations and memory of a training step on a batch of two, and scale them."""
    few = min(2, len(data))
    saved, amp = SavedBytes(network), supports_bf16(torch.device("cpu"))
    network.train()
    with FlopCounterMode(display=False) as counter:
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=amp),
        ):
            value = loss(network, data[:few], torch.Generator().manual_seed(0))
        value.backward()
    network.zero_grad(set_to_none=True)
    scale, weights = config.batch_size / few, sum(p.numel() for p in network.parameters())
    return {
        "parameters": weights,
        "steps": config.total_steps(N_IMAGES),
        "batch": config.batch_size,
        "flops": counter.get_total_flops() * scale,
        "gb": (BYTES_PER_WEIGHT * weights + saved.bytes * scale) / 2**30,
    }


def stages(name: str, profile: str, size: int) -> dict[str, dict[str, float]]:
    """Return stage -> :func:`count_step` of each training of a method, without training it."""
    costs: dict[str, dict[str, float]] = {}

    def counted(network, loss, data, config, *, stage="train", **options):
        costs[stage] = count_step(network, loss, data, config)
        return TrainReport(0, 0.0, torch.zeros(0))

    config = offline_config(name, profile, size)
    method = METHODS[name](config)
    data = images(8, size).expand(-1, config.channels, -1, -1).contiguous()
    if name == "grad":  # skip sampling of its pool; the shapes stay the same
        pool = torch.cat([data, torch.ones_like(data[:, :1])], 1)
        method.draw_pool = lambda *arguments: pool
        method.twins = lambda *arguments: data
    fit_stages(method, data, counted)
    return costs


def prediction(size: int) -> dict[str, float]:
    """Return counted and measured cost of a training step of the lite denoiser."""
    network, data = twin.our_network(2), images(BATCH, size)
    before = megabytes()
    seconds = step_seconds(size, BATCH)
    measured = {"seconds": seconds, "measured_gb": (megabytes() - before) / 2**10}
    return count_step(network, twin.LOSS, data, TrainConfig(batch_size=BATCH)) | measured
