"""The methods, one file each; ``get_method(name)`` finds them."""

# isort: off
# A method's place here is its place in tables and lists.
from diffad_lite.methods import baselines
from diffad_lite.methods.patches import Bank, PaDiM
from diffad_lite.methods.anoddpm import AnoDDPM, AnoDDPMConfig, AnoDDPMSimplex
from diffad_lite.methods.diffusionad import DiffusionAD, DiffusionADConfig
from diffad_lite.methods.glad import GLAD, GLADConfig, drift_score
from diffad_lite.methods.mdps import MDPS, MDPSConfig
from diffad_lite.methods.bernoulli import Bernoulli, BernoulliConfig
from diffad_lite.methods.grad import (
    GRAD,
    GRADConfig,
    Reweighting,
    WeightConfig,
    parts_of_pool,
    pattern_weights,
)
# isort: on

from diffad_lite.methods.base import (
    METHODS,
    Method,
    MethodConfig,
    Prediction,
    blur,
    get_method,
    load_pretrained,
)
from diffad_lite.methods.calibration import MapCalibration, conformal_threshold, top_k_mean
from diffad_lite.methods.denoiser import Denoiser, DenoiserConfig

__all__ = [
    "GLAD",
    "GRAD",
    "MDPS",
    "METHODS",
    "AnoDDPM",
    "AnoDDPMConfig",
    "AnoDDPMSimplex",
    "Bank",
    "Bernoulli",
    "BernoulliConfig",
    "Denoiser",
    "DenoiserConfig",
    "DiffusionAD",
    "DiffusionADConfig",
    "GLADConfig",
    "GRADConfig",
    "MDPSConfig",
    "MapCalibration",
    "Method",
    "MethodConfig",
    "PaDiM",
    "Prediction",
    "Reweighting",
    "WeightConfig",
    "baselines",
    "blur",
    "conformal_threshold",
    "drift_score",
    "get_method",
    "load_pretrained",
    "parts_of_pool",
    "pattern_weights",
    "top_k_mean",
]
