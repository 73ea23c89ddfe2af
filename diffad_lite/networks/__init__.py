"""The networks of the course."""

from diffad_lite.networks.autoencoder import AutoencoderConfig, BinaryAutoencoder, straight_through
from diffad_lite.networks.patchnet import PatchDetector, PatchDiff
from diffad_lite.networks.segmentation import SegmentationConfig, SegmentationNet, segmentation_loss
from diffad_lite.networks.unet import UNet

__all__ = [
    "AutoencoderConfig",
    "BinaryAutoencoder",
    "PatchDetector",
    "PatchDiff",
    "SegmentationConfig",
    "SegmentationNet",
    "UNet",
    "segmentation_loss",
    "straight_through",
]
