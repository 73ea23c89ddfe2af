"""What a method says of images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


@dataclass
class Prediction:
    """What a method says of B images; everything on the CPU in float32.

    Attributes:
        image_score: (B,), larger = more anomalous; comparable between images of one model only.
        anomaly_map: (B, H, W), larger = more anomalous.
        reconstruction: (B, C, H, W) the image as it would be without defects, or None.
        extras: further tensors, first axis B, as each method documents.
    """

    image_score: Tensor
    anomaly_map: Tensor
    reconstruction: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def cat(parts: Sequence["Prediction"]) -> "Prediction":
        """Batches joined along the first axis."""
        first = parts[0]
        reconstructions = [p.reconstruction for p in parts if p.reconstruction is not None]
        return Prediction(
            torch.cat([p.image_score for p in parts]),
            torch.cat([p.anomaly_map for p in parts]),
            torch.cat(reconstructions) if reconstructions else None,
            {name: torch.cat([p.extras[name] for p in parts]) for name in first.extras},
        )


class Buffers(nn.Module):
    """Named tensors that are saved with the model and have no gradient."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...


class Networks(nn.ModuleDict):
    """The networks of a method by name; what each is, the line that takes it out says."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Any: ...
