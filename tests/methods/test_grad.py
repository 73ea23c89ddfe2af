"""GRAD-style detection: weights, their optimum on a toy, chance on normal images, no diffusion."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffad_lite.evaluation.metrics import image_metrics
from diffad_lite.methods.grad import (
    CLIP,
    GRAD,
    GRADConfig,
    Reweighting,
    WeightConfig,
    draw_windows,
    parts_of_pool,
    pattern_weights,
)
from diffad_lite.networks.patchnet import PatchDetector
from diffad_lite.training.loop import TrainReport
from diffad_lite.training.state import TrainConfig

SIZE = 16
PLAIN = WeightConfig(flatten_contrastive=0.0, flatten_normal=0.0, filter_normal=0.0)


def config(**changes) -> GRADConfig:
    tiny = GRADConfig.for_profile("ci", channels=1, image_size=SIZE)
    short = TrainConfig(steps=4, batch_size=4)
    return replace(tiny, **({"train": short, "train_patchdiff": short} | changes))


def pictures(n: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (0.4 * torch.randn(n, 1, SIZE, SIZE, generator=rng)).clamp(-1, 1)


def shares(k: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    both = torch.rand(2, k, generator=rng) + 0.05
    return tuple(both / both.sum(1, keepdim=True))


def everywhere(images: Tensor) -> Tensor:
    """A pool of images that were drawn as a whole."""
    return torch.cat([images, torch.ones_like(images[:, :1])], 1)


# ------------------------------------------------------------------------------------ weights


def test_without_exponents_every_pattern_counts_alike():
    w, v = pattern_weights(*shares(), PLAIN)
    torch.testing.assert_close(w, torch.ones(8))
    torch.testing.assert_close(v, torch.ones(8))


def test_weights_have_mean_one_and_stay_within_the_clip():
    contrastive, normal = shares()
    w, v = pattern_weights(contrastive, normal, WeightConfig())
    assert float((w * contrastive).sum()) == pytest.approx(1, abs=1e-5)
    assert float((v * normal).sum()) == pytest.approx(1, abs=1e-5)
    extreme = torch.tensor([1 - 1e-6, 1e-6]), torch.tensor([0.5, 0.5])
    for weights in pattern_weights(*extreme, WeightConfig()):
        assert ((weights >= 1 / CLIP) & (weights <= CLIP)).all()


def test_rare_patterns_count_more_and_normal_ones_less():
    contrastive, normal = torch.tensor([0.6, 0.3, 0.1]), torch.full((3,), 1 / 3)
    w, _ = pattern_weights(contrastive, normal, replace(PLAIN, flatten_contrastive=0.5))
    assert w.tolist() == sorted(w.tolist())
    w, _ = pattern_weights(normal, contrastive, replace(PLAIN, filter_normal=2.0))
    assert w.tolist() == sorted(w.tolist())
    _, v = pattern_weights(normal, contrastive, replace(PLAIN, flatten_normal=0.5))
    assert v.tolist() == sorted(v.tolist())
    order = torch.tensor([2, 0, 1])
    w, v = pattern_weights(contrastive, normal, WeightConfig())
    again = pattern_weights(contrastive[order], normal[order], WeightConfig())
    torch.testing.assert_close(again[0], w[order])
    torch.testing.assert_close(again[1], v[order])


def test_the_weighted_loss_is_least_at_the_weighted_density_ratio():
    """Tables of logits: g* = log(w c / (v n)), for each pattern."""
    contrastive, normal = shares()
    w, v = pattern_weights(contrastive, normal, WeightConfig())
    g = torch.zeros(8, requires_grad=True)
    optimiser = torch.optim.LBFGS([g], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = (v * normal * F.softplus(g)).sum() + (w * contrastive * F.softplus(-g)).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(
        g.detach(), (w * contrastive / (v * normal)).log(), atol=0.01, rtol=0
    )


def test_weights_are_those_of_a_frozen_copy():
    detector = PatchDetector(1)
    weights = Reweighting(detector, WeightConfig(4), 64)
    normal, contrastive = pictures(8), pictures(8, 1).sign()
    weights.fit(detector, *parts_of_pool(everywhere(contrastive)), normal, 0)
    before = weights.clusters(normal)
    assert before.shape == (8, 4, 4)
    for parameter in detector.parameters():
        parameter.data += 1
    assert torch.equal(weights.clusters(normal), before)
    assert float(weights.normal.sum()) == pytest.approx(1, abs=1e-5)
    counts = np.bincount(before.flatten(), minlength=4) + 1
    torch.testing.assert_close(weights.normal, torch.tensor(counts / counts.sum()).float())
    assert not any(p.requires_grad for p in weights.parameters())


def test_more_clusters_than_there_are_locations_are_empty():
    detector = PatchDetector(1)
    weights = Reweighting(detector, WeightConfig(64), 64)
    weights.fit(detector, *parts_of_pool(everywhere(pictures(1))), pictures(1, 1), 0)  # 32 of them
    assert int(weights.clusters(pictures(1)).max()) < 32
    assert torch.isfinite(weights.w).all()


def test_only_drawn_locations_make_the_shares():
    detector, contrastive = PatchDetector(1), pictures(8, 1).sign()
    weights = Reweighting(detector, WeightConfig(4), 64)
    drawn = torch.zeros(8, 4, 4, dtype=torch.bool)
    drawn[:2] = True
    weights.fit(detector, contrastive, drawn, pictures(8), 0)
    counts = np.bincount(weights.clusters(contrastive)[drawn], minlength=4) + 1
    torch.testing.assert_close(weights.contrastive, torch.tensor(counts / counts.sum()).float())


# ----------------------------------------------------------------------------------- training


def test_stages_and_their_order():
    made = GRAD(config()).fit(pictures(12), pictures(20, 1), seed=0, progress=False)
    assert list(made.reports_) == ["patchdiff6", "patchdiff10", "pool", "warmup", "detector"]
    assert made.reports_["warmup"]["steps"] + made.reports_["detector"]["steps"] == 4


def test_drawing_the_pool_counts_in_the_time_budget(monkeypatch):
    given, clock = {}, iter([0.0, 25.0])

    def quick(*args, stage, budget, **options):
        given[stage] = budget
        return TrainReport(3, 10.0, torch.zeros(3))

    monkeypatch.setattr("diffad_lite.methods.grad.train_network", quick)
    monkeypatch.setattr("diffad_lite.methods.grad.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(GRAD, "pool_sizes", lambda *_: (4, 12))
    options = {"seed": 0, "workdir": None, "progress": False}
    reports = GRAD(config(reweight=False))._fit(pictures(12), budget=100.0, **options)
    assert given["patchdiff6"] == given["patchdiff10"] == pytest.approx(30)  # .6 of all, halved
    assert given["warmup"] == pytest.approx((100 - 20 - 25) / 3)
    assert given["detector"] == pytest.approx(100 - 20 - 25 - 10)
    assert sum(report.seconds for report in reports.values()) == pytest.approx(65)


def test_a_short_time_draws_fewer_patterns_and_says_so(monkeypatch, tmp_path):
    made = GRAD(config(n_patterns=100, steps=30))
    clock = iter([0.0, 2.0])  # a pattern of each of the two generators takes a second
    monkeypatch.setattr("diffad_lite.methods.grad.time.monotonic", lambda: next(clock))
    message = "allows 7 of 100 contrastive images, and twins of 15 of 20 normal ones; allow more"
    with pytest.warns(UserWarning, match=message):
        assert made.pool_sizes(pictures(20), 12.0, tmp_path) == (7, 15)
    assert len(made.draw_pool(pictures(20), 0, 7)) == 7
    assert made.pool_sizes(pictures(20), 1e6, tmp_path) == (7, 15)  # a resumed training's
    clock = iter([0.0, 2.0])
    with pytest.warns(UserWarning, match="allows 2 of 100 .* twins of 1 of 20"):
        assert made.pool_sizes(pictures(20), 0.5, None) == (2, 1)


def test_without_a_short_time_the_pool_is_whole():
    made = GRAD(config(n_patterns=6))
    assert made.pool_sizes(pictures(12), None, None) == (6, 12)
    assert made.pool_sizes(pictures(12), 1e6, None) == (6, 12)


def test_fit_takes_images_and_nothing_that_marks_them():
    assert list(inspect.signature(GRAD.fit).parameters)[1:3] == ["train", "calibration"]


def test_without_reweighting_the_loss_is_the_plain_one():
    made = GRAD(config(reweight=False)).fit(pictures(12), pictures(20, 1), seed=0, progress=False)
    assert torch.equal(made.network["weights"].w, torch.ones(4))
    pool, detector = everywhere(pictures(6, 3)), made.network["detector"]
    losses = []
    for weights in (None, made.network["weights"]):
        generator = torch.Generator().manual_seed(0)
        losses.append(made.detector_loss(detector, pictures(6), pool, weights, generator))
    assert torch.equal(*losses)


def test_the_pool_is_of_all_generators_and_of_its_seed_alone():
    made = GRAD(config(n_patterns=7))
    normal = pictures(12)
    pool = made.draw_pool(normal, 5)
    assert pool.shape == (7, 2, SIZE, SIZE)
    assert pool.abs().max() <= 1
    assert set(pool[:, 1].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(pool, made.draw_pool(normal, 5))
    assert not torch.equal(pool, made.draw_pool(normal, 6))


def test_around_its_window_a_contrastive_picture_is_a_normal_image():
    made, normal = GRAD(config()), pictures(12)
    drawn, window = made.draw_pool(normal, 5).split(1, dim=1)
    for image, own in zip(drawn, window, strict=True):
        around, inside = own == 0, own == 1
        (origin,) = (x for x in normal if torch.allclose(image[around], x[around], atol=1e-6))
        assert not torch.allclose(image[inside], origin[inside], atol=1e-2)


def test_windows_have_their_sides_and_are_everywhere():
    images = torch.zeros(400, 1, 32, 48)
    window = draw_windows(images, (0.25, 0.5), torch.Generator().manual_seed(0))
    assert window.shape == (400, 1, 32, 48)
    heights, widths = (window.amax(axis).sum(-1).flatten() for axis in (-1, -2))
    assert heights.max() in (16, 17)  # the sides at their longest, none cut off
    assert widths.max() in (24, 25)
    covered = window.mean((0, 1))
    assert covered.min() > 0.02  # also the corners


def test_loss_counts_drawn_locations_only():
    made, normal = GRAD(config(reweight=False)), pictures(4)
    detector, window = made.network["detector"], torch.zeros_like(normal)
    window[..., :8] = 1
    pool = torch.cat([pictures(4, 3), window], 1)
    images, drawn = parts_of_pool(pool)
    assert drawn[:, :, :2].all() and not drawn[:, :, 2:].any()
    loss = made.detector_loss(detector, normal, pool, None, torch.Generator().manual_seed(0))
    index = torch.randint(4, (4,), generator=torch.Generator().manual_seed(0))
    g = detector(images[index])
    expected = F.softplus(detector(normal)).mean() + F.softplus(-g)[drawn].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_twins_are_normal_images_that_every_generator_has_touched():
    made, normal = GRAD(config(twin_noise_level=30)), pictures(5)
    twins = made.twins(normal, 0)
    assert twins.shape == (2 * 5, 1, SIZE, SIZE)
    assert torch.equal(twins, made.twins(normal, 0))
    # Untrained networks predict no noise: what is left is the noise of that level.
    level = made.diffusion.schedule.alphas_cumprod[30]
    for own in twins.split(5):
        assert 0 < float((own - normal).std()) < 2 * float(((1 - level) / level).sqrt())


@pytest.mark.parametrize(
    ("contrastive", "low", "high"), [("normal", 0.35, 0.65), ("coarser", 0.99, 1)]
)
def test_the_detector_learns_what_differs_and_nothing_else(contrastive, low, high, monkeypatch):
    """Normal images as contrastive ones teach nothing: chance level."""

    def drawn(n, seed):
        if contrastive == "normal":
            return pictures(n, seed)
        means = F.avg_pool2d(F.pad(pictures(n, seed), (1, 1, 0, 0), mode="circular"), (1, 3), 1)
        return (1.7 * means).clamp(-1, 1)  # of about the same deviation

    monkeypatch.setattr(GRAD, "draw_pool", lambda *_: everywhere(drawn(200, 7)))
    monkeypatch.setattr(GRAD, "twins", lambda self, normal, seed: normal[:0])
    long = TrainConfig(steps=240, batch_size=8, learning_rate=2e-3, ema_decay=0.95)
    made = GRAD(config(train=long, standardise=False, calibrate=False, extra=0))
    made.fit(pictures(200), pictures(20, 1), seed=0, progress=False)
    images = torch.cat([pictures(100, 2), drawn(100, 8)])  # of neither training nor pool
    scores = made.predict(images).image_score.numpy()
    assert low <= image_metrics(np.repeat([0, 1], 100), scores)["image_auroc"] <= high


# ---------------------------------------------------------------------------------- inference


def test_no_diffusion_at_test_time(monkeypatch):
    made = GRAD(config()).fit(pictures(12), pictures(20, 1), seed=0, progress=False)
    expected = made.predict(pictures(3)).image_score

    def forbidden(*args, **kwargs):
        raise AssertionError("a PatchDiff was asked")

    for network in made.patchdiffs.values():
        monkeypatch.setattr(network, "forward", forbidden)
    monkeypatch.setattr(made.network["weights"].snapshot, "forward", forbidden)
    assert torch.equal(made.predict(pictures(3)).image_score, expected)
    with made.count_evaluations() as count:
        made.predict(pictures(3))
    assert count == [3]


def test_calibrated_maps_of_normal_images_are_standard():
    made = GRAD(config(calibrate=True, smooth_sigma=0.0))
    made.fit(pictures(12), pictures(40, 1), seed=0, progress=False)
    maps = made.predict(pictures(40, 1)).anomaly_map
    assert float(maps.mean()) == pytest.approx(0, abs=0.1)
    assert float(maps.std()) == pytest.approx(1, abs=0.15)


def test_the_windows_of_lite():
    made = GRAD(GRADConfig.for_profile("lite", channels=1, image_size=64))
    fields = [network.receptive_field for network in made.patchdiffs.values()]
    assert fields == [10, 18]
    assert made.network["detector"].receptive_field > max(fields)


def test_the_paper_profile_can_be_built():
    c = GRADConfig.for_profile("paper", channels=3, image_size=256)
    with torch.device("meta"):
        made = GRAD(c)
        assert made.network["detector"](torch.zeros(1, 3, 256, 256)).shape == (1, 64, 64)
    fields = [network.receptive_field for network in made.patchdiffs.values()]
    assert fields == [14, 30, 62]
    assert made.network["detector"].receptive_field == 86


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": ()}, "blocks must not be empty"),
        ({"blocks": (2, 2)}, "blocks must be different numbers"),
        (
            {"noise_levels": (0.8, 0.4)},
            r"GRADConfig.noise_levels must be \(low, high\) within 0..1",
        ),
        ({"windows": (0.5,)}, r"GRADConfig.windows must be \(low, high\) within 0..1"),
        ({"twin_noise_level": 1000}, "GRADConfig.twin_noise_level must be"),
        ({"image_size": 30}, "image_size must be a multiple of 4"),
        ({"image_size": 4}, "and at least 8, got 4"),
        ({"n_patterns": 0}, "GRADConfig.n_patterns must be"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(GRADConfig(), **changes)
