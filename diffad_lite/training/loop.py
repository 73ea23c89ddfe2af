"""The one training loop: batches, bf16, progress bar, time budget, Ctrl-C, checkpoints."""

import statistics
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
SAVE_EVERY_SECONDS = 30.0  # a killed process loses at most these; Ctrl-C loses nothing
TIMED_STEPS = 20  # after these steps, a time budget is converted into a number of steps
SLOW_START_SECONDS = 5.0  # that the first step may take longer than others: kernels are chosen


@dataclass(frozen=True)
class TrainReport:
    """Result of one training.

    Attributes:
        steps: number of optimiser steps.
        seconds: training time, summed over all sessions of a resumed training.
        losses: (steps,) loss of each step.
    """

    steps: int
    seconds: float
    losses: Tensor


class FitOptions(TypedDict):
    """Options that ``Method.fit`` passes on to :func:`train_network`, which describes them."""

    seed: int
    budget: float | None
    workdir: Path | None
    progress: bool


def supports_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 autocast pays: on recent GPUs, and on CPUs with AVX-512 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Builds without oneDNN, such as those for Apple's processors, lack this query.
    onednn = torch.backends.mkldnn.is_available()
    return device.type == "cpu" and onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def random_flips(images: Tensor, axes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Flip each image (B, C, H, W) along each of ``axes`` with probability one half."""
    for axis in axes:
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(axis), images)
    return images


def remaining_budget(
    budget: float | None, reports: Mapping[str, TrainReport], fraction: float = 1.0
) -> float | None:
    """Return a fraction of the seconds that earlier stages left; None without a budget."""
    return (
        None if budget is None else fraction * (budget - sum(r.seconds for r in reports.values()))
    )


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

    One step is one iteration of Ho et al. 2020, algorithm 1: draw images, then noise, then take a
    gradient step. All randomness comes from one CPU generator seeded by ``seed``, so an interrupted
    training continues exactly when it is called again with the same arguments. Ctrl-C finishes the
    current step and saves it. Several processes divide each batch, see :mod:`.processes`.

    Args:
        network: on the device where it is trained.
        loss_function: ``(network, batch, generator) -> scalar``; runs under bf16 autocast where
            that pays. It draws timesteps and noise from ``generator``. ``batch`` (B, C, H, W) is
            on the network's device.
        images: normal images (N, C, H, W), float32 in [-1, 1], on the CPU.
        config: see :class:`TrainConfig`.
        seed: of batches, flips, and all that ``loss_function`` draws.
        stage: name of the checkpoint file and of the progress bar.
        budget: seconds. After 20 steps the number of steps is lowered to fit, so that the
            learning rate still decays to zero. Where 20 steps do not fit, the training ends
            before the step that would exceed the budget, but never without a step; the rate has
            then not decayed.
        workdir: folder for ``<stage>.state.safetensors``; None writes no file.
        progress: show a bar with the loss and the remaining time.
        rates: factors on the learning rate, by the first part of a parameter's name.

    Raises:
        ValueError: a checkpoint in ``workdir`` is corrupted or belongs to another training; the
            batch size is not divisible by the number of processes.
        FloatingPointError: the loss is not finite.
    """
    batch_size = processes.local_batch_size(config.batch_size)
    run = TrainingState(network, images, config, seed, stage, workdir, rates or {})
    device = next(network.parameters()).device
    bf16 = supports_bf16(device)
    hidden = not progress or processes.rank() > 0
    bar = tqdm(total=run.total, initial=run.step, desc=stage, unit="step", disable=hidden)
    saved_at = time.monotonic()
    started_at = saved_at - run.seconds  # as if earlier sessions had just been made
    timed_from, durations = (run.step, run.seconds), list[float]()
    network.train()
    try:
        with torch.random.fork_rng(devices=[]), DeferredInterrupt() as interrupt:
            torch.set_rng_state(run.global_rng)
            stop = False
            while run.step < run.total and not stop:
                index = torch.randint(len(images), (batch_size,), generator=run.generator)
                batch = random_flips(images[index], config.flip_axes, run.generator).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = loss_function(network, batch, run.generator)
                run.take_step(loss)

                durations.append(time.monotonic() - started_at - run.seconds)
                run.seconds += durations[-1]
                if run.step == TIMED_STEPS // 2:  # the first steps are slow: kernels are chosen
                    timed_from = run.step, run.seconds
                if budget is not None and run.step <= TIMED_STEPS:
                    run.total = bar.total = _affordable_steps(run, budget, durations, timed_from)
                due = time.monotonic() - saved_at > SAVE_EVERY_SECONDS
                # All processes stop, and save, together.
                stop, due = map(any, zip(*processes.gather((interrupt.asked, due)), strict=True))
                if due:
                    run.save()
                    saved_at = time.monotonic()
                bar.update()
                if run.step % 10 == 0:
                    bar.set_postfix(loss=f"{statistics.fmean(run.losses[-50:]):.4f}")
            if stop:
                interrupt.asked = True  # perhaps another process was asked: raise here, too
            run.save()
    finally:
        bar.close()
    network.load_state_dict(run.ema.module.state_dict())
    network.eval()
    return TrainReport(run.step, run.seconds, torch.tensor(run.losses))


def _affordable_steps(
    run: TrainingState, budget: float, durations: list[float], timed_from: tuple[int, float]
) -> int:
    """Return how many steps of the training fit into ``budget``.

    Before ``TIMED_STEPS``, that is all of them, or no more where the fastest of this session's
    ``durations`` (s) would exceed the budget. Then the mean time since ``timed_from`` (step,
    seconds) decides.
    """
    if run.step < TIMED_STEPS:
        fastest = min(durations[1:], default=max(0.0, durations[0] - SLOW_START_SECONDS))
        affordable = run.step if run.seconds + fastest > budget else run.total
    else:
        step_time = (run.seconds - timed_from[1]) / (run.step - timed_from[0])
        affordable = run.step + max(0, int((budget - run.seconds) / step_time))
    return processes.gather(min(affordable, run.total))[0]  # the first process decides
