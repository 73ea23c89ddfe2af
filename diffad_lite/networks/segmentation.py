"""The network that marks anomalous pixels, a U-Net after DRAEM (Zavrtanik et al. 2021).

In DiffusionAD it sees an image beside its reconstruction and learns, on synthetic anomalies, which
of their differences matter. It works at full resolution: behind a pixel-unshuffle stem it was twice
as fast, and clearly worse on development defects.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffad_lite.core.config import Count, Widths, configuration
from diffad_lite.networks.unet import group_norm

FOCAL_WEIGHT, FOCAL_EXPONENT, FOCAL_ALPHA = 5, 4, 0.5  # the official code of DiffusionAD


@configuration
class SegmentationConfig:
    """Configuration of :class:`SegmentationNet`.

    Attributes:
        base_channels: width of the finest level.
        channel_mults: widths of the levels as multiples of the base, finest first.
        batch_norm: BatchNorm as published; else GroupNorm, by which images do not see each other.
    """

    base_channels: Count = 24
    channel_mults: Widths = (1, 2, 4, 4)
    batch_norm: bool = False


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each normalised and rectified."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__(
            ConvNorm(in_channels, out_channels, norm), ConvNorm(out_channels, out_channels, norm)
        )


class ConvNorm(nn.Sequential):
    """A 3x3 convolution, normalised and rectified."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: Callable[[int], nn.Module]
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        super().__init__(conv, norm(out_channels), nn.ReLU())


class SegmentationNet(nn.Module):
    """One logit a pixel; its sigmoid is the anomaly map.

    Args:
        in_channels: of the input; an image and its reconstruction have twice the image's.
        config: sizes.
    """

    def __init__(self, in_channels: int, config: SegmentationConfig) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d if config.batch_norm else group_norm
        widths = [config.base_channels * m for m in config.channel_mults]
        self.multiple = 2 ** (len(widths) - 1)  # sides are padded to this
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = in_channels
        for width in widths:
            self.down.append(DoubleConv(channels, width, norm))
            channels = width
        for level in reversed(range(len(widths) - 1)):
            width = widths[max(level - 1, 0)]  # the way up is one level narrower, as in DRAEM
            self.up.append(ConvNorm(channels, width, norm))
            self.merge.append(DoubleConv(width + widths[level], width, norm))
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
    """Smooth L1 and focal loss of logits and masks, both (B, 1, H, W); a scalar.

    The focal loss (Lin et al. 2017) forgets pixels that are right already; with its exponent at 0
    it would be half the binary cross-entropy.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    wrong = 1 - torch.exp(-cross_entropy)  # one minus the probability of the true class
    focal = FOCAL_ALPHA * wrong**FOCAL_EXPONENT * cross_entropy
    return F.smooth_l1_loss(logits.sigmoid(), masks) + FOCAL_WEIGHT * focal.mean()
