"""The methods, one file each; ``get_method(name)`` finds them."""

from diffad_lite.methods import (
    anoddpm,
    baselines,
    bernoulli,
    diffusionad,
    glad,
    grad,
    mdps,
    patches,
)
from diffad_lite.methods.base import (
    METHODS,
    Method,
    get_method,
    load_pretrained,
)
from diffad_lite.methods.prediction import Prediction
from diffad_lite.methods.profiles import MethodConfig

__all__ = [
    "METHODS",
    "Method",
    "MethodConfig",
    "Prediction",
    "anoddpm",
    "baselines",
    "bernoulli",
    "diffusionad",
    "get_method",
    "glad",
    "grad",
    "load_pretrained",
    "mdps",
    "patches",
]
