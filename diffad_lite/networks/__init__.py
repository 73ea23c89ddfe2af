"""The networks of the course."""

from diffad_lite.networks.unet import UNet

__all__ = ["UNet"]
