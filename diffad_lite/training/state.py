"""The state of a training, and its checkpoint, from which it continues exactly."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

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
    Size,
    check_exactly_one,
    config_hash,
    configuration,
    convert,
    to_dict,
)
from diffad_lite.core.files import write_atomically
from diffad_lite.training import processes


@configuration
class TrainConfig:
    """How to train one network.

    Attributes:
        steps: number of optimiser steps, or None where ``epochs`` says it; a time budget may lower
            it.
        epochs: passes over the images, each of floor(N / batch_size) steps, at least one; or None.
        batch_size: images per step, drawn with replacement.
        learning_rate: of AdamW, at the end of the warm-up.
        learning_rate_schedule: after the warm-up a ``cosine`` decay to zero, or ``constant``.
        weight_decay: of AdamW.
        warmup_steps: steps of linear warm-up, at most a tenth of all.
        ema_decay: of the averaged weights, which are used after training.
        grad_clip: largest gradient norm; 0 turns clipping off.
        flip_axes: axes along which images are flipped at random (-1 left-right, -2 up-down).
    """

    alternatives = ("steps", "epochs")

    steps: Count | None = 5000
    epochs: Count | None = None
    batch_size: Size = 16
    learning_rate: Annotated[float, Field(ge=0, le=1e6)] = 5e-4  # what float32 can compute with
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: NonNegative = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    ema_decay: Fraction = 0.999
    grad_clip: NonNegative = 1.0
    flip_axes: tuple[Annotated[int, Field(ge=-2, le=-1)], ...] = ()

    def __post_init__(self) -> None:
        """Check that the length is given once."""
        check_exactly_one(self)

    def total_steps(self, n_images: int) -> int:
        """Return the number of optimiser steps for ``n_images`` training images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # by check_exactly_one
        return self.epochs * max(1, n_images // self.batch_size)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str = "cosine") -> float:
    """Return the factor of a linear warm-up to 1, then of a schedule of ``TrainConfig``."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class TrainingState:
    """All that a training needs to continue: weights, EMA, optimiser, random numbers, step.

    The arguments are those of :func:`~diffad_lite.training.loop.train_network`. A checkpoint in
    ``workdir`` is read; the images identify the training that it belongs to.

    Raises:
        ValueError: the checkpoint is corrupted or belongs to another training.
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
        self.network, self.config = network, config
        self.longest = self.total = config.total_steps(len(images))
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            groups.setdefault(rates.get(name.split(".")[0], 1.0), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "rate": rate} for rate, group in groups.items()],
            weight_decay=config.weight_decay,
            fused=True,  # four times faster than the default on a CPU
        )
        self.ema = AveragedModel(network)
        process_seed = seed + processes.rank() * processes.SEED_STRIDE
        self.generator = torch.Generator().manual_seed(process_seed)
        self.global_rng = self.generator.get_state()
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.path = workdir / f"{stage}.state.safetensors" if workdir else None
        identity = {
            "config": to_dict(config),
            "seed": seed,
            "shapes": [list(p.shape) for p in network.parameters()],
            "images": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        }
        # Images computed by an earlier stage's network may differ between processes by rounding.
        self.identity = processes.gather(config_hash(identity))[0]
        if self.path and self.path.exists():
            self.load()

    def take_step(self, loss: Tensor) -> None:
        """Take one AdamW step on ``loss``: average, set the rate, clip, step, update the EMA.

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
        c = self.config
        factor = learning_rate_factor(
            self.step, self.total, c.warmup_steps, c.learning_rate_schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor * group["rate"]
        if self.config.grad_clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()  # frees the memory of the gradients before the next step
        # A decay that grows with the steps: a short training soon forgets its initial weights.
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self.ema.update_parameters(self.network)
        self.losses.append(value)
        self.step += 1

    def save(self) -> None:
        """Write the checkpoint of all processes; tensors only, never a pickle."""
        if self.path is None:
            return
        rng_states = processes.gather((self.generator.get_state(), torch.get_rng_state()))
        if processes.rank() > 0:
            return
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        generators, global_rngs = zip(*rng_states, strict=True)
        tensors["generator"] = torch.stack(generators)  # one row per process
        tensors["global_rng"] = torch.stack(global_rngs)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        numbers = {"step": self.step, "total": self.total, "seconds": self.seconds}
        metadata = {"identity": self.identity, "numbers": json.dumps(numbers)}
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        write_atomically(self.path, lambda path: save_file(tensors, path, metadata))

    def load(self) -> None:
        """Read the checkpoint; raise ValueError if it does not fit this training."""
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
                f"choose another output folder, or {fix}"
            )
        count, length = processes.count(), self.global_rng.numel()
        written_by = tensors["generator"].numel() // length if "generator" in tensors else count
        if written_by != count:
            raise ValueError(
                f"{self.path} was written by {written_by} processes, not {count}; "
                f"start as many as then, or {fix}"
            )
        try:
            self._restore(json.loads(metadata["numbers"]), tensors)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise ValueError(f"{self.path} is incomplete or corrupted ({why}); {fix}") from None

    def _restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Set the state; raise any error for values that no training writes."""
        for name, value in tensors.items():
            if value.is_complex() or not value.double().isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite and real")
        self.step, self.total = (convert(numbers[k], int, k) for k in ("step", "total"))
        self.seconds = convert(numbers["seconds"], float, "seconds")
        if not 0 <= self.step <= self.total <= self.longest or self.seconds < 0:
            raise ValueError(f"step {self.step} of {self.total}, {self.seconds} s")
        if tensors["losses"].shape != (self.step,):
            raise ValueError(f"losses {tuple(tensors['losses'].shape)} of {self.step} steps")
        self.losses = tensors["losses"].tolist()
        self.network.load_state_dict(_under(tensors, "network."))
        self.ema.load_state_dict(_under(tensors, "ema."))
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "optimizer.").items():
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value.float()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, moments in state.items():
            shape = parameters[i].shape if i in range(len(parameters)) else None
            expected = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
            fits = {key: value.shape for key, value in moments.items()} == expected
            if not fits or not 1 <= moments["step"] <= self.step or moments["exp_avg_sq"].min() < 0:
                raise ValueError(f"optimizer.{i} does not fit the network")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        rows = tensors["generator"], tensors["global_rng"]
        rng_state, self.global_rng = (row[processes.rank()].clone() for row in rows)
        torch.Generator().set_state(self.global_rng)  # raises if it is no such state
        self.generator.set_state(rng_state)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
