"""The U-Net: any size, any number of channels, independent images, messages, its size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffad_lite.networks.unet import Attention, ResBlock, UNet, timestep_embedding


def tiny(channels: int = 1, *, base: int = 8, random: bool = True, **options) -> UNet:
    """A small network; ``random`` also fills the layers that start at zero."""
    settings = {"channel_mults": (1, 2), "attention_levels": (1,), "unshuffle": 2} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # whatever ran before: some weights round worse in bfloat16
        network = UNet(channels, base_channels=base, **settings).eval()
    if random:
        rng = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            if not parameter.any():
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    return network


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def apply(network: UNet, x: Tensor, t: int | list[int] = 7) -> Tensor:
    return network(x, torch.tensor([t] * len(x) if isinstance(t, int) else t))


@pytest.mark.parametrize("size", [(16, 16), (48, 40), (5, 300), (17, 3), (8, 8)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_output_has_the_shape_of_the_image(channels, size):
    x = images(2, channels, *size)
    y = apply(tiny(channels), x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    assert y.std() > 1e-3  # every layer is alive


def test_a_single_pixel_passes_through_the_lite_network():
    network = UNet(1, base_channels=32, channel_mults=(1, 2, 4), attention_levels=(2,), unshuffle=2)
    assert apply(network.eval(), images(1, 1, 1, 1)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("size", [(1, 1), (8, 8)], ids=str)
def test_the_ci_network_takes_one_small_image_alone(size):
    network = UNet(1, base_channels=16, channel_mults=(1, 2, 4), attention_levels=(2,), unshuffle=2)
    x = images(2, 1, *size)
    torch.testing.assert_close(
        apply(network.eval(), x[:1]), apply(network, x)[:1], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_untrained_network_predicts_zero(channels):
    y = apply(tiny(channels, random=False), images(2, channels, 10, 12))
    assert torch.equal(y, torch.zeros(2, channels, 10, 12))


@pytest.mark.parametrize("channels", [0, -1])
def test_a_network_without_channels_is_refused(channels):
    with pytest.raises(ValueError, match=f"in_channels must be at least 1, got {channels}"):
        UNet(channels)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 8, 8), (2, 4, 8, 8)], ids=str)
def test_images_of_other_channels_are_refused(shape):
    message = r"expected images \(B, 1, H, W\), got .*trained on images of other channels\?"
    with pytest.raises(ValueError, match=message):
        apply(tiny(1), images(*shape))


@pytest.mark.parametrize("levels", [(2,), (0, 5), (-1,)], ids=str)
def test_attention_at_a_level_that_does_not_exist_is_refused(levels):
    with pytest.raises(ValueError, match=r"attention_levels .* do not all exist among the 2"):
        tiny(attention_levels=levels)


@pytest.mark.parametrize("size", [(16, 16), (13, 22)], ids=str)
def test_images_of_a_batch_do_not_see_each_other(size):
    network = tiny(3)
    x, t = images(4, 3, *size), [0, 10, 500, 999]
    together = apply(network, x, t)
    others = images(4, 3, *size, seed=1)
    others[2] = x[2]
    for i in range(4):
        alone = apply(network, x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(apply(network, others, t)[2], together[2], rtol=0, atol=1e-5)
    assert (apply(network, others, t)[1] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(46, 39), (41, 48), (48, 40)], ids=str)
def test_padding_repeats_the_lower_and_right_border(size):
    network = tiny(channel_mults=(1, 2, 2), attention_levels=(2,))
    assert network.multiple == 8
    x = images(2, 1, *size)
    padded = F.pad(x, (0, 48 - size[1], 0, 48 - size[0]), mode="replicate")
    if size[1] <= 40:
        padded = padded[..., :40]  # up to the next multiple only
    full = apply(network, padded)
    torch.testing.assert_close(
        apply(network, x), full[..., : size[0], : size[1]], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("base", [16, 32])
def test_output_depends_on_the_timestep(base):
    network, x = tiny(base=base, channel_mults=(1, 2, 4)), images(1, 1, 16, 16)
    outputs = [apply(network, x, t) for t in (0, 1, 500)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


def test_every_residual_block_is_given_the_embedding_of_the_timestep():
    network, given = tiny(channel_mults=(1, 2, 4)), []
    blocks = [m for m in network.modules() if isinstance(m, ResBlock)]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    apply(network, images(2, 1, 16, 16), [3, 700])
    assert len(given) == len(blocks) == 3 + 2 + 6
    expected = network.time_mlp(timestep_embedding(torch.tensor([3, 700]), network.base_channels))
    assert all(torch.equal(emb, expected) for emb in given)
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("width", [8, 16, 32, 64, 128])
def test_every_residual_block_sees_the_time_embedding(width):
    rng = torch.Generator().manual_seed(0)
    block = ResBlock(width, width, 16)
    torch.nn.init.constant_(block.conv2.weight, 0.1)
    x = torch.randn(1, width, 4, 4, generator=rng)
    a, b = torch.randn(2, 1, 16, generator=rng)
    with torch.no_grad():
        assert (block(x, a) - block(x, b)).abs().max() > 1e-3


@pytest.mark.parametrize("dim", [2, 7, 32])
def test_timestep_embedding_tells_timesteps_apart(dim):
    embedding = timestep_embedding(torch.arange(1000), dim)
    assert embedding.shape == (1000, dim)
    assert embedding.abs().max() <= 1
    assert len(embedding.unique(dim=0)) == 1000
    torch.testing.assert_close(embedding[0, : dim // 2], torch.ones(dim // 2))


def test_size_of_the_lite_network():
    network = UNet(1, base_channels=32, channel_mults=(1, 2, 4), attention_levels=(2,), unshuffle=2)
    assert sum(p.numel() for p in network.parameters()) == 2_736_676


def test_heads_and_groups_are_those_that_are_asked_for():
    network = tiny(3, attention_levels=(1,), attention_heads=2, norm_groups=4)
    groups = [m.num_groups for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    heads = [m.heads for m in network.modules() if isinstance(m, Attention)]
    assert set(groups) == {4} and set(heads) == {2}
    with pytest.raises(ValueError, match=r"8 channels cannot be divided into 3 groups"):
        tiny(3, norm_groups=3)
    with pytest.raises(ValueError, match=r"channels cannot be divided into 5 heads"):
        tiny(3, attention_levels=(1,), attention_heads=5)


@pytest.mark.parametrize("unshuffle", [1, 2, 4])
def test_stem_folds_blocks_of_pixels_into_channels(unshuffle):
    network = tiny(3, unshuffle=unshuffle)
    assert network.stem.in_channels == 3 * unshuffle**2
    assert network.multiple == 2 * unshuffle
    assert apply(network, images(1, 3, 16, 16)).shape == (1, 3, 16, 16)


def test_gradients_are_finite_and_reach_both_ends():
    network = tiny(3).train()
    x = images(2, 3, 13, 16)
    network(x, torch.tensor([3, 900])).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert network.stem.weight.grad.abs().max() > 1e-6
    assert network.out.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("base", [8, 32], ids=["one head", "heads of 32"])
def test_gradients_are_those_of_double_precision(base):
    """In float32 nearly, under bfloat16 autocast roughly; and without gradients, likewise."""
    network, x, t = tiny(base=base), images(2, 1, 16, 16), torch.tensor([3, 900])
    exact = copy.deepcopy(network).double()
    wanted = exact(x.double(), t)
    wanted.square().mean().backward()
    torch.testing.assert_close(apply(network, x, [3, 900]).double(), wanted, rtol=0, atol=1e-5)
    for autocast, tolerance in ((False, 1e-4), (True, 0.1)):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = network(x, t)
        found.float().square().mean().backward()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)
        for one, other in zip(network.parameters(), exact.parameters(), strict=True):
            assert (one.grad - other.grad).norm() <= tolerance * other.grad.norm() + 1e-4


def test_a_network_of_bfloat16_alone_works():
    network = tiny(base=32).bfloat16()
    assert apply(network, images(1, 1, 16, 16).bfloat16()).dtype == torch.bfloat16
