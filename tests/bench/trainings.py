"""Each training of a method, taken from the package's own code, with nothing downloaded.

``make bench`` counts what a step of each training costs; ``make gpu`` measures it.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from diffad_lite.methods.base import METHODS, Method, MethodConfig
from diffad_lite.spaces.features import ImageNetFeatures

PUBLISHED = ("anoddpm", "diffusionad", "glad", "mdps", "bernoulli", "grad")
N_IMAGES = 167  # of MVTec AD's bottle, without those held out: epochs become steps with them
NO_DOWNLOADS = (
    "ImageNet networks have random weights; they cost as much as trained ones",
    "textures of synthetic anomalies are procedural, not images of DTD",
)


def offline_config(name: str, profile: str, size: int, **options: Any) -> MethodConfig:
    """Return the configuration of a profile, with procedural textures in place of downloaded ones.

    ``options`` are those of ``Config.for_profile``; without ``channels``, lite has 1, paper has 3.
    """
    options = {"channels": 1 if profile == "lite" else 3} | options
    config = METHODS[name].Config.for_profile(profile, image_size=size, **options)
    if hasattr(config, "synthesis"):
        config = replace(config, synthesis=replace(config.synthesis, texture_root=""))
    return config


@contextlib.contextmanager
def replaced_training(training: Callable[..., Any]) -> Iterator[None]:
    """Call ``training`` wherever a method calls ``train_network``; load no published weights."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ImageNetFeatures, "load_weights"))
        for place, module in list(sys.modules.items()):
            if place.startswith("diffad_lite.methods") and hasattr(module, "train_network"):
                stack.enter_context(mock.patch.object(module, "train_network", training))
        yield


def fit_stages(method: Method, images: Any, training: Callable[..., Any]) -> None:
    """Run all stages of a method's training on images (N, C, H, W), each by ``training``."""
    with replaced_training(training):
        method._fit(method.prepare(images), seed=0, budget=None, workdir=None, progress=False)
