"""The methods, one file each; ``get_method(name)`` finds them."""

from diffad_lite.methods import anoddpm, baselines
from diffad_lite.methods.base import (
    METHODS,
    Method,
    MethodConfig,
    Prediction,
    get_method,
    load_pretrained,
)

__all__ = [
    "METHODS",
    "Method",
    "MethodConfig",
    "Prediction",
    "anoddpm",
    "baselines",
    "get_method",
    "load_pretrained",
]
