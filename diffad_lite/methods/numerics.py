"""Arithmetic that all methods share: exact convolutions, blurred maps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur


@contextmanager
def exact() -> Iterator[None]:
    """Convolve float32 exactly; recent GPUs otherwise do it with ten bits of mantissa."""
    cudnn = torch.backends.cudnn
    options = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False, **options):
        yield


def blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of maps (B, H, W), reflecting at the border; sigma in pixels."""
    side = min(maps.shape[-2:])
    width = min(2 * int(3 * sigma + 0.5) + 1, 2 * side - 1)
    return gaussian_blur(maps[:, None], [width, width], [sigma, sigma])[:, 0]
