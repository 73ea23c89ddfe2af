"""The one training loop: batches, bf16, progress, time budget, Ctrl-C, saving."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffad_lite.core.interrupts import DeferredInterrupt
from diffad_lite.training import processes
from diffad_lite.training.state import TrainConfig, TrainingState

Network = TypeVar("Network", bound=nn.Module)
LossFunction = Callable[[Network, Tensor, torch.Generator], Tensor]
SAVE_EVERY_SECONDS = 30.0  # what a killed process can lose; Ctrl-C loses nothing
TIMED_STEPS = 20  # a time budget is turned into a number of steps after so many


@dataclass(frozen=True)
class TrainReport:
    """What a training was.

    Attributes:
        steps: optimiser steps made.
        seconds: time spent training, all sessions of a resumed run together.
        losses: (steps,) loss of each step.
    """

    steps: int
    seconds: float
    losses: Tensor


class FitOptions(TypedDict):
    """What ``Method.fit`` hands down to :func:`train_network`, which describes each."""

    seed: int
    budget: float | None
    workdir: Path | None
    progress: bool


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 autocast is worth it: any recent GPU, and CPUs with AVX-512 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Builds without oneDNN, such as those for Apple's processors, lack the question itself.
    onednn = torch.backends.mkldnn.is_available()
    return device.type == "cpu" and onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def random_flips(images: Tensor, axes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Flip each image (B, C, H, W) along each of ``axes`` with probability one half."""
    for axis in axes:
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(axis), images)
    return images


def remaining_budget(
    budget: float | None, reports: Mapping[str, TrainReport], share: float = 1.0
) -> float | None:
    """Seconds that a stage may take: a share of what earlier ones left; None without a budget."""
    return None if budget is None else share * (budget - sum(r.seconds for r in reports.values()))


def train_network(
    network: Network,
    loss_function: LossFunction[Network],
    images: Tensor,
    config: TrainConfig,
    *,
    seed: int,
    stage: str = "train",
    budget: float | None = None,
    workdir: Path | None = None,
    progress: bool = True,
    rates: Mapping[str, float] | None = None,
) -> TrainReport:
    """Train ``network`` in place; afterwards it holds the averaged (EMA) weights.

    All randomness comes from one CPU generator seeded by ``seed``, so an interrupted run that is
    called again with the same arguments goes on exactly where it stopped; Ctrl-C finishes the
    step at hand and saves it first. Several processes share each batch, see :mod:`.processes`.

    Args:
        network: on the device where it is to be trained.
        loss_function: ``(network, batch, generator) -> scalar``; runs under bf16 autocast where
            that pays. ``batch`` (B, C, H, W) is on the network's device.
        images: normal images (N, C, H, W), float32 in [-1, 1], on the CPU.
        config: see :class:`TrainConfig`.
        seed: of batches, flips, and all that ``loss_function`` draws.
        stage: name of the checkpoint file and of the progress bar.
        budget: seconds; after 20 steps the number of steps is lowered to fit, so that the
            learning rate still decays to zero.
        workdir: folder for ``<stage>.state.safetensors``; None keeps nothing.
        progress: show a bar with the loss and the time left.
        rates: factors on the learning rate, by the first part of a parameter's name.

    Raises:
        ValueError: a checkpoint in ``workdir`` is broken or belongs to another training; a batch
            cannot be shared evenly.
        FloatingPointError: the loss is not finite.
    """
    batch_size = processes.share(config.batch_size)
    run = TrainingState(network, images, config, seed, stage, workdir, rates or {})
    device = next(network.parameters()).device
    amp = supports_bf16(device)
    shown = progress and processes.rank() == 0
    bar = tqdm(total=run.total, initial=run.step, desc=stage, unit="step", disable=not shown)
    started, saved = time.monotonic(), time.monotonic()
    before, half_step, half_time = run.seconds, run.step, run.seconds
    network.train()
    try:
        with torch.random.fork_rng(devices=[]), DeferredInterrupt() as interrupt:
            torch.set_rng_state(run.global_rng)
            stop = interrupt.asked
            while run.step < run.total and not stop:
                index = torch.randint(len(images), (batch_size,), generator=run.generator)
                batch = random_flips(images[index], config.flip_axes, run.generator).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    loss = loss_function(network, batch, run.generator)
                run.update(loss)
                run.seconds = before + time.monotonic() - started
                if run.step == TIMED_STEPS // 2:
                    # The first steps are slow: kernels are being chosen.
                    half_step, half_time = run.step, run.seconds
                if budget is not None and run.step == TIMED_STEPS < run.total:
                    step_time = (run.seconds - half_time) / (TIMED_STEPS - half_step)
                    more = max(0, int((budget - run.seconds) / step_time))
                    more = processes.gathered(more)[0]
                    run.total = bar.total = min(TIMED_STEPS + more, config.steps)
                due = time.monotonic() - saved > SAVE_EVERY_SECONDS
                stop, due = map(any, zip(*processes.gathered((interrupt.asked, due)), strict=True))
                interrupt.asked = stop  # one process was asked: all of them raise at the end
                if due:
                    run.save(torch.get_rng_state())
                    saved = time.monotonic()
                bar.update()
                if run.step % 10 == 0:
                    bar.set_postfix(loss=f"{sum(run.losses[-50:]) / len(run.losses[-50:]):.4f}")
            run.save(torch.get_rng_state())
    finally:
        bar.close()
    network.load_state_dict(run.ema.module.state_dict())
    network.eval()
    return TrainReport(run.step, run.seconds, torch.tensor(run.losses))
