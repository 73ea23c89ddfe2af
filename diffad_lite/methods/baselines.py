"""Baselines without diffusion, which every method is measured against.

``brightness`` is a control: it shows how much of a data set is solved by mean brightness alone.
``mean_image`` compares with the average normal image, ``pca`` with the projection of the image on
the first principal components of the normal images.
"""

from dataclasses import replace
from typing import Any, Literal, Self, Unpack

import torch
from torch import Tensor

from diffad_lite.core.config import Count, Profile, configuration
from diffad_lite.methods.base import Buffers, Inferred, Method, MethodConfig, Trace, inference
from diffad_lite.training.loop import FitOptions, TrainReport


@configuration
class BaselineConfig(MethodConfig):
    """Configuration of a baseline; its paper profile is its lite profile."""

    profiles = "baselines"


@configuration
class BrightnessConfig(BaselineConfig):
    """Configuration of :class:`Brightness`.

    Attributes:
        side: which deviations count: ``"both"``, or ``"darker"`` where a defect can only remove
            light.
    """

    side: Literal["both", "darker"] = inference("both")

    @classmethod
    def for_profile(cls, profile: Profile, *, dataset: str | None = None, **shape: Any) -> Self:
        """``"darker"`` for electroluminescence images: a broken part of a cell does not glow."""
        base = super().for_profile(profile, dataset=dataset, **shape)
        return replace(base, side="darker" if dataset == "elpv" else "both")


@configuration
class PCAConfig(BaselineConfig):
    """Configuration of :class:`PCAResidual`.

    Attributes:
        n_components: at most; few normal images allow fewer.
    """

    standardise: bool = True
    n_components: Count = 80


class Brightness(Method):
    """Mean brightness of the image, in standard deviations of that of normal images."""

    name = "brightness"
    title = "brightness (control)"
    trained = False
    Config = BrightnessConfig
    config: BrightnessConfig
    network: Buffers

    def _build(self) -> Buffers:
        return Buffers(mean=torch.zeros(()), std=torch.ones(()))

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        brightness = train.mean(dim=(1, 2, 3))
        std = brightness.std(correction=0).clamp_min(1e-3)  # of equally bright images
        self.network = Buffers(mean=brightness.mean(), std=std)
        return {}

    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        return self._deviation(images.mean(1)), None, {}

    def _score(self, images: Tensor, maps: Tensor) -> Tensor:
        return self._deviation(images.to(self.device).mean(dim=(1, 2, 3))).cpu()

    def _deviation(self, brightness: Tensor) -> Tensor:
        deviation = (self.network.mean - brightness) / self.network.std
        return deviation.abs() if self.config.side == "both" else deviation


class MeanImage(Method):
    """Distance to the average normal image, pixel by pixel."""

    name = "mean_image"
    title = "mean image"
    Config = BaselineConfig
    trained = False
    any_size = False
    network: Buffers

    def _build(self) -> Buffers:
        c = self.config
        return Buffers(mean=torch.zeros(c.channels, c.image_size, c.image_size))

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        self.network = Buffers(mean=train.mean(0))
        return {}

    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        reconstruction = self.network.mean.expand_as(images)
        return (images - reconstruction).abs().mean(1), reconstruction, {}


class PCAResidual(Method):
    """Distance to the nearest image in the span of the first principal components."""

    name = "pca"
    title = "PCA residual"
    trained = False
    any_size = False
    Config = PCAConfig
    config: PCAConfig
    network: Buffers

    def _build(self) -> Buffers:
        c = self.config
        pixels = c.channels * c.image_size**2
        return Buffers(mean=torch.zeros(pixels), components=torch.zeros(c.n_components, pixels))

    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        from sklearn.decomposition import PCA  # slow to import

        flat = train.flatten(1)
        components = torch.zeros(self.config.n_components, flat.shape[1])
        if (flat == flat[0]).all():  # no variance, no component
            self.network = Buffers(mean=flat[0].clone(), components=components)
            return {}
        n_components = min(self.config.n_components, *flat.shape)
        pca = PCA(n_components, random_state=options["seed"]).fit(flat.numpy())
        components[:n_components] = torch.from_numpy(pca.components_)
        self.network = Buffers(mean=torch.from_numpy(pca.mean_).float(), components=components)
        return {}

    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        centred = images.flatten(1) - self.network.mean
        weights = centred @ self.network.components.T  # (B, n_components)
        projected = (self.network.mean + weights @ self.network.components).view_as(images)
        return (images - projected).abs().mean(1), projected, {}
