"""Networks with a bounded receptive field: a noise predictor and a detector for patches.

A pixel of the output depends on a square of ``receptive_field`` pixels of the input. So there is no
attention, and no normalisation over space: one GroupNorm would make every pixel depend on the
whole image. Normalisation is over the channels of each pixel.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from diffad_lite.networks.unet import check_sizes, timestep_embedding, zero_init


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def conv3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps or halves the grid; it pads by reflection, not zeros."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, padding_mode="reflect")


class PatchBlock(nn.Module):
    """norm-SiLU-conv3, the time embedding, norm-SiLU-conv1, and a skip.

    It widens the receptive field by two pixels of its grid.
    """

    def __init__(self, channels: int, emb_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.conv1 = conv3(channels, channels)
        self.emb = nn.Linear(emb_dim, channels)
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x`` (B, C, H, W), ``emb`` (B, emb_dim) -> (B, C, H, W)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.emb(F.silu(emb))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class PatchDiff(nn.Module):
    """Noise predictor ``eps_theta(x_t, t)`` with a small receptive field.

    Args:
        channels: of the image.
        blocks: number of blocks; each widens the receptive field by ``2 * unshuffle`` pixels.
        width: channels inside.
        unshuffle: side of the pixel blocks that are folded into channels; image sides must be
            multiples of it.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, channels: int, blocks: int, *, width: int = 48, unshuffle: int = 2) -> None:
        super().__init__()
        check_sizes(channels=channels, blocks=blocks, width=width, unshuffle=unshuffle)
        self.unshuffle, self.width = unshuffle, width
        self.receptive_field = unshuffle * (2 * blocks + 1)
        folded, emb_dim = channels * unshuffle**2, 2 * width
        self.time_mlp = nn.Sequential(
            nn.Linear(width, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.stem = nn.Conv2d(folded, width, 1)
        self.blocks = nn.ModuleList(PatchBlock(width, emb_dim) for _ in range(blocks))
        self.out_norm = ChannelNorm(width)
        self.out = zero_init(nn.Conv2d(width, folded, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy images (B, C, H, W) and timesteps (B,) -> noise (B, C, H, W)."""
        emb = self.time_mlp(timestep_embedding(t, self.width).to(x.dtype))
        h = self.stem(F.pixel_unshuffle(x, self.unshuffle))
        for block in self.blocks:
            h = block(h, emb)
        return F.pixel_shuffle(self.out(F.silu(self.out_norm(h))), self.unshuffle)


class PatchDetector(nn.Module):
    """One logit per 4 x 4 pixels: is the patch around them anomalous?

    Args:
        channels: of the image, whose sides must be multiples of 4.
        extra: further 3x3 convolutions on the coarse grid; each widens the receptive field by 8
            pixels.
        width: channels on the coarse grid.
    """

    def __init__(self, channels: int, *, extra: int = 0, width: int = 64) -> None:
        super().__init__()
        self.receptive_field = 22 + 8 * extra
        fine = 3 * width // 4
        steps = [(fine, 1), (fine, 1), (width, 2), *[(width, 1)] * (1 + extra)]
        layers: list[nn.Module] = [nn.PixelUnshuffle(2)]
        channels *= 4
        for out, stride in steps:
            layers += [conv3(channels, out, stride), ChannelNorm(out), nn.ReLU()]
            channels = out
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, 1, 1))

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H / 4, W / 4), of length 1 at each position."""
        return F.normalize(self.trunk(x), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, H / 4, W / 4)."""
        return self.head(self.trunk(x))[:, 0]
