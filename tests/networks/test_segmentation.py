"""The segmentation network: shapes, published size, batch independence, its loss."""

import pytest
import torch
import torch.nn.functional as F

from diffad_lite.networks.segmentation import SegmentationConfig, SegmentationNet, segmentation_loss

SMALL = SegmentationConfig(base_channels=8, channel_mults=(1, 2, 2))


def network(channels: int = 2, config: SegmentationConfig = SMALL) -> SegmentationNet:
    torch.manual_seed(0)
    return SegmentationNet(channels, config).eval()


@pytest.mark.parametrize("size", [(16, 16), (15, 22), (3, 40)])
def test_one_logit_a_pixel_at_any_size(size):
    net = network(6)
    assert net(torch.randn(2, 6, *size)).shape == (2, 1, *size)


def test_the_published_size():
    """The discriminative network of DRAEM with six input channels: 28.4 million parameters."""
    with torch.device("meta"):
        net = network(6, SegmentationConfig(64, (1, 2, 4, 8, 8, 8), batch_norm=True))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(28.4e6, rel=0.005)


def test_images_do_not_see_each_other():
    x = torch.randn(3, 2, 16, 16)
    for config in (SMALL, SegmentationConfig(8, (1, 2, 2), batch_norm=True)):
        net = network(config=config)
        torch.testing.assert_close(net(x)[1:2], net(x[1:2]), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network().modules())


def test_each_output_pixel_depends_on_both_inputs():
    net = network()
    x = torch.randn(1, 2, 16, 16, requires_grad=True)
    net(x)[0, 0, 8, 8].backward()
    assert (x.grad.abs().sum((0, 2, 3)) > 0).all()


def test_the_loss_is_smooth_l1_and_five_times_the_focal_loss():
    logits = torch.tensor([-2.0, -0.5, 0.5, 3.0]).view(1, 1, 2, 2)
    masks = torch.tensor([0.0, 1.0, 1.0, 1.0]).view(1, 1, 2, 2)
    p = logits.sigmoid()
    true = torch.where(masks > 0, p, 1 - p)
    focal = 0.5 * (1 - true) ** 4 * -true.log()
    smooth = 0.5 * (p - masks) ** 2  # differences of probabilities are below 1
    expected = (smooth + 5 * focal).mean()
    torch.testing.assert_close(segmentation_loss(logits, masks), expected)
    half = 0.5 * F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    assert (focal <= half).all()


def test_the_loss_is_finite_at_extreme_logits():
    logits = torch.tensor([-200.0, 200.0]).view(1, 1, 1, 2).requires_grad_()
    loss = segmentation_loss(logits, torch.tensor([1.0, 0.0]).view(1, 1, 1, 2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match=r"SegmentationConfig.base_channels must be"):
        SegmentationConfig(base_channels=0)
    with pytest.raises(ValueError, match=r"channel_mults must not be empty"):
        SegmentationConfig(channel_mults=())
