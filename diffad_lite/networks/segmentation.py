"""The network that segments anomalous pixels, a U-Net after DRAEM (Zavrtanik et al. 2021).

In DiffusionAD its input is an image and its reconstruction. It learns from synthetic anomalies
which of their differences matter. It works at full resolution: with a pixel-unshuffle stem it was
twice as fast, and clearly worse on development defects.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_lite.core.config import Size, Widths, configuration
from diffad_lite.networks.unet import group_norm

Norm = Callable[[int], nn.Module]  # number of channels -> layer
FOCAL_WEIGHT, FOCAL_EXPONENT, FOCAL_ALPHA = 5, 4, 0.5  # the official code of DiffusionAD


@configuration
class SegmentationConfig:
    """Configuration of :class:`SegmentationNet`.

    Attributes:
        base_channels: channels of the finest level.
        channel_mults: channels of each level as multiples of the base, finest first.
        batch_norm: BatchNorm as published; else GroupNorm, where an image does not affect others.
    """

    base_channels: Size = 24
    channel_mults: Widths = (1, 2, 4, 4)
    batch_norm: bool = False


def conv_norm(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    """Return a 3x3 convolution, a normalisation and a ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(conv, norm(out_channels), nn.ReLU())


def double_conv(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    """Return two layers of :func:`conv_norm`."""
    convs = [(in_channels, out_channels), (out_channels, out_channels)]
    return nn.Sequential(*(conv_norm(*widths, norm) for widths in convs))


class SegmentationNet(nn.Module):
    """One logit per pixel; its sigmoid is the anomaly map.

    Args:
        in_channels: of the input: an image and its reconstruction have twice the image's channels.
        config: sizes.
    """

    def __init__(self, in_channels: int, config: SegmentationConfig) -> None:
        super().__init__()
        norm: Norm = nn.BatchNorm2d if config.batch_norm else group_norm
        widths = [config.base_channels * m for m in config.channel_mults]
        self.multiple = 2 ** (len(widths) - 1)  # sides are padded to this
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = in_channels
        for width in widths:
            self.down.append(double_conv(channels, width, norm))
            channels = width
        for level in reversed(range(len(widths) - 1)):
            width = widths[max(level - 1, 0)]  # the decoder is one level narrower, as in DRAEM
            self.up.append(conv_norm(channels, width, norm))
            self.merge.append(double_conv(width + widths[level], width, norm))
            channels = width
        self.out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W), any H and W -> logits (B, 1, H, W)."""
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        h, skips = x, []
        for level, block in enumerate(self.down):
            h = block(h if level == 0 else F.max_pool2d(h, 2))
            skips.append(h)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            h = F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=True)
            h = merge(torch.cat([up(h), skips.pop()], dim=1))
        return self.out(h)[..., :H, :W]


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the smooth L1 plus focal loss of logits and masks, both (B, 1, H, W); a scalar.

    The focal loss (Lin et al. 2017) gives little weight to pixels that are already right. With an
    exponent of 0 it would be half the binary cross-entropy.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    wrong = 1 - torch.exp(-cross_entropy)  # one minus the probability of the true class
    focal = FOCAL_ALPHA * wrong**FOCAL_EXPONENT * cross_entropy
    return F.smooth_l1_loss(logits.sigmoid(), masks) + FOCAL_WEIGHT * focal.mean()
