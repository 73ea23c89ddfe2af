"""The state of one network's training, and its checkpoint: all that it takes to go on exactly."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffad_lite.core.config import (
    Count,
    Fraction,
    NonNegative,
    config_hash,
    configuration,
    convert,
    to_dict,
)
from diffad_lite.core.files import write_atomically
from diffad_lite.training import processes

RANDOM = ("generator", "global_rng")  # states of random numbers, a row for each process


@configuration
class TrainConfig:
    """How one network is trained.

    Attributes:
        steps: optimiser steps; a time budget may lower it.
        batch_size: images a step, drawn with replacement.
        learning_rate: AdamW's, at the top of the warm-up.
        weight_decay: AdamW's.
        warmup_steps: linear warm-up; a cosine decay to zero follows.
        ema_decay: of the averaged weights, which are the ones used after training.
        grad_clip: largest gradient norm; 0 = any.
        flip_axes: axes along which images are flipped at random (-1 left-right, -2 up-down).
    """

    steps: Count = 5000
    batch_size: Count = 16
    learning_rate: Annotated[float, Field(ge=0, le=1e6)] = 5e-4  # what float32 can compute with
    weight_decay: NonNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    ema_decay: Fraction = 0.999
    grad_clip: NonNegative = 1.0
    flip_axes: tuple[Annotated[int, Field(ge=-2, le=-1)], ...] = ()


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up to 1 in ``warmup`` steps (at most a tenth), then cosine decay to 0."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class TrainingState:
    """Weights, their average, optimiser, random numbers, step: what a training needs to go on.

    Args:
        network: that is trained, in place.
        images: (N, C, H, W), which tell one training from another.
        config: see :class:`TrainConfig`.
        seed: of batches, flips, and all that the loss draws.
        stage: name of the checkpoint file.
        workdir: its folder; what lies there is read. None keeps nothing.
        rates: factors on the learning rate, by the first part of a parameter's name.

    Raises:
        ValueError: a checkpoint in ``workdir`` is broken or belongs to another training.
    """

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
            fused=True,  # one kernel a tensor: on a CPU four times faster than the default
        )
        self.ema = AveragedModel(network, multi_avg_fn=_ema_update(config.ema_decay))
        own_seed = seed + processes.rank() * processes.SEED_STRIDE
        self.generator = torch.Generator().manual_seed(own_seed)
        self.global_rng = torch.Generator().manual_seed(own_seed).get_state()
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.path = workdir / f"{stage}.state.safetensors" if workdir else None
        identity = {
            "config": to_dict(config),
            "seed": seed,
            "shapes": [list(p.shape) for p in network.parameters()],
            "images": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        }
        # What a stage computed from another's network may differ in the last bit.
        self.identity = processes.gathered(config_hash(identity))[0]
        if self.path and self.path.exists():
            self.load()

    def update(self, loss: Tensor) -> None:
        """One optimiser step on ``loss``, with its learning rate, clipping and EMA.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss.backward()
        mean = loss.detach().clone()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        processes.average([mean, *gradients])
        value = mean.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step}; lower the learning rate "
                f"({self.config.learning_rate}) or look for NaN in the images"
            )
        factor = learning_rate_factor(self.step, self.total, self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor * group["rate"]
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # none is kept during the next step
        self.ema.update_parameters(self.network)
        self.losses.append(value)
        self.step += 1

    def save(self, global_rng: Tensor) -> None:
        """Write the checkpoint; tensors only, never a pickle."""
        if self.path is None:
            return
        states = processes.gathered((self.generator.get_state(), global_rng))
        if processes.rank() > 0:
            return
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        for name, own in zip(RANDOM, zip(*states, strict=True), strict=True):
            tensors[name] = torch.stack(own)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        numbers = {"step": self.step, "total": self.total, "seconds": self.seconds}
        metadata = {"identity": self.identity, "numbers": json.dumps(numbers)}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        write_atomically(self.path, lambda path: save_file(tensors, path, metadata))

    def load(self) -> None:
        """Read the checkpoint back."""
        fix = "delete it to start anew"
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is broken ({str(error)[:200]}); {fix}") from None
        if metadata.get("identity") != self.identity:
            raise ValueError(
                f"{self.path} belongs to a training with another configuration, seed or data; "
                "choose another output folder, or delete that file to start anew"
            )
        count, length = processes.count(), self.global_rng.numel()
        written_by = tensors[RANDOM[0]].numel() // length if RANDOM[0] in tensors else count
        if written_by != count:
            raise ValueError(
                f"{self.path} was written by {written_by} processes, not {count}; "
                "start as many as then, or delete it to start anew"
            )
        try:
            self._restore(json.loads(metadata["numbers"]), tensors)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.path} is not whole ({why}); {fix}") from None

    def _restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            if value.is_complex() or not value.double().isfinite().all():
                raise ValueError(f"no finite numbers in {name}")
        self.step, self.total = (convert(numbers[k], int, k) for k in ("step", "total"))
        self.seconds = convert(numbers["seconds"], float, "seconds")
        if not 0 <= self.step <= self.total <= self.config.steps or self.seconds < 0:
            raise ValueError(f"step {self.step} of {self.total}, {self.seconds} s")
        if tensors["losses"].shape != (self.step,):
            raise ValueError(f"{tuple(tensors['losses'].shape)} losses of {self.step} steps")
        self.losses = tensors["losses"].tolist()
        self.network.load_state_dict(_under(tensors, "network."))
        self.ema.load_state_dict(_under(tensors, "ema."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "optimizer.").items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value.float()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, moments in state.items():
            shape = trained[i].shape if i in range(len(trained)) else None
            wanted = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
            fits = {key: value.shape for key, value in moments.items()} == wanted
            if not fits or not 1 <= moments["step"] <= self.step or moments["exp_avg_sq"].min() < 0:
                raise ValueError(f"optimizer.{i} does not fit the network")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        length, rank = self.global_rng.numel(), processes.rank()
        own, self.global_rng = (tensors[name].view(-1, length)[rank].clone() for name in RANDOM)
        torch.Generator().set_state(self.global_rng)  # raises if it is none
        self.generator.set_state(own)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def _ema_update(decay: float) -> Callable:
    """EMA whose decay grows to ``decay``, so that short trainings are not stuck at the start."""

    def update(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)

    return update
