"""The methods, one file each; ``get_method(name)`` finds them."""

from diffad_lite.methods import anoddpm, baselines
from diffad_lite.methods.base import (
    METHODS,
    Method,
    MethodConfig,
    get_method,
    load_pretrained,
)
from diffad_lite.methods.prediction import Prediction

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
