"""Small checks and counts on numbers that several rooms share."""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def top_count(fraction: float, n: int) -> int:
    """ceil(fraction n), at least 1; 0.07 of 100 is 7, in floats a bit more, its ceiling 8."""
    return max(1, math.ceil(Fraction(str(fraction)) * n))


def check_finite(values: NDArray, name: str) -> None:
    """Raise ValueError for NaN or infinity in ``values``, which the message calls ``name``."""
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        where = f"{name} has {len(bad)} NaN or infinite values, the first at {bad[0].tolist()}"
        raise ValueError(f"{where}: find the image whose prediction fails or overflows")
