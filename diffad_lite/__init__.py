"""diffad_lite: diffusion-based image anomaly detection, small enough to read.

The names below are those that notebooks need. Each is imported at its first use, so that
``import diffad_lite`` is fast. Everything else is imported from its room: ``diffusion``,
``networks``, ``data``, ``training``, ``spaces``, ``methods``, ``evaluation``, ``experiments`` or
``notebook``, as in ``from diffad_lite.diffusion import GaussianDiffusion``.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "GaussianDiffusion": "diffusion.gaussian",
    "NoiseSchedule": "diffusion.schedules",
    "Run": "experiments.run",
    "get_method": "methods",
    "load_dataset": "data.datasets",
    "load_pretrained": "methods",
    "metrics": "evaluation.metrics",
    "plots": "plots",
    "pretrained_or_train": "experiments.evaluate",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its room."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    return module if _HOMES[name].endswith(name) else getattr(module, name)


def __dir__() -> list[str]:
    """List the public names even before they are imported."""
    return sorted({*globals(), *__all__})
