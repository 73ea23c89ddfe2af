"""The binarising autoencoder: bits, straight-through gradients, codewords, the published size."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffad_lite.networks.autoencoder import (
    AutoencoderConfig,
    BinaryAutoencoder,
    Block,
    straight_through,
)

TINY = AutoencoderConfig(base_channels=8, channel_mults=(1, 2), bits=6, codeword=8)
PUBLISHED = AutoencoderConfig(32, (1, 2, 2, 4), 2, unshuffle=1, bits=128, codeword=256)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_pictures_become_bits_and_pictures_again(channels, size):
    network = BinaryAutoencoder(channels, TINY)
    x = torch.randn(2, channels, *size, generator=rng())
    pictures, y = network(x, rng())
    assert pictures.shape == x.shape
    assert y.shape == (2, 6, size[0] // TINY.factor, size[1] // TINY.factor)
    assert ((y > 0) & (y < 1)).all()


def test_an_indivisible_image_size_is_refused():
    with pytest.raises(ValueError, match=r"image size \(16, 18\) is not divisible by 4"):
        BinaryAutoencoder(1, TINY).bit_probability(torch.zeros(1, 1, 16, 18))


def test_bits_are_bits_and_the_gradient_is_that_of_their_probability():
    y = torch.rand(4, 6, 5, 5, generator=rng(), dtype=torch.float64).requires_grad_()
    z = straight_through(y, rng(1))
    assert set(z.detach().unique().tolist()) <= {0.0, 1.0}
    weights = torch.randn(z.shape, generator=rng(2), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * z).sum(), y)
    torch.testing.assert_close(gradient, weights)
    many = torch.stack([straight_through(y, rng(i)).detach() for i in range(400)]).mean(0)
    torch.testing.assert_close(many, y.detach(), atol=0.15, rtol=0)


def test_a_cell_is_the_sum_of_the_codewords_of_its_ones():
    network = BinaryAutoencoder(1, TINY).eval()
    z = (torch.rand(2, 6, 4, 4, generator=rng()) < 0.5).float()
    rows = network.codewords.weight[:, :, 0, 0]  # (codeword, bits)
    expected = torch.einsum("bnhw,dn->bdhw", z, rows)
    torch.testing.assert_close(network.codewords(z), expected)
    assert network.codewords(torch.zeros_like(z)).abs().max() == 0
    order = torch.randperm(6, generator=rng(1))
    before = network.decode(z)
    network.codewords.weight.data = network.codewords.weight.data[:, order]
    torch.testing.assert_close(network.decode(z[:, order]), before)


def test_both_halves_learn():
    network = BinaryAutoencoder(1, TINY)
    x = torch.randn(2, 1, 16, 16, generator=rng())
    pictures, _ = network(x, rng())
    (pictures - x).abs().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert network.encoder[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("channels", [1, 4])
def test_the_paper_profile_is_as_large_as_the_published_network(channels):
    """Its count, 4.26 million, has weights that are never used, which are added here.

    Every residual block there holds a 1x1 convolution for its skip, needed or not, and the decoder
    a head that is not called.
    """
    with torch.device("meta"):
        network = BinaryAutoencoder(channels, PUBLISHED)
        x = torch.zeros(1, channels, 256, 256)
        assert network.bit_probability(x).shape == (1, 128, 32, 32)
        assert network.decode(torch.zeros(1, 128, 32, 32)).shape == x.shape
    count = sum(p.numel() for p in network.parameters())
    idle = [
        m for m in network.modules() if isinstance(m, Block) and isinstance(m.skip, nn.Identity)
    ]
    widths = [block.conv1.in_channels for block in idle]
    unused = sum(w * w + w for w in widths) + (32 * 32 * 9 + 32) + (32 * channels + channels)
    assert count + unused == pytest.approx(4.26e6, rel=0.01)
    assert count == pytest.approx(4.10e6, rel=0.01)


@pytest.mark.parametrize("field", ["base_channels", "blocks_per_level", "unshuffle", "bits"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"AutoencoderConfig.{field} must be"):
        replace(TINY, **{field: 0})
    with pytest.raises(ValueError, match=r"channel_mults\.1 must be at least 1, got 0"):
        replace(TINY, channel_mults=(1, 0))
