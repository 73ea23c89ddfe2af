"""Spaces in which methods compare images: features of a frozen network or of the denoiser."""

from diffad_lite.spaces.features import DENOISER, LITE0, DenoiserFeatures, ImageNetFeatures, on_grid

__all__ = [
    "DENOISER",
    "LITE0",
    "DenoiserFeatures",
    "ImageNetFeatures",
    "on_grid",
]
