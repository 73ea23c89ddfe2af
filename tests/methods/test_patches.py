"""PaDiM and the patch bank against plain statistics, and with a denoiser's features."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from diffad_lite.methods.base import get_method
from diffad_lite.methods.patches import Bank, PaDiM, farthest_points
from diffad_lite.training.state import TrainConfig


def pictures(n: int, seed: int, size: int = 32) -> torch.Tensor:
    """Normal images: two stripes with their own grain."""
    rng = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.randn(n, 1, size, size, generator=rng)
    x[..., size // 3, :] += 0.5
    return x.clamp(-1, 1)


def configure(name: str, **changes):
    config = get_method(name).Config.for_profile("ci", channels=1, image_size=32)
    return replace(config, **changes)


def fit(name: str, **changes):
    method = get_method(name)(configure(name, **changes))
    return method.fit(pictures(20, 0), pictures(8, 1), seed=0, progress=False)


def normal_patches(method, images: torch.Tensor) -> torch.Tensor:
    return method._patches(images, [])


@pytest.fixture(scope="module")
def padim() -> PaDiM:
    return fit("padim", smooth_sigma=0.0)


@pytest.fixture(scope="module")
def bank() -> Bank:
    return fit("bank", smooth_sigma=0.0, bank_size=200)


def test_padim_is_the_mahalanobis_distance_at_each_position(padim):
    train, test = normal_patches(padim, pictures(20, 0)), normal_patches(padim, pictures(2, 5))
    picked = padim.network["statistics"].picked
    for position in (0, 21, 63):
        x = train[:, position, picked].double().numpy()
        exact = EmpiricalCovariance().fit(x)
        covariance = exact.covariance_ * 20 / 19 + 0.01 * np.eye(x.shape[1])
        centred = test[0, position, picked].double().numpy() - x.mean(0)
        expected = np.sqrt(centred @ np.linalg.inv(covariance) @ centred)
        assert padim._distance(test)[0, position] == pytest.approx(expected, rel=1e-3)


def test_padim_keeps_as_many_features_as_asked_for():
    method = fit("padim", n_dims=30)
    statistics = method.network["statistics"]
    assert statistics.mean.shape == (64, 30)
    assert len(set(statistics.picked.tolist())) == 30
    assert statistics.picked.max() > 30  # among all 144


def test_bank_is_the_distance_to_the_nearest(bank):
    stored = bank.network["statistics"].bank
    patches = normal_patches(bank, pictures(1, 5))
    expected, _ = NearestNeighbors(n_neighbors=1).fit(stored.numpy()).kneighbors(patches[0].numpy())
    np.testing.assert_allclose(bank._distance(patches)[0], expected[:, 0], rtol=1e-3, atol=1e-2)
    # A patch of the bank is at no distance, but for float32's rounding.
    assert bank._distance(stored[None, :5]).max() < 0.02 * expected.mean()


def test_a_bank_larger_than_its_images_is_filled_by_repetition():
    method = fit("bank", bank_size=3000)
    stored = method.network["statistics"].bank
    assert stored.shape[0] == 3000
    assert len(stored.unique(dim=0)) == 20 * 64


@pytest.mark.parametrize("name", ["padim", "bank"])
def test_a_planted_square_is_found(name):
    method = fit(name)
    clean = pictures(6, 9)
    broken = clean.clone()
    broken[:, :, 8:16, 18:26] = -0.9
    prediction = method.predict(broken)
    assert prediction.image_score.min() > method.predict(clean).image_score.max()
    peak = prediction.anomaly_map[0].flatten().argmax()
    assert 4 <= peak // 32 <= 20
    assert 14 <= peak % 32 <= 30


def test_farthest_points_are_spread_and_distinct():
    rng = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(500, 2, generator=rng), torch.tensor([[40.0, 0], [0, 40]])])
    chosen = farthest_points(points, 3)
    assert chosen[0] == 0
    assert set(chosen[1:].tolist()) == {500, 501}
    every = farthest_points(points[:20], 50)
    assert sorted(every.tolist()) == list(range(20))
    assert sorted(farthest_points(torch.zeros(5, 2), 5).tolist()) == list(range(5))


def test_the_greedy_cover_is_twice_the_best_at_most():
    """On a line the best radius of k centres is known: Gonzalez's bound is 2."""
    points = torch.linspace(0, 1, 1001)[:, None]
    chosen = farthest_points(points, 11)
    radius = (points - points[chosen].T).abs().amin(1).max()
    assert radius <= 2 * (1 / 22) + 1e-6


@pytest.mark.parametrize("name", ["padim", "bank"])
def test_a_denoiser_gives_features(name, tmp_path):
    config = configure(name, backbone="denoiser")
    steps = TrainConfig(steps=3, batch_size=2)
    config = replace(config, denoiser=replace(config.denoiser, train=steps, base_channels=8))
    method = get_method(name)(config)
    method.fit(pictures(12, 0), pictures(8, 1), seed=0, progress=False)
    assert method.reports_["diffusion"]["steps"] == 3
    prediction = method.predict(pictures(3, 2))
    assert prediction.anomaly_map.shape == (3, 32, 32)
    method.save_pretrained(tmp_path / "model")
    again = type(method).from_pretrained(tmp_path / "model").predict(pictures(3, 2))
    assert torch.equal(again.image_score, prediction.image_score)
    other = get_method(name)(config).fit(pictures(12, 0), pictures(8, 1), seed=1, progress=False)
    stems = (m.denoiser.network.stem.weight for m in (method, other))
    assert not torch.equal(*stems)


def test_the_papers_backbone_is_the_default_of_the_paper_profile():
    config = PaDiM.Config.for_profile("paper", channels=3, image_size=256)
    with torch.device("meta"):
        method = PaDiM(config)
    assert config.backbone == "wide_resnet50_2"
    # 1,792 features of layers 1 to 3 on a grid of 56 (Defard et al. 2021), 550 of them kept
    assert method.network["statistics"].whitening.shape == (56**2, 550, 550)
