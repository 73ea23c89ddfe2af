"""Bounded windows: exact zeros outside, shifts, crops; and a network that breaks the rule."""

import pytest
import torch
from torch import Tensor, nn

from diffad_lite.networks.patchnet import ChannelNorm, PatchBlock, PatchDetector, PatchDiff


def randomised(network: nn.Module) -> nn.Module:
    """With weights everywhere; last layers begin at zero."""
    rng = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    return network.double().eval()


def diff(**options) -> PatchDiff:
    return randomised(PatchDiff(1, **({"blocks": 2, "width": 8} | options)))


def images(n: int, side: int = 48) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, side, side, generator=rng, dtype=torch.float64)


def touched(apply, x: Tensor, pick) -> Tensor:
    """Rows and columns of ``x`` that one output depends on: (first, last) of each axis."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pick(apply(x)), x)
    where = gradient[0, 0].nonzero()
    return torch.stack([where.amin(0), where.amax(0)])


def predict(network):
    return lambda x: network(x, torch.full((len(x),), 3))


# ------------------------------------------------------------------------- receptive fields


@pytest.mark.parametrize(
    ("unshuffle", "blocks", "field"), [(1, 2, 5), (2, 2, 10), (2, 4, 18), (4, 2, 20)]
)
def test_a_noise_estimate_depends_on_its_window_alone(unshuffle, blocks, field):
    network = diff(unshuffle=unshuffle, blocks=blocks)
    assert network.receptive_field == field
    for phase in range(unshuffle):
        row, column = 24 + phase, 24 + (3 * phase) % unshuffle
        first, last = touched(predict(network), images(1), lambda y, i=row, j=column: y[0, 0, i, j])
        cell = unshuffle * (torch.tensor([row, column]) // unshuffle)
        assert torch.equal(first, cell - unshuffle * blocks)
        assert torch.equal(last, cell + unshuffle * (blocks + 1) - 1)


@pytest.mark.parametrize(("extra", "field"), [(0, 22), (1, 30)])
def test_a_logit_depends_on_its_window_alone(extra, field):
    network = randomised(PatchDetector(1, extra=extra, width=8))
    assert network.receptive_field == field
    first, last = touched(network, images(1, 64), lambda y: y[0, 8, 8])
    assert (last - first + 1).tolist() == [field, field]
    assert (first <= 32).all()
    assert (last >= 35).all()  # its own cell lies inside


def test_one_group_norm_lets_every_pixel_see_everything():
    network = diff()
    network.blocks[0].norm1 = nn.GroupNorm(2, 8).double()
    first, last = touched(predict(network), images(1), lambda y: y[0, 0, 24, 24])
    assert first.tolist() == [0, 0]
    assert last.tolist() == [47, 47]


def test_channel_norm_does_not_look_sideways():
    norm = ChannelNorm(8)
    x = torch.randn(1, 8, 4, 4)
    y = x.clone()
    y[..., 0, 0] += 1
    assert torch.equal(norm(x)[..., 1:, :], norm(y)[..., 1:, :])
    torch.testing.assert_close(norm(x).mean(1), torch.zeros(1, 4, 4), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------ shifts and crops


def circular(network):
    """The same network without a border: what leaves on one side comes in on the other."""
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode = "circular"
    return network


def test_a_shifted_image_gives_a_shifted_answer():
    network, x = circular(diff()), images(2)
    shift = (4, -6)  # multiples of a cell
    moved = predict(network)(x.roll(shift, (-2, -1)))
    torch.testing.assert_close(moved, predict(network)(x).roll(shift, (-2, -1)))
    detector = circular(randomised(PatchDetector(1, width=8)))
    moved = detector(x.roll((8, -4), (-2, -1)))
    torch.testing.assert_close(moved, detector(x).roll((2, -1), (-2, -1)))


def test_a_crop_gives_the_same_answer_away_from_its_border():
    detector, x = randomised(PatchDetector(1, width=8)), images(1, 64)
    whole, crop = detector(x), detector(x[..., 8:56, 8:56])
    torch.testing.assert_close(crop[:, 3:-3, 3:-3], whole[:, 5:-5, 5:-5], atol=1e-10, rtol=0)
    assert (crop - whole[:, 2:-2, 2:-2]).abs().max() > 1e-6  # at the border


def test_shapes():
    detector = PatchDetector(3)
    x = torch.randn(2, 3, 32, 24)
    assert detector(x).shape == (2, 8, 6)
    features = detector.features(x)
    assert features.shape == (2, 64, 8, 6)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2, 8, 6))
    assert PatchDiff(3, 2)(x, torch.zeros(2)).shape == x.shape


def test_an_untrained_generator_predicts_no_noise():
    x = torch.randn(2, 1, 16, 16)
    assert PatchDiff(1, 2)(x, torch.zeros(2)).abs().max() == 0
    block = PatchBlock(8, 4)
    h = torch.randn(1, 8, 4, 4)
    assert torch.equal(block(h, torch.zeros(1, 4)), h)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PatchDiff(1, **({"blocks": 2} | options))
