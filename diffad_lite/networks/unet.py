"""The U-Net that predicts the noise (Ho et al. 2020, appendix B), small enough for a laptop.

Two choices make it fast on a CPU: a pixel-unshuffle stem, which moves the work to a coarser grid
without loss of information, and attention at the coarse levels only.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 32  # channels of an attention head
Resample = Callable[[Tensor], Tensor]  # halve or double


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Return the sinusoidal embedding (B, dim) of timesteps ``t`` (B,), as in the Transformer."""
    half = dim // 2
    freqs = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)  # (half,)
    angles = t[:, None].float() * freqs  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def group_norm(channels: int, groups: int | None = None) -> nn.GroupNorm:
    """Return a GroupNorm; None: at most 32 groups, of at least 4 channels each.

    Groups of one channel would subtract each channel's mean, and with it the time embedding that
    the residual blocks add. Unlike BatchNorm, it uses no statistics across the batch.

    Raises:
        ValueError: the channels cannot be divided into ``groups``.
    """
    if groups is None:
        groups = math.gcd(32, channels // 4) if channels % 4 == 0 else 1
    if channels % groups:
        raise ValueError(
            f"{channels} channels cannot be divided into {groups} groups (norm_groups); take a "
            "divisor of the channels of every level"
        )
    return nn.GroupNorm(groups, channels)


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for sizes below 1, by name."""
    if wrong := {name: size for name, size in sizes.items() if size < 1}:
        raise ValueError(f"{', '.join(wrong)} must be at least 1, got {min(wrong.values())}")


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a residual block starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Attention(nn.Module):
    """Self-attention over the pixels of a coarse grid, with a skip.

    Args:
        channels: of input and output.
        heads: number of heads; None: one for every 32 channels.
        groups: of the normalisation, see :func:`group_norm`.

    Raises:
        ValueError: the channels cannot be divided into heads or groups.
    """

    def __init__(self, channels: int, heads: int | None = None, groups: int | None = None) -> None:
        super().__init__()
        if heads is None:
            heads = channels // HEAD_WIDTH if channels % HEAD_WIDTH == 0 else 1
        if channels % heads:
            raise ValueError(
                f"{channels} channels cannot be divided into {heads} heads (attention_heads); take "
                "a divisor of the channels of every level with attention"
            )
        self.heads = heads
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.heads, C // self.heads, H * W)
        # Fused attention, which stores no HW x HW matrix, needs a contiguous last axis.
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)  # each (B, heads, HW, head_dim)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()  # the gradient is five times as fast
        with torch.autocast("cpu", enabled=False):
            h = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(h.to(qkv.dtype).transpose(-1, -2).reshape(B, C, H, W))


def halve(x: Tensor) -> Tensor:
    """Average each 2x2 block: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    """Repeat each pixel: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """norm-SiLU-conv twice, with the time embedding added between, and a skip; then attention.

    With ``resample`` (:func:`halve` or :func:`double`), both paths change their grid. ``heads`` and
    ``groups`` are those of :class:`Attention`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        attends: bool = False,
        resample: Resample | None = None,
        heads: int | None = None,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.attention = Attention(out_channels, heads, groups) if attends else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """``x`` (B, in, H, W), ``emb`` (B, emb_dim) -> (B, out, H, W), on the new grid."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.attention(self.skip(self.resample(x)) + h)


class Downsample(nn.Conv2d):
    """Halve the grid by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Double the grid by nearest-neighbour interpolation and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return super().forward(double(x))


class UNet(nn.Module):
    """Noise predictor ``eps_theta(x_t, t)`` for images, or grids of bits, of any size.

    Args:
        in_channels: channels of the image.
        base_channels: channels of the finest level.
        channel_mults: channels of each level as multiples of the base, finest first.
        blocks_per_level: residual blocks per level in the encoder; the decoder has one more.
        attention_levels: indices of the levels with self-attention; the middle always has it.
        unshuffle: side of the pixel blocks that the stem folds into channels (1 = none).
        residual_resampling: change the grid by residual blocks, as BigGAN and guided diffusion
            do, instead of single convolutions.
        attention_heads: of each self-attention; None: one for every 32 channels.
        norm_groups: of each GroupNorm; None: at most 32, of at least 4 channels each.

    Raises:
        ValueError: a size is below 1, an attention level does not exist, or channels cannot be
            divided into the given heads or groups.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        base_channels: int = 32,
        channel_mults: tuple[int, ...] = (1, 2, 4),
        blocks_per_level: int = 1,
        attention_levels: tuple[int, ...] = (),
        unshuffle: int = 1,
        residual_resampling: bool = False,
        attention_heads: int | None = None,
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, base_channels=base_channels, unshuffle=unshuffle)
        check_sizes(channel_mults=min(channel_mults, default=0), blocks_per_level=blocks_per_level)
        if not set(attention_levels) <= set(range(len(channel_mults))):
            raise ValueError(
                f"attention_levels {attention_levels} do not all exist among the "
                f"{len(channel_mults)} levels of channel_mults {channel_mults}"
            )
        self.in_channels, self.base_channels, self.unshuffle = in_channels, base_channels, unshuffle
        self.multiple = unshuffle * 2 ** (len(channel_mults) - 1)  # sides are padded to this
        emb_dim = 4 * base_channels
        self.time_mlp = nn.Sequential(
            nn.Linear(base_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)
        )
        self.stem = nn.Conv2d(in_channels * unshuffle**2, base_channels, 3, padding=1)
        block = partial(ResBlock, emb_dim=emb_dim, heads=attention_heads, groups=norm_groups)

        def resampler(resample: Resample, channels: int) -> nn.Module:
            if residual_resampling:
                return block(channels, channels, resample=resample)
            return Downsample(channels) if resample is halve else Upsample(channels)

        widths = [base_channels * m for m in channel_mults]
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [base_channels]
        channels = base_channels
        for level, width in enumerate(widths):
            for _ in range(blocks_per_level):
                self.down.append(block(channels, width, attends=level in attention_levels))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.down.append(resampler(halve, channels))
                skips.append(channels)
        self.middle = nn.ModuleList(
            block(channels, channels, attends=attends) for attends in (True, False)
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks_per_level + 1):
                in_width = channels + skips.pop()
                self.up.append(block(in_width, width, attends=level in attention_levels))
                channels = width
            if level > 0:
                self.up.append(resampler(double, channels))

        self.out_norm = group_norm(channels, norm_groups)
        out = nn.Conv2d(channels, in_channels * unshuffle**2, 3, padding=1)
        self.out = zero_init(out)  # the untrained network predicts zero noise

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: noisy images (B, in_channels, H, W), any H and W.
            t: timesteps (B,), 0 .. T-1.

        Returns:
            (B, in_channels, H, W).

        Raises:
            ValueError: the number of channels differs from ``in_channels``.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"expected images (B, {self.in_channels}, H, W), got {tuple(x.shape)}; "
                "was the model trained on images of other channels?"
            )
        H, W = x.shape[-2:]
        x = F.pad(x, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        emb = self.time_mlp(timestep_embedding(t, self.base_channels).to(x.dtype))  # (B, emb_dim)
        folded = F.pixel_unshuffle(x, self.unshuffle)
        # Channels last is a fifth faster on a CPU, except for the gradient of GroupNorm.
        if not torch.is_grad_enabled():
            folded = folded.contiguous(memory_format=torch.channels_last)
        h = self.stem(folded)
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else layer(h, emb)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            if isinstance(layer, Upsample):
                h = layer(h)
            elif layer.resample is double:
                h = layer(h, emb)
            else:
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
        h = self.out(F.silu(self.out_norm(h)))
        return F.pixel_shuffle(h, self.unshuffle)[..., :H, :W]
