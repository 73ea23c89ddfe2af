"""The one training loop: AdamW, warm-up and decay, EMA, bf16, progress, budget, exact resume."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from diffad_lite.config import check_ranges, config_hash, to_dict, write_atomically
from diffad_lite.interrupts import DeferredInterrupt

LossFunction = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
SAVE_EVERY_SECONDS = 30.0  # what a killed process can lose; Ctrl-C loses nothing
TIMED_STEPS = 20  # a time budget is turned into a number of steps after so many


@dataclass(frozen=True)
class TrainConfig:
    """How one network is trained.

    Attributes:
        steps: optimiser steps; a time budget may lower it.
        batch_size: images a step, drawn with replacement.
        learning_rate: AdamW's, at the top of the warm-up.
        weight_decay: AdamW's.
        warmup_steps: linear warm-up; a cosine decay to zero follows.
        ema_decay: of the averaged weights, which are the ones used after training.
        grad_clip: largest gradient norm.
        flip_axes: axes along which images are flipped at random (-1 left-right, -2 up-down).
    """

    steps: int = 5000
    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    warmup_steps: int = 100
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    flip_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot train."""
        check_ranges(self, steps=(1, 10**9), batch_size=(1, 10**6), ema_decay=(0, 1))
        for name in ("learning_rate", "weight_decay", "warmup_steps", "grad_clip"):
            check_ranges(self, **{name: (0, math.inf)})
        if not set(self.flip_axes) <= {-1, -2}:
            raise ValueError(f"TrainConfig.flip_axes holds -1 and -2 only, got {self.flip_axes}")


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


def default_device() -> torch.device:
    """A CUDA GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 autocast is worth it: any recent GPU, and CPUs with AVX-512 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Builds without oneDNN, such as those for Apple's processors, lack the question itself.
    onednn = torch.backends.mkldnn.is_available()
    return device.type == "cpu" and onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up to 1 in ``warmup`` steps (at most a tenth), then cosine decay to 0."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def random_flips(images: Tensor, axes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Flip each image (B, C, H, W) along each of ``axes`` with probability one half."""
    for axis in axes:
        flip = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(axis), images)
    return images


def train_network(
    network: nn.Module,
    loss_function: LossFunction,
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
    step at hand and saves it first.

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
        ValueError: a checkpoint in ``workdir`` is broken or belongs to another training.
        FloatingPointError: the loss is not finite.
    """
    run = _Run(network, images, config, seed, stage, workdir, rates or {})
    device = next(network.parameters()).device
    amp = supports_bf16(device)
    bar = tqdm(total=run.total, initial=run.step, desc=stage, unit="step", disable=not progress)
    started, saved = time.monotonic(), time.monotonic()
    before, half_step, half_time = run.seconds, run.step, run.seconds
    network.train()
    try:
        with torch.random.fork_rng(devices=[]), DeferredInterrupt() as interrupt:
            torch.set_rng_state(run.global_rng)
            while run.step < run.total and not interrupt.asked:
                index = torch.randint(len(images), (config.batch_size,), generator=run.generator)
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
                    left = max(0, int((budget - run.seconds) / step_time))
                    run.total = bar.total = min(TIMED_STEPS + left, config.steps)
                if time.monotonic() - saved > SAVE_EVERY_SECONDS:
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


class _Run:
    """The state of a training: all that a checkpoint must hold to go on exactly."""

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        config: TrainConfig,
        seed: int,
        stage: str,
        workdir: Path | None,
        rates: Mapping[str, float],
    ) -> None:
        self.network, self.config, self.total = network, config, config.steps
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            groups.setdefault(rates.get(name.split(".")[0], 1.0), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "rate": rate} for rate, group in groups.items()],
            weight_decay=config.weight_decay,
        )
        self.ema = AveragedModel(network, multi_avg_fn=_ema_update(config.ema_decay))
        self.generator = torch.Generator().manual_seed(seed)
        self.global_rng = torch.Generator().manual_seed(seed).get_state()
        self.step, self.seconds, self.losses = 0, 0.0, []
        self.path = workdir / f"{stage}.state.safetensors" if workdir else None
        self.identity = config_hash(
            {
                "config": to_dict(config),
                "seed": seed,
                "shapes": [list(p.shape) for p in network.parameters()],
                "images": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
            }
        )
        if self.path and self.path.exists():
            self.load()

    def update(self, loss: Tensor) -> None:
        """One optimiser step on ``loss``, with its learning rate, clipping and EMA."""
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step}; lower the learning rate "
                f"({self.config.learning_rate}) or look for NaN in the images"
            )
        factor = learning_rate_factor(self.step, self.total, self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor * group["rate"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.ema.update_parameters(self.network)
        self.losses.append(value)
        self.step += 1

    def save(self, global_rng: Tensor) -> None:
        """Write the checkpoint; tensors only, never a pickle."""
        if self.path is None:
            return
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        tensors["generator"] = self.generator.get_state()
        tensors["global_rng"] = global_rng
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        numbers = {"step": self.step, "total": self.total, "seconds": self.seconds}
        metadata = {"identity": self.identity, "numbers": json.dumps(numbers)}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        write_atomically(self.path, lambda path: save_file(tensors, path, metadata))

    def load(self) -> None:
        """Read the checkpoint back."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is broken ({error}); delete it to start anew") from None
        if metadata.get("identity") != self.identity:
            raise ValueError(
                f"{self.path} belongs to a training with another configuration, seed or data; "
                "choose another output folder, or delete that file to start anew"
            )
        numbers = json.loads(metadata["numbers"])
        self.step, self.total, self.seconds = (numbers[k] for k in ("step", "total", "seconds"))
        self.losses = tensors["losses"].tolist()
        self.network.load_state_dict(_under(tensors, "network."))
        self.ema.load_state_dict(_under(tensors, "ema."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "optimizer.").items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.global_rng = tensors["global_rng"]


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _ema_update(decay: float) -> Callable:
    """EMA whose decay grows to ``decay``, so that short trainings are not stuck at the start."""

    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)

    return update
