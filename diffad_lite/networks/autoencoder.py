"""The binary autoencoder of masked Bernoulli diffusion: an image as a grid of bits.

After Binary Latent Diffusion (Wang et al. 2023) and the official code of masked Bernoulli diffusion
(JuliaWolleb/Anomaly_berdiff). The vector of a grid cell is the sum of the learned codewords of its
bits that are 1.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from diffad_lite.core.config import Size, Widths, configuration
from diffad_lite.diffusion.bernoulli import sample_bits
from diffad_lite.diffusion.gaussian import Generators
from diffad_lite.networks.unet import Attention, Upsample, group_norm


@configuration
class AutoencoderConfig:
    """Configuration of :class:`BinaryAutoencoder`; defaults are for 64 pixels.

    Attributes:
        base_channels: channels of the finest level.
        channel_mults: channels of each level as multiples of the base; the grid halves in between.
        blocks_per_level: residual blocks per level.
        unshuffle: side of the pixel blocks that the stem folds into channels.
        bits: bits per grid cell, C.
        codeword: length of a codeword.
        attention_heads: of the self-attention at the coarsest level; None: one for every 32
            channels.
        norm_groups: of each GroupNorm; None: at most 32, of at least 4 channels each.
    """

    base_channels: Size = 32
    channel_mults: Widths = (1, 2)
    blocks_per_level: Size = 1
    unshuffle: Size = 2
    bits: Size = 8
    codeword: Size = 64
    attention_heads: Size | None = None
    norm_groups: Size | None = None

    @property
    def factor(self) -> int:
        """Side of a grid cell in pixels."""
        return self.unshuffle * 2 ** (len(self.channel_mults) - 1)


class Block(nn.Module):
    """norm-SiLU-conv twice, and a skip."""

    def __init__(self, in_channels: int, out_channels: int, groups: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(in_channels, groups), group_norm(out_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Halve(nn.Conv2d):
    """Halve the grid by a strided convolution, padded right and below as in the official code."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class BinaryAutoencoder(nn.Module):
    """Images (B, C, H, W) to bits (B, bits, H / factor, W / factor) and back.

    Args:
        channels: of the images.
        config: sizes.

    Raises:
        ValueError: channels cannot be divided into the configured heads or groups.
    """

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        block = partial(Block, groups=config.norm_groups)
        norm = partial(group_norm, groups=config.norm_groups)
        attention = partial(Attention, heads=config.attention_heads, groups=config.norm_groups)
        folded = channels * config.unshuffle**2
        widths = [config.base_channels * m for m in config.channel_mults]
        top = widths[-1]
        down: list[nn.Module] = [nn.Conv2d(folded, widths[0], 3, padding=1)]
        in_width = widths[0]
        for level, width in enumerate(widths):
            down += [Halve(in_width)] if level else []
            for _ in range(config.blocks_per_level):
                down.append(block(in_width, width))
                in_width = width
        down += [block(top, top), attention(top), block(top, top), norm(top)]
        down += [nn.Conv2d(top, config.codeword, 3, padding=1)]
        self.encoder = nn.Sequential(*down)
        self.to_bits = nn.Conv2d(config.codeword, config.bits, 1)
        self.codewords = nn.Conv2d(config.bits, config.codeword, 1, bias=False)
        up: list[nn.Module] = [norm(config.codeword)]
        up += [nn.Conv2d(config.codeword, top, 3, padding=1)]
        up += [block(top, top), attention(top), block(top, top)]
        in_width = top
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks_per_level):
                up.append(block(in_width, width))
                in_width = width
            up += [Upsample(in_width)] if level else []
        up += [norm(in_width), nn.Conv2d(in_width, folded, 3, padding=1)]
        self.decoder = nn.Sequential(*up)

    def bit_probability(self, x: Tensor) -> Tensor:
        """Return P(bit = 1) of the codes of images, (B, bits, h, w).

        Raises:
            ValueError: height or width is not divisible by the factor.
        """
        f = self.config.factor
        if x.shape[-2] % f or x.shape[-1] % f:
            size = tuple(x.shape[-2:])
            raise ValueError(f"image size {size} is not divisible by {f}; resize the images")
        h = self.encoder(F.pixel_unshuffle(x, self.config.unshuffle))
        return self.to_bits(h).float().sigmoid()

    def decode(self, z: Tensor) -> Tensor:
        """Return the images of bits, or of their probabilities; not clipped to [-1, 1]."""
        return F.pixel_shuffle(self.decoder(self.codewords(z)), self.config.unshuffle)

    def forward(self, x: Tensor, generators: Generators) -> tuple[Tensor, Tensor]:
        """Draw a code and decode it -> images, P(bit = 1); gradients reach encoder and decoder."""
        y = self.bit_probability(x)
        return self.decode(straight_through(y, generators)), y


def straight_through(y: Tensor, generators: Generators) -> Tensor:
    """Draw bits with probability ``y``; the gradient passes as if they were ``y``."""
    return y + (sample_bits(y, generators) - y).detach()
