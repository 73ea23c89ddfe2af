"""Helpers for numbers that several rooms use."""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def top_count(fraction: float, n: int) -> int:
    """Return ceil(fraction n), at least 1, exactly; with floats, ceil(0.07 * 100) would be 8."""
    return max(1, math.ceil(Fraction(str(fraction)) * n))


def check_finite(values: NDArray, name: str) -> None:
    """Raise ValueError if ``values`` contain NaN or infinity; ``name`` is for the message."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = f"{name} has {len(bad)} NaN or infinite values, the first at {bad[0].tolist()}"
        raise ValueError(f"{where}: find the image whose prediction fails or overflows")
