"""The training loop, its exact resume, and several processes as one."""

from diffad_lite.training.loop import FitOptions, TrainReport, supports_bf16, train_network
from diffad_lite.training.state import TrainConfig

__all__ = [
    "FitOptions",
    "TrainConfig",
    "TrainReport",
    "supports_bf16",
    "train_network",
]
