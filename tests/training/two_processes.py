"""Started by ``accelerate launch`` from test_processes.py: ``FOLDER [STEP TO BREAK AT]``."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_processes import CONFIG, error_of, make_images, make_network

from diffad_lite.training import loop, processes

folder, broken_at = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
network, batches = make_network(), []
loop.SAVE_EVERY_SECONDS = -1.0
loop.supports_bf16 = lambda device: False  # rounding would hide a wrong mean


def loss(network, batch, generator):
    if len(batches) == broken_at:
        raise RuntimeError("broken off")
    batches.append(batch)
    return error_of(network, batch)


report = loop.train_network(
    network, loss, make_images(), CONFIG, seed=5, workdir=folder, progress=False
)
tensors = {"batches": torch.stack(batches), "losses": report.losses, **network.state_dict()}
save_file(tensors, folder / f"{processes.rank()}.safetensors")
