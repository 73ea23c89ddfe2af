"""One training by several processes, one for each GPU, as ``accelerate launch`` starts them.

Each draws its share of every batch with a generator of its own; losses and gradients are averaged,
so that all hold the same weights, and the first process alone writes files. In a process that was
not started so, everything here does nothing.
"""

import atexit
import os
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SEED_STRIDE = 1_000_003  # between the seeds of two processes; a generator takes 32 bits


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this is, 0 .. count - 1."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def device() -> torch.device:
    """Where this process works: its own GPU, else the CPU."""
    if count() > 1:
        return _state().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def share(batch_size: int) -> int:
    """This process's part of a batch.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    if batch_size % count():
        raise ValueError(
            f"a batch of {batch_size} images cannot be shared evenly by {count()} processes; "
            "choose another batch size, or another --num_processes"
        )
    return batch_size // count()


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    if count() == 1:
        return
    _state()
    from accelerate.utils import reduce

    flat = reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, mean in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gathered(value: T) -> list[T]:
    """The values of all processes, in their order."""
    if count() == 1:
        return [value]
    _state()
    from accelerate.utils import gather_object

    return gather_object([value])


@cache
def _state() -> Any:
    """Accelerate's view of the processes; the first call connects them, the exit parts them."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise ImportError(
            "several processes need accelerate: pip install accelerate, or start one process"
        ) from None
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != count():
        raise ValueError(
            f"WORLD_SIZE is {count()}, but {state.num_processes} processes are connected; start "
            "them by accelerate launch, or unset WORLD_SIZE"
        )
    # Threads of a connection that still stands at the exit may abort the process.
    atexit.register(state.destroy_process_group)
    return state
