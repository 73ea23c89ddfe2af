"""One training by several processes, one for each GPU, started by ``accelerate launch``.

Each process draws its part of every batch with its own generator. Losses and gradients are
averaged, so that all processes hold the same weights. Only the first process writes files. Networks
are not wrapped in DistributedDataParallel, since losses call their sub-networks directly.

A process that was started alone does not import accelerate, and nothing here changes its training.
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
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the index of this process, 0 .. count - 1."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def device() -> torch.device:
    """Return the device of this process: its own GPU, or the CPU.

    Apple's GPUs (mps) are not used: they lack float64, and nothing was tested on them.
    """
    if count() > 1:
        return _accelerator().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def local_batch_size(batch_size: int) -> int:
    """Return the number of images of a batch that this process draws.

    Raises:
        ValueError: the batch size is not divisible by the number of processes.
    """
    if batch_size % count():
        raise ValueError(
            f"a batch of {batch_size} images is not divisible by {count()} processes; "
            "choose another batch size, or another --num_processes"
        )
    return batch_size // count()


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place."""
    if count() == 1:
        return
    # One message for all tensors: a network has hundreds of small gradients.
    flat = _accelerator().reduce(torch.cat([tensor.flatten() for tensor in tensors]), "mean")
    means = flat.split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather(value: T) -> list[T]:
    """Return the values of all processes, ordered by rank."""
    if count() == 1:
        return [value]
    _accelerator()
    from accelerate.utils import gather_object

    return gather_object([value])


@cache
def _accelerator() -> Any:
    """Connect the processes at the first call; disconnect them at the exit."""
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ImportError(
            "several processes need accelerate: pip install accelerate, or start one process"
        ) from None
    # The training loop itself chooses between float32 and bfloat16.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    if accelerator.num_processes != count():
        raise ValueError(
            f"WORLD_SIZE is {count()}, but {accelerator.num_processes} processes are connected; "
            "start them by accelerate launch, or unset WORLD_SIZE"
        )
    # Threads of an open connection may abort the process at its exit.
    atexit.register(accelerator.end_training)
    return accelerator
