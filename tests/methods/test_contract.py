"""The contract that every registered method keeps: fit, predict, explain, save, messages."""

import json
import shlex
import warnings
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from speed import TensorsAlive
from torch import Tensor

from diffad_lite.core.config import override
from diffad_lite.data.images import image_keys, undo_standardise
from diffad_lite.data.readers import FLIP_AXES
from diffad_lite.diffusion.gaussian import final_step, noise_generators
from diffad_lite.methods import base as methods_base
from diffad_lite.methods import checkpoints
from diffad_lite.methods.anoddpm import AnoDDPM
from diffad_lite.methods.base import (
    METHODS,
    Buffers,
    Method,
    blur,
    choose_images,
    exact,
    get_method,
    load_pretrained,
)
from diffad_lite.methods.calibration import (
    MapCalibration,
    conformal_threshold,
    pixel_threshold,
    top_k_mean,
)
from diffad_lite.methods.denoiser import Denoiser, DenoiserConfig
from diffad_lite.spaces import features
from diffad_lite.spaces.features import LITE0_LAYERS, ImageNetFeatures

NAMES = sorted(METHODS)
BASELINES = ("brightness", "mean_image", "pca")
WITH_STATISTICS = ("glad", "mdps")  # of calibration images, which raw maps depend on
SIZE = 16
each_method = pytest.mark.parametrize("name", NAMES)


class Stub(Method):
    """The least that a method can be: what the base class does shows on it as on any other."""

    name = "stub"
    title = "stub"

    def _build(self):
        return Buffers(mean=torch.zeros(()))

    def _fit(self, train, **options):
        self.network = Buffers(mean=train.mean())
        return {}

    def _infer(self, images, generators, trace=None):
        return (images - self.network.mean).abs().mean(1), None, {}


METHODS.pop("stub")  # other tests go through the registry
KINDS = METHODS | {"stub": Stub}
each_kind = pytest.mark.parametrize("name", ["stub", "anoddpm"])  # for what no method overrides


def pictures(n: int, channels: int = 1, size: tuple[int, int] = (SIZE, SIZE), seed=0) -> Tensor:
    """Images (n, C, H, W) in [-1, 1]: a common scene, each with its own brightness and grain."""
    rng = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, s) for s in size), indexing="ij")
    scene = 0.4 * torch.sin(4 * rows) * torch.cos(3 * columns)
    level = 0.2 * torch.randn(n, 1, 1, 1, generator=rng)
    grain = 0.1 * torch.randn(n, channels, *size, generator=rng)
    return (scene + level + grain).clamp(-1, 1)


def tiny_config(name: str, channels: int = 1, size: int = SIZE):
    config = KINDS[name].Config.for_profile("ci", channels=channels, image_size=size)
    if hasattr(config, "train"):
        config = replace(config, train=replace(config.train, steps=2, batch_size=2))
    if hasattr(config, "denoiser"):
        short = replace(config.denoiser.train, steps=2, batch_size=2)
        config = replace(config, denoiser=replace(config.denoiser, train=short))
    return replace(config, calibrate=True)


def fit(name: str, channels: int = 1, size=(SIZE, SIZE), seed: int = 0, **options) -> Method:
    config = options.pop("config", tiny_config(name, channels))
    train, calibration = pictures(12, channels, size), pictures(20, channels, size, seed=1)
    method = KINDS[name](config)
    assert method.fit(train, calibration, seed=seed, progress=False, **options) is method
    return method


@cache
def fitted(name: str, channels: int = 1) -> Method:
    """Fitted once; tests must leave it as it is."""
    return fit(name, channels)


@pytest.fixture
def saved(tmp_path):
    """A function name -> folder of the fitted method's checkpoint."""

    def save(name: str, **options):
        folder = tmp_path / "models" / name
        fitted(name).save_pretrained(folder, **options)
        return folder

    return save


def assert_same(a, b, tolerance: float = 0.0) -> None:
    for field in ("image_score", "anomaly_map", "reconstruction"):
        left, right = getattr(a, field), getattr(b, field)
        assert (left is None) == (right is None), field
        if left is not None:
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, msg=field)
    assert a.extras.keys() == b.extras.keys()


# -------------------------------------------------------------------------- registry, profiles


def test_registry_holds_the_methods_under_their_names():
    assert {"anoddpm", *BASELINES} <= set(METHODS)
    for name, cls in METHODS.items():
        assert cls.name == name
        assert get_method(name) is cls
        assert {f.name for f in fields(cls.Config)} >= cls.Config.inference_fields()
        assert cls.Config.inference_fields() >= {"quantile", "calibrate"}
    assert len({cls.title for cls in METHODS.values()}) == len(METHODS)


def test_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown method 'anodpm'; did you mean 'anoddpm'"):
        get_method("anodpm")


@pytest.mark.parametrize("profile", ["ci", "lite", "paper"])
@each_method
def test_every_profile_builds(name, profile):
    config = METHODS[name].Config.for_profile(profile, channels=3, image_size=32)
    assert (config.channels, config.image_size) == (3, 32)
    with torch.device("meta"):
        method = METHODS[name](config)
    assert method.threshold_ is None
    assert method.config is config


@each_method
def test_unknown_profile_is_refused(name):
    with pytest.raises(ValueError, match="unknown profile 'papper'; did you mean 'paper'"):
        METHODS[name].Config.for_profile("papper", channels=1, image_size=32)


@each_method
def test_profiles_accept_a_data_set(name):
    for dataset, category in (("elpv", "mono"), ("folder", "nut"), (None, None)):
        shape = {"channels": 1, "image_size": 64, "flip_axes": FLIP_AXES.get(dataset, ())}
        config = METHODS[name].Config.for_profile(
            "lite", dataset=dataset, category=category, **shape
        )
        if hasattr(config, "train"):
            assert config.train.flip_axes == ((-1, -2) if dataset == "elpv" else ())
        if name == "brightness":
            assert config.side == ("darker" if dataset == "elpv" else "both")


def test_size_of_the_paper_network_is_that_of_its_kind():
    """The U-Net of Ho et al. with these widths has 114 million parameters (appendix B)."""
    config = AnoDDPM.Config.for_profile("paper", channels=1, image_size=256)
    with torch.device("meta"):
        method = AnoDDPM(config)
    assert next(method.network.parameters()).device.type == "meta"
    assert 100e6 < sum(p.numel() for p in method.network.parameters()) < 140e6


# ------------------------------------------------------------------------------- fit, predict


@pytest.mark.parametrize("channels", [1, 3, 4])
@each_method
def test_predictions_have_the_shapes_of_the_contract(name, channels):
    method = fitted(name, channels)
    x = pictures(5, channels, seed=2)
    before = x.clone()
    prediction = method.predict(x)
    assert prediction.image_score.shape == (5,)
    assert prediction.anomaly_map.shape == (5, SIZE, SIZE)
    tensors = [prediction.image_score, prediction.anomaly_map, *prediction.extras.values()]
    if prediction.reconstruction is not None:
        assert prediction.reconstruction.shape == x.shape
        tensors.append(prediction.reconstruction)
    for tensor in tensors:
        assert tensor.device.type == "cpu"
        assert tensor.dtype == torch.float32
        assert torch.isfinite(tensor).all()
        assert not tensor.requires_grad
        assert len(tensor) == 5
    assert prediction.image_score.unique().numel() == 5
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", BASELINES)  # two steps teach a network nothing
def test_a_large_defect_raises_the_score(name):
    x = pictures(4, seed=2)
    x -= x.mean(dim=(1, 2, 3), keepdim=True)
    broken = x.clone()
    broken[:, :, 4:12, 4:12] = 1.0
    method, keys = fitted(name), image_keys(x)
    clean = method.predict(x, keys=keys).image_score
    assert (method.predict(broken, keys=keys).image_score > clean).all()


@each_method
def test_equal_seeds_repeat_and_other_noise_changes_stochastic_methods_only(name):
    method, x = fitted(name), pictures(3, seed=2)
    first = method.predict(x, seed=4)
    assert_same(first, method.predict(x, seed=4))
    other_seed = method.predict(x, seed=5)
    other_keys = method.predict(x, seed=4, keys=["a", "b", "c"])
    if name in BASELINES:
        assert_same(first, other_seed)
        assert_same(first, other_keys)
    if name == "anoddpm":
        for other in (other_seed, other_keys):
            assert (first.image_score != other.image_score).all()


@each_method
def test_equal_seeds_train_equal_models_and_leave_the_global_generator_alone(name):
    state = torch.get_rng_state()
    a, b = fit(name, seed=3), fit(name, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    state = torch.get_rng_state()
    x = pictures(3, seed=2)
    assert_same(a.predict(x), b.predict(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.threshold_ == b.threshold_
    if any(p.requires_grad for p in a.network.parameters()):
        weights = [next(m.network.parameters()) for m in (a, fit(name, seed=4))]
        assert not torch.equal(*weights)


@each_method
def test_scores_do_not_depend_on_batch_or_order(name, monkeypatch):
    method, x = fitted(name), pictures(8, seed=2)
    whole = method.predict(x)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 4, 3])
    shuffled = method.predict(x[order])
    torch.testing.assert_close(shuffled.image_score, whole.image_score[order], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(shuffled.anomaly_map, whole.anomaly_map[order], rtol=1e-5, atol=1e-4)
    for size in (1, 3):
        parts = [method.predict(x[i : i + size]) for i in range(0, 8, size)]
        scores = torch.cat([p.image_score for p in parts])
        torch.testing.assert_close(scores, whole.image_score, rtol=1e-5, atol=1e-4)
        monkeypatch.setattr(methods_base, "BATCH_SIZE", size)  # the same inside one call
        assert_same(method.predict(x), whole, 1e-4)


@each_kind
def test_more_images_than_a_batch_keep_their_order(name):
    method, x = fitted(name), pictures(methods_base.BATCH_SIZE + 1, seed=2)
    prediction = method.predict(x)
    assert len(prediction.image_score) == len(prediction.anomaly_map) == len(x)
    last = method.predict(x[-1:])
    torch.testing.assert_close(prediction.image_score[-1:], last.image_score, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(prediction.anomaly_map[-1:], last.anomaly_map, rtol=1e-5, atol=1e-4)


@each_kind
def test_default_keys_are_those_of_the_pixels(name):
    method, x = fitted(name), pictures(3, seed=2)
    assert_same(method.predict(x), method.predict(x, keys=image_keys(x)))


def test_keys_keep_the_noise_while_a_defect_is_planted():
    method, x = fitted("anoddpm"), pictures(2, seed=2)
    planted = x.clone()
    planted[:, :, 3:6, 3:6] = 1

    def noise(images: Tensor, keys: list[str]) -> Tensor:
        start = method.explain(images, keys=keys)["trajectory"][0]
        return method.diffusion.predict_noise(start.x, start.t, images)

    keys = image_keys(x)
    torch.testing.assert_close(noise(planted, keys), noise(x, keys), rtol=0, atol=1e-5)
    assert (noise(planted, image_keys(planted)) - noise(x, keys)).abs().max() > 0.5


def test_image_keys_name_pixels():
    x = pictures(3)
    keys = image_keys(x)
    assert len(set(keys)) == 3
    assert image_keys(x[[2, 0]]) == [keys[2], keys[0]]
    assert image_keys(x + 1e-6) == keys  # as stored on disk, in 8 bits
    changed = x.clone()
    changed[1, 0, 3, 3] += 0.1
    assert [a == b for a, b in zip(image_keys(changed), keys, strict=True)] == [True, False, True]


def test_noise_generators_depend_on_seed_and_key():
    draws = [torch.rand(4, generator=g) for g in noise_generators(["a", "b", "a"], 1)]
    other = torch.rand(4, generator=noise_generators(["a"], 2)[0])
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], other)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_other_sizes_run_through_a_convolutional_method(channels, tmp_path):
    method = fit("anoddpm", channels, size=(48, 40))
    x = pictures(3, channels, (48, 40), seed=2)
    prediction = method.predict(x)
    assert prediction.anomaly_map.shape == (3, 48, 40)
    assert prediction.reconstruction.shape == x.shape
    method.save_pretrained(tmp_path / "m")
    assert_same(AnoDDPM.from_pretrained(tmp_path / "m").predict(x), prediction)


@each_kind
def test_images_of_another_size_than_the_calibration_are_refused(name):
    with pytest.raises(ValueError, match=r"\(48, 40\).*\(16, 16\).*resize the images"):
        fitted(name).predict(pictures(2, size=(48, 40)))


@pytest.mark.parametrize("name", ["anoddpm", "brightness"])
def test_without_calibration_by_position_any_size_can_be_scored(name):
    method = fit(name, config=replace(tiny_config(name), calibrate=False))
    assert method.map_calibration_ is None
    for size in ((48, 40), (9, 31)):
        prediction = method.predict(pictures(2, size=size))
        assert prediction.anomaly_map.shape == (2, *size)
        assert torch.isfinite(prediction.image_score).all()


@each_method
def test_a_model_that_could_be_fitted_can_be_loaded(name, tmp_path):
    try:
        method = fit(name, size=(24, 24))  # the Config says 16
    except ValueError as error:
        assert "image_size" in str(error)  # a refusal would do as well
        return
    method.save_pretrained(tmp_path / "m")
    x = pictures(2, size=(24, 24))
    assert_same(METHODS[name].from_pretrained(tmp_path / "m").predict(x), method.predict(x))


@pytest.mark.parametrize("size", [(17, 17), (65, 65), (18, 14), (3, 3), (1, 1), (2, 40), (4, 4)])
@each_method
def test_an_image_of_any_size_is_scored_or_refused_with_a_size_that_fits(name, size):
    method = fit(name, config=replace(tiny_config(name), calibrate=False))
    try:
        scores = method.predict(pictures(2, size=size)).image_score
    except ValueError as error:
        message = str(error)
    else:
        assert torch.isfinite(scores).all()
        return
    H, W = size
    assert message.startswith(f"images: images are ({H}, {W}) (height, width), but {name} ")
    if method.any_size:
        near = tuple(int(n) for n in message.rsplit("(", 1)[1].rstrip(")").split(", "))
        assert torch.isfinite(method.predict(pictures(2, size=near)).image_score).all()


@pytest.mark.parametrize("size", [1, 3, 4, 17, 18])
@each_method
def test_a_model_for_images_of_any_size_is_trained_or_refused_by_name(name, size):
    try:
        fit(name, size=(size, size), config=replace(tiny_config(name), image_size=size))
    except ValueError as error:
        assert "image_size" in str(error) or "needs sides of at least" in str(error)


# ---------------------------------------------------------------------- calibration, threshold


@each_kind
def test_threshold_is_the_conformal_quantile_of_the_calibration_scores(name):
    method = fitted(name)
    assert method.calibration_scores_.shape == (20,)
    assert np.isfinite(method.calibration_scores_).all()
    assert method.threshold_ == conformal_threshold(method.calibration_scores_, 0.95)
    assert (method.calibration_scores_ > method.threshold_).mean() <= 0.05


def maps_by_other_folds(raw: Method, images: Tensor) -> np.ndarray:
    """Raw maps (N, H, W), those of each fifth by a method calibrated on the other four fifths."""
    fold, maps = np.arange(len(images)) % 5, np.empty((len(images), SIZE, SIZE), np.float32)
    for f in range(5):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few images
            raw.calibrate(images[fold != f])
        maps[fold == f] = raw.predict(images[fold == f]).anomaly_map.numpy()
    return maps


@each_method
def test_maps_and_scores_are_those_of_the_calibration(name):
    """Raw maps, standardised by the statistics of the calibration; cross-fitted for scores."""
    x, calibration = pictures(4, seed=2), pictures(20, seed=1)
    raw = fit(name, config=replace(tiny_config(name), calibrate=False))
    method = fitted(name)
    raw_scores = raw.calibration_scores_
    maps = raw.predict(calibration).anomaly_map.numpy()
    expected = MapCalibration.fit(maps).apply(raw.predict(x).anomaly_map.numpy())
    prediction = method.predict(x)
    np.testing.assert_allclose(prediction.anomaly_map.numpy(), expected, atol=1e-4)
    if name == "brightness":
        return  # its score is not made of its map
    fraction = method.config.top_fraction
    np.testing.assert_allclose(
        prediction.image_score.numpy(), top_k_mean(expected, fraction), atol=1e-4
    )
    by_others = maps
    if name in WITH_STATISTICS:  # whose maps depend on whether an image is in its statistics
        by_others = maps_by_other_folds(raw, calibration)
        assert np.abs(by_others - maps).max() > 1e-3
    crossed = top_k_mean(MapCalibration.cross_fit(by_others), fraction)
    np.testing.assert_allclose(method.calibration_scores_, crossed, atol=1e-4)
    assert np.abs(crossed - method.predict(calibration).image_score.numpy()).max() > 1e-2
    np.testing.assert_allclose(raw_scores, top_k_mean(by_others, fraction), atol=1e-4)


@pytest.mark.parametrize("calibrate", [True, False])
@each_method
def test_only_statistics_behind_raw_maps_cost_a_second_prediction(name, calibrate, monkeypatch):
    method = fitted(name).with_settings(calibrate=calibrate)
    infer, predicted = METHODS[name]._infer, []

    def count(self, images, *rest):
        predicted.append(len(images))
        return infer(self, images, *rest)

    monkeypatch.setattr(METHODS[name], "_infer", count)
    method.calibrate(pictures(20, seed=1))
    assert sum(predicted) == (40 if name in WITH_STATISTICS and calibrate else 20)
    assert (len(predicted) == 1) == (name not in WITH_STATISTICS)  # one batch, not one per fold


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_an_extreme_image_does_not_change_how_it_is_measured(name):
    """Image 7 turns dark, with a white bar: images of its fold are measured by the other folds."""
    images = pictures(20, seed=1)
    method = fitted(name).with_settings(calibrate=False)
    before = method.calibrate(images).calibration_scores_
    images[7] = (pictures(1, seed=5)[0] - 2).clamp(-1, 1)
    images[7, :, :4] = 1.0
    after = method.calibrate(images).calibration_scores_
    fold = np.arange(20) % 5
    same = (fold == 2) & (np.arange(20) != 7)
    np.testing.assert_array_equal(after[same], before[same])
    assert not np.isclose(after[fold != 2], before[fold != 2], atol=1e-6).all()
    method.calibrate(images[fold != 2])
    expected = method.predict(images[fold == 2]).image_score.numpy()
    np.testing.assert_allclose(after[fold == 2], expected, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_few_images_are_as_many_folds(name, n):
    """Where maps are not calibrated; a single image has only itself."""
    images = pictures(n, seed=1)
    method = fitted(name).with_settings(calibrate=False)
    scores = method.calibrate(images).calibration_scores_
    for i in range(n):
        others = [k for k in range(n) if k != i] or [0]
        method.calibrate(images[others])
        expected = method.predict(images[i : i + 1]).image_score.item()
        assert scores[i] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_the_statistics_are_finally_those_of_all_images(name):
    """Not those of the images outside of the last fold."""
    images = pictures(20, seed=1)
    method = fitted(name).with_settings().calibrate(images)
    found = {k: float(v) for k, v in method.network["statistics"].named_buffers()}
    method._set_statistics(method._measure(images))
    assert found == {k: float(v) for k, v in method.network["statistics"].named_buffers()}
    method._set_statistics(method._measure(images[np.arange(20) % 5 != 4]))
    assert found != {k: float(v) for k, v in method.network["statistics"].named_buffers()}


@each_kind
def test_the_pixel_threshold_is_three_standard_deviations_above_the_mean(name):
    raw = fitted(name).with_settings(calibrate=False).calibrate(pictures(20, seed=1))
    maps = raw.predict(pictures(20, seed=1)).anomaly_map.numpy()
    for method, pixels in ((raw, maps), (fitted(name), MapCalibration.cross_fit(maps))):
        values = pixels.astype(np.float64).ravel()
        mean = values.sum() / values.size
        expected = mean + 3 * np.sqrt(((values - mean) ** 2).sum() / values.size)
        assert method.pixel_threshold_ == pytest.approx(expected, rel=1e-9)
    assert pixel_threshold(np.array([[[0.0, 0.0], [0.0, 4.0]]])) == pytest.approx(1 + 3 * 3**0.5)
    large = np.full((2, 50, 50), 3e30, np.float32)  # whose squares exceed float32
    assert pixel_threshold(large) == pytest.approx(3e30)
    with pytest.raises(ValueError, match="maps"):
        pixel_threshold(np.array([[[np.nan]]]))


@each_method
def test_calibrating_again_gives_the_same_threshold(name):
    method = fit(name)
    before = method.threshold_
    assert method.calibrate(pictures(20, seed=1)) is method
    assert method.threshold_ == before
    method.calibrate(pictures(20, seed=9))
    assert method.threshold_ != before


def slow_stub(monkeypatch, calibrate: bool) -> Stub:
    """A method on whose clock only scoring takes time, one second an image."""
    now = [0.0]

    class SlowStub(Stub):
        def _infer(self, images, generators, trace=None):
            now[0] += len(images)
            return super()._infer(images, generators, trace)

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(methods_base, "time", clock)
    method = SlowStub(replace(tiny_config("stub"), calibrate=calibrate))
    method.now = now
    return method


@pytest.mark.parametrize(
    ("calibrate", "budget", "n"),
    [(True, 20.5, 15), (True, 0.5, 5), (False, 20.5, 19), (False, 0.5, 1)],
)
def test_a_budget_holds_for_the_calibration(monkeypatch, calibrate, budget, n):
    method, images = slow_stub(monkeypatch, calibrate), pictures(40, seed=1)
    with pytest.warns(UserWarning, match="calibration") as said:
        method.fit(pictures(4), images, seed=0, budget=budget, progress=False)
    (warning,) = said
    assert f"allowed {n} of 40 calibration images; the threshold is from these" in str(warning)
    assert method.now[0] <= max(budget, 5)
    again = Stub(method.config)
    again.network = method.network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images
        again.calibrate(choose_images(images, n))
    np.testing.assert_array_equal(method.calibration_scores_, again.calibration_scores_)
    assert (len(method.calibration_scores_), method.threshold_) == (n, again.threshold_)


@pytest.mark.parametrize(
    ("calibrate", "budget", "n"), [(True, 41.5, 15), (True, 0.5, 5), (False, 20.5, 19)]
)
def test_a_budget_counts_the_second_prediction(monkeypatch, calibrate, budget, n):
    """Two seconds an image where maps need statistics and are calibrated, else one."""

    def measure(self, images):
        return {"level": images.flatten(1).mean(1)}

    def set_statistics(self, measured):
        self.network.mean.fill_(measured["level"].mean())

    monkeypatch.setattr(Stub, "_measure", measure)
    monkeypatch.setattr(Stub, "_set_statistics", set_statistics)
    method, images = slow_stub(monkeypatch, calibrate), pictures(40, seed=1)
    with pytest.warns(UserWarning, match=f"allowed {n} of 40 calibration images"):
        method.fit(pictures(4), images, seed=0, budget=budget, progress=False)
    assert len(method.calibration_scores_) == n
    assert method.now[0] <= max(budget, 10)


def test_the_chosen_calibration_images_are_fixed_and_from_everywhere():
    images = torch.arange(40.0)
    few, more = (choose_images(images, n).tolist() for n in (10, 20))
    assert set(few) < set(more)
    assert few == sorted(few) == choose_images(images, 10).tolist()
    assert 10 < np.mean(few) < 30
    assert torch.equal(choose_images(images, 40), images)


@each_method
def test_a_calibration_that_fits_into_the_budget_is_the_same_as_without(name):
    expected, limited = fitted(name), fit(name, budget=1000.0)
    assert limited.threshold_ == expected.threshold_
    np.testing.assert_array_equal(limited.calibration_scores_, expected.calibration_scores_)
    for key, value in expected.network.state_dict().items():
        assert torch.equal(limited.network.state_dict()[key], value), key


def test_few_equal_images_do_not_stop_a_calibration_in_time(monkeypatch):
    method, images = slow_stub(monkeypatch, calibrate=True), pictures(40, seed=1)
    equal = choose_images(torch.arange(40), 5)
    images[equal] = images[0].clone()
    method.fit(pictures(4), images, seed=0, budget=1000.0, progress=False)
    assert len(method.calibration_scores_) == 40


def test_few_calibration_images_warn_and_take_the_maximum():
    method = fit("mean_image")
    with pytest.warns(UserWarning, match="the maximum is used"):
        method.calibrate(pictures(8, seed=1))
    assert method.threshold_ == method.calibration_scores_.max()


def test_brightness_is_the_deviation_of_the_mean_in_standard_deviations():
    train = pictures(12)
    level = train.mean(dim=(1, 2, 3))
    x = torch.stack([torch.full((1, SIZE, SIZE), v) for v in (-0.9, 0.9)])
    expected = (level.mean() - torch.tensor([-0.9, 0.9])) / level.std(correction=0)
    assert fitted("brightness").predict(x).image_score.tolist() == pytest.approx(
        expected.abs().tolist(), rel=1e-4
    )
    darker = fit("brightness", config=replace(tiny_config("brightness"), side="darker"))
    assert darker.predict(x).image_score.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_mean_image_reconstructs_the_mean():
    reconstruction = fitted("mean_image").predict(pictures(2, seed=2)).reconstruction
    torch.testing.assert_close(reconstruction[1], pictures(12).mean(0))


@pytest.mark.parametrize("name", ["mean_image", "anoddpm", "diffusionad", "glad", "mdps"])
def test_standardised_methods_do_not_see_brightness_and_contrast(name):
    """And their reconstructions have those of the picture."""
    method = fit(name, config=replace(tiny_config(name), standardise=True, calibrate=False))
    x, keys = pictures(3, seed=2), ["a", "b", "c"]
    a, b = (method.predict(p, keys=keys) for p in (x, 0.5 * x - 0.1))
    torch.testing.assert_close(a.anomaly_map, b.anomaly_map, rtol=0, atol=1e-3)
    torch.testing.assert_close(0.5 * a.reconstruction - 0.1, b.reconstruction, rtol=0, atol=1e-3)


@pytest.mark.parametrize("standardise", [True, False])
def test_pca_redraws_its_training_images_and_no_others(standardise):
    method = fit("pca", config=replace(tiny_config("pca"), standardise=standardise))
    train, other = pictures(12), pictures(3, seed=2)
    seen = undo_standardise(method.prepare(train), train) if standardise else train
    torch.testing.assert_close(method.predict(train).reconstruction, seen, rtol=0, atol=1e-4)
    assert (method.predict(other).reconstruction - other).abs().mean() > 0.02


def test_pca_takes_no_more_components_than_configured():
    method = fit("pca", config=replace(tiny_config("pca"), n_components=3))
    assert method.network.components.shape == (3, SIZE**2)
    torch.testing.assert_close(
        method.network.components @ method.network.components.T, torch.eye(3), rtol=0, atol=1e-4
    )
    assert (method.predict(pictures(12)).reconstruction - pictures(12)).abs().mean() > 0.01


# ---------------------------------------------------------------------------------- messages


BAD_IMAGES = {
    "channels": (lambda: pictures(2, 3), r"expected \(N, 1, H, W\), got \(2, 3, 16, 16\); this"),
    "axes": (lambda: pictures(2)[0], r"expected \(N, 1, H, W\), got \(1, 16, 16\)"),
    "empty": (lambda: pictures(2)[:0], "no images"),
    "nan": (lambda: pictures(3).index_fill(0, torch.tensor([1]), torch.nan), "image 1 contains N"),
    "infinity": (lambda: pictures(3).index_fill(0, torch.tensor([2]), torch.inf), "image 2 contai"),
    "uint8": (lambda: 127.5 * (pictures(2) + 1), r"must lie in \[-1, 1\], got .*x / 127\.5 - 1"),
    "too dark": (lambda: pictures(2) - 1.5, r"must lie in \[-1, 1\], got -"),
    "numpy": (lambda: pictures(2).numpy(), r"a tensor, got ndarray; convert it, e\.g\. by torch\."),
    "list": (lambda: list(pictures(2)), "expected a tensor, got list; convert it"),
}


@pytest.mark.parametrize("fault", sorted(BAD_IMAGES))
@each_kind
def test_images_that_no_method_can_take_are_refused(name, fault):
    make, message = BAD_IMAGES[fault]
    with pytest.raises(ValueError, match=f"^images: .*{message}"):
        fitted(name).predict(make())
    if name in BASELINES:  # the same check stands before every training
        method = KINDS[name](tiny_config(name))
        with pytest.raises(ValueError, match=f"^train: .*{message}"):
            method.fit(make(), pictures(20), seed=0)
        with pytest.raises(ValueError, match=f"^calibration: .*{message}"):
            method.fit(pictures(12), make(), seed=0)


@pytest.mark.parametrize("keys", [[], ["a"], ["a", "b", "c", "d"]], ids=len)
@each_kind
def test_wrong_number_of_keys_is_refused(name, keys):
    with pytest.raises(ValueError, match=f"{len(keys)} keys for 3 images; give one for each"):
        fitted(name).predict(pictures(3), keys=keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_level": 1000}, r"noise_level must be at most 999, got 1000"),
        ({"noise_level": 10, "steps": 12}, r"steps must be at most 11, got 12"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
        ({"denoiser": DenoiserConfig(attention_levels=(3,))}, "do not all exist among the 3"),
    ],
    ids=str,
)
def test_anoddpm_refuses_a_configuration_that_cannot_run(changes, message):
    with pytest.raises(ValueError, match=message):
        AnoDDPM(replace(tiny_config("anoddpm"), **changes))


# --------------------------------------------------------------------- explain, count, training


@each_method
def test_explain_returns_map_and_reconstruction_of_the_prediction(name):
    method, x = fitted(name), pictures(3, seed=2)
    parts, prediction = method.explain(x, seed=2), method.predict(x, seed=2)
    assert torch.equal(parts["anomaly_map"], prediction.anomaly_map)
    if prediction.reconstruction is None:
        assert parts["reconstruction"] is None
    else:
        assert torch.equal(parts["reconstruction"], prediction.reconstruction)


def test_anoddpm_explains_by_its_trajectory():
    config = replace(tiny_config("anoddpm"), noise_level=99, steps=4, n_noises=1)
    method, x = fit("anoddpm", config=config), pictures(2, seed=2)
    parts = method.explain(x, seed=3)
    assert [s.t for s in parts["trajectory"]] == [99, 74, 49, 24, -1]
    last = parts["trajectory"][-1].x
    torch.testing.assert_close(parts["residual"], x - last, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts["reconstruction"], last, rtol=0, atol=1e-6)


def test_anoddpm_compares_with_the_average_reconstruction_of_its_noises():
    config = replace(tiny_config("anoddpm"), n_noises=3, calibrate=False, smooth_sigma=0.0)
    method, x = fit("anoddpm", config=config), pictures(2, seed=2)
    prediction = method.predict(x, seed=1)
    generators = noise_generators(image_keys(x), 1)
    redrawn = torch.stack([final_step(method.trajectory(x, generators)).x for _ in range(3)])
    assert (redrawn[0] - redrawn[1]).abs().max() > 1e-3
    average = redrawn.mean(0)
    torch.testing.assert_close(prediction.reconstruction, average, rtol=0, atol=1e-6)
    residual = (x - average).abs().mean(1)
    torch.testing.assert_close(prediction.anomaly_map, residual, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("steps", "n_noises"), [(1, 1), (3, 2)])
def test_anoddpm_evaluates_once_for_each_image_step_and_noise(steps, n_noises):
    config = replace(tiny_config("anoddpm"), steps=steps, n_noises=n_noises)
    method = fit("anoddpm", config=config)
    with method.count_evaluations() as count:
        method.predict(pictures(5))
        assert count == [5 * steps * n_noises]
        method.predict(pictures(2))
        assert count == [7 * steps * n_noises]
    method.predict(pictures(2))
    assert count == [7 * steps * n_noises]  # the hooks are gone


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_evaluate_no_network(name):
    with fitted(name).count_evaluations() as count:
        fitted(name).predict(pictures(5))
    assert count == [0]
    assert fitted(name).reports_ == {}


def test_training_is_reported_and_kept_in_the_working_folder(tmp_path, monkeypatch):
    method = fit("anoddpm", workdir=tmp_path)
    assert method.reports_["diffusion"]["steps"] == 2
    assert method.reports_["diffusion"]["seconds"] > 0
    kept = {p.name for p in tmp_path.iterdir()}
    assert kept == {"diffusion.state.safetensors", "training.json"}
    assert not method.network.training

    def no_step(*_):
        raise AssertionError("a finished training must not be repeated")

    monkeypatch.setattr(Denoiser, "loss", no_step)
    again = fit("anoddpm", workdir=tmp_path)
    assert_same(again.predict(pictures(3)), method.predict(pictures(3)))


def test_training_state_of_another_configuration_is_refused(tmp_path):
    fit("anoddpm", workdir=tmp_path)
    config = tiny_config("anoddpm")
    train = replace(config.denoiser.train, learning_rate=1e-5)
    config = replace(config, denoiser=replace(config.denoiser, train=train))
    with pytest.raises(ValueError, match="another method, configuration or seed"):
        fit("anoddpm", workdir=tmp_path, config=config)
    with pytest.raises(ValueError, match="another method, configuration or seed"):
        fit("anoddpm", workdir=tmp_path, seed=1)


@pytest.mark.parametrize("changes", [{"beta_schedule": "cosine"}, {"num_timesteps": 500}], ids=str)
def test_training_state_of_another_noise_schedule_is_refused(tmp_path, changes):
    fit("anoddpm", workdir=tmp_path)
    config = tiny_config("anoddpm")
    config = replace(config, denoiser=replace(config.denoiser, **changes))
    with pytest.raises(ValueError, match="another method, configuration or seed"):
        fit("anoddpm", workdir=tmp_path, config=config)


def test_timesteps_of_the_loss_cover_the_schedule():
    denoiser, timesteps = Denoiser(DenoiserConfig(num_timesteps=101), channels=1), []

    def network(x, t):
        timesteps.extend(t.tolist())
        return x

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        denoiser.loss(network, pictures(100, size=(2, 2)), generator)
    assert set(timesteps) == set(range(101))


FLAT = torch.full((1, 1, SIZE, SIZE), 0.2)
EQUAL = {"flat": FLAT, "black": FLAT * 0 - 1, "textured": pictures(1)}


def fit_on(name: str, train: Tensor, calibration: Tensor, workdir: Path, calibrate: bool) -> Method:
    """Fit, and refuse every warning of a library."""
    config = replace(tiny_config(name), calibrate=calibrate)
    if name == "grad":
        config = replace(config, reweight=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", message="train: ")
        warnings.filterwarnings("default", message="calibration: ")
        method = METHODS[name](config)
        return method.fit(train, calibration, seed=0, progress=False, workdir=workdir)


@pytest.mark.parametrize("kind", EQUAL)
@each_method
def test_equal_calibration_images_are_refused_before_a_training(name, kind, tmp_path):
    same = EQUAL[kind].repeat(20, 1, 1, 1)
    changed = same.clone()
    changed[::5] = pictures(4)  # one fold: statistics of the others have no spread
    for calibration, n in ((same, 20), (changed, 16)):
        fault = f"^calibration: {n} of 20 images are equal, so that their maps .* calibrate=false$"
        with pytest.raises(ValueError, match=fault):
            fit_on(name, same[:12], calibration, tmp_path / "state", calibrate=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", EQUAL)
@each_method
def test_equal_images_are_said_where_a_model_can_be_fitted(name, kind, tmp_path):
    same = EQUAL[kind].repeat(20, 1, 1, 1)
    with pytest.warns(UserWarning) as said:
        method = fit_on(name, same[:12], same, tmp_path / "state", calibrate=False)
    images = "standardised images" if method.config.standardise else "images"
    expected = f"train: all 12 {images} are equal; every difference from it counts as an anomaly; "
    assert str(said[0].message) == expected + "add other normal images"
    expected = f"calibration: all 20 {images} are equal; its score is the threshold; add "
    assert [str(w.message).startswith(expected) for w in said[1:]] == [True]
    assert torch.isfinite(method.predict(pictures(3)).image_score).all()
    assert (method.predict(same[:2]).image_score <= method.threshold_ + 1e-5).all()


@pytest.mark.parametrize("calibrate", [True, False])
@each_method
def test_a_single_training_image_is_said(name, calibrate, tmp_path):
    with pytest.warns(UserWarning) as said:
        method = fit_on(name, pictures(1), pictures(20, seed=1), tmp_path / "state", calibrate)
    assert [str(w.message).split(";")[0] for w in said] == ["train: there is only one image"]
    assert torch.isfinite(method.predict(pictures(3)).image_score).all()


def test_pca_of_equal_images_compares_with_that_image():
    method = fit("pca", config=replace(tiny_config("pca"), standardise=False, calibrate=False))
    with pytest.warns(UserWarning, match="train: there is only one image"):
        method.fit(pictures(1), pictures(20, seed=1), seed=0, progress=False)
    reconstruction = method.predict(pictures(2, seed=2)).reconstruction
    assert torch.equal(reconstruction, pictures(1).expand(2, -1, -1, -1))


def test_an_error_before_the_first_state_leaves_no_folder(tmp_path, monkeypatch):
    """Flat images of different brightness are all zero once standardised, and so are the maps."""
    brightness = torch.arange(20)[:, None, None, None] / 32
    flat = brightness.expand(-1, 1, SIZE, SIZE).contiguous()
    said = pytest.warns(UserWarning, match="calibration: all 20 standardised images are equal; its")
    fault = r"^the anomaly maps of 16 images are all equal, .* calibrate=false$"
    with said, pytest.raises(ValueError, match=fault):
        fit_on("pca", pictures(12), flat, tmp_path / "state", calibrate=True)
    assert list(tmp_path.iterdir()) == []

    def offline(*_):
        raise FileNotFoundError("no network")

    monkeypatch.setattr(ImageNetFeatures, "load_weights", offline)
    for name in ("padim", "bank", "mdps"):
        with pytest.raises(FileNotFoundError):
            fit_on(name, pictures(12), pictures(20), tmp_path / "state", calibrate=False)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A machine without weights, textures and network."""

    def unreachable(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr(features, "urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("DIFFAD_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def printed_settings(message: str) -> dict[str, str]:
    """Return the settings that a message prints as options."""
    hint = message.split("take another network: ")[1]
    return dict(word.split("=", 1) for word in shlex.split(hint) if word != "--set")


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(METHODS[n].Config, "layers")])
def test_settings_printed_after_a_failed_download_work_as_printed(name, offline, tmp_path):
    config = replace(tiny_config(name), calibrate=False, layers=("layer1",))
    for field in filter(config.__dict__.__contains__, methods_base.NETWORK_FIELDS):
        downloading = replace(config, **{field: "resnet18"})
        with pytest.raises(
            FileNotFoundError, match=r"could not be downloaded \(.*no rou"
        ) as caught:
            fit(name, config=downloading, workdir=tmp_path / "state")
        assert not (tmp_path / "state").exists()
        mended = override(downloading, printed_settings(str(caught.value)))
        assert mended.layers == LITE0_LAYERS
        assert torch.isfinite(fit(name, config=mended).predict(pictures(2)).image_score).all()


@pytest.mark.parametrize(
    ("name", "networks"),
    [("padim", 1), ("glad", 1), ("mdps", 1), ("diffusionad", 0), ("anoddpm", 0)],
)
def test_paper_profiles_say_what_they_miss_and_which_settings_avoid_it(name, networks, offline):
    method = METHODS[name]
    config = method.Config.for_profile("paper", channels=3, image_size=64)
    missing = list(method.find_missing(config))
    textures = [message for message in missing if message.startswith("no texture images in ")]
    assert len(textures) == hasattr(config, "synthesis")
    settings = {}
    for message in missing:
        if message in textures:
            assert message.endswith(" --set synthesis.texture_root=")
            settings["synthesis.texture_root"] = ""
        else:
            assert "wide_resnet" in message
            settings |= printed_settings(message)
    assert len(missing) == len(textures) + networks
    mended = override(config, settings)
    assert list(method.find_missing(mended)) == []
    for layers in {getattr(mended, f, None) or LITE0_LAYERS for f in methods_base.LAYER_FIELDS}:
        ImageNetFeatures(features.LITE0, layers, 64)  # they are blocks of that network
    if missing:
        with pytest.raises(FileNotFoundError) as caught:
            method.check_files(config)
        assert str(caught.value).count("\n") == len(missing) - 1


# -------------------------------------------------------------------------------------- files


@each_method
def test_saved_model_predicts_exactly_the_same(name, saved):
    folder, method, x = saved(name), fitted(name), pictures(4, seed=2)
    loaded = METHODS[name].from_pretrained(folder)
    assert_same(loaded.predict(x), method.predict(x))
    assert loaded.config == method.config
    assert loaded.threshold_ == method.threshold_
    assert loaded.pixel_threshold_ == method.pixel_threshold_
    np.testing.assert_array_equal(loaded.calibration_scores_, method.calibration_scores_)
    assert loaded.reports_ == method.reports_
    assert not loaded.network.training
    found = load_pretrained(str(folder))
    assert type(found) is METHODS[name]
    assert_same(found.predict(x), method.predict(x))


@each_method
def test_half_precision_changes_predictions_little(name, saved):
    folder, x = saved(name, dtype=torch.float16), pictures(4, seed=2)
    loaded, method = METHODS[name].from_pretrained(folder), fitted(name)
    assert loaded.threshold_ == method.threshold_
    assert loaded.pixel_threshold_ == method.pixel_threshold_
    # A Mahalanobis distance multiplies rounding by the inverse of small variances.
    tolerance = 5e-2 if name in ("padim", "bank") else 1e-2
    if name == "bernoulli":  # rounding may turn a bit at one half, in one of the four images
        a, b = (made.predict(x).image_score for made in (loaded, method))
        assert torch.isclose(a, b, rtol=tolerance, atol=tolerance).sum() >= 3
        return
    assert_same(loaded.predict(x), method.predict(x), tolerance)
    weights = loaded.network.state_dict().values()
    assert all(v.dtype == torch.float32 for v in weights if v.is_floating_point())


def test_half_precision_halves_the_file(saved):
    full = (saved("anoddpm") / "model.safetensors").stat().st_size
    half = (saved("anoddpm", dtype=torch.float16) / "model.safetensors").stat().st_size
    assert half < 0.55 * full


@each_kind
def test_checkpoint_is_two_files_and_replaces_an_older_one(name, saved):
    folder = saved(name, fingerprint="abc", scores=[1, 2])
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == [name]
    values = json.loads((folder / "config.json").read_text())
    assert values["method"] == name
    assert values["fingerprint"] == "abc"
    assert values["config"]["image_size"] == SIZE
    (folder / "stray").touch()
    saved(name)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert "fingerprint" not in json.loads((folder / "config.json").read_text())


def test_failed_save_leaves_the_older_checkpoint(saved, monkeypatch):
    folder = saved("mean_image")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        fitted("mean_image").save_pretrained(folder, record=object())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["mean_image"]


@each_kind
def test_untrained_model_can_be_saved_and_has_no_threshold(name, tmp_path):
    KINDS[name](tiny_config(name)).save_pretrained(tmp_path / "m")
    loaded = KINDS[name].from_pretrained(tmp_path / "m")
    assert loaded.threshold_ is None
    assert loaded.map_calibration_ is None


@each_kind
def test_an_older_checkpoint_has_no_pixel_threshold(name, saved):
    path = saved(name) / "model.safetensors"
    tensors = load_file(path)
    del tensors["pixel_threshold"]
    save_file(tensors, path)
    loaded = KINDS[name].from_pretrained(path.parent)
    assert loaded.pixel_threshold_ is None
    assert loaded.threshold_ == fitted(name).threshold_


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (torch.tensor([torch.nan]), "values in 'pixel_threshold' that are not finite"),
        (torch.zeros(2), r"pixel thresholds \(2,\), not \(1,\); delete"),
        (torch.zeros(()), r"pixel thresholds \(\), not \(1,\); delete"),
    ],
    ids=str,
)
@each_kind
def test_an_impossible_pixel_threshold_is_refused(name, saved, value, fault):
    path = saved(name) / "model.safetensors"
    save_file(load_file(path) | {"pixel_threshold": value}, path)
    with pytest.raises(ValueError, match=fault):
        KINDS[name].from_pretrained(path.parent)


@each_kind
def test_checkpoint_of_another_method_is_refused(name, saved):
    other = next(n for n in NAMES if n != name)
    folder = saved(other)
    with pytest.raises(ValueError, match=f"is a checkpoint of '{other}', not of '{name}'"):
        KINDS[name].from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@each_kind
def test_truncated_weights_are_refused_by_name(name, saved, share):
    path = saved(name) / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"model\.safetensors is broken or truncated"):
        KINDS[name].from_pretrained(path.parent)


def test_incomplete_folders_are_refused_by_name(saved):
    folder = saved("mean_image")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*model\.safetensors"):
        load_pretrained(folder)
    (folder / "config.json").write_text('{"method": ')
    with pytest.raises(ValueError, match=r"config\.json is not a readable checkpoint's config"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint's config\.json at .*mean_image"):
        load_pretrained(folder)


def test_weights_that_do_not_fit_their_configuration_are_refused(saved):
    folder = saved("anoddpm")
    values = json.loads((folder / "config.json").read_text())
    values["config"]["denoiser"]["base_channels"] = 8
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"anoddpm\S* does not fit its configuration: "):
        load_pretrained(folder)


def test_checkpoint_of_a_method_that_does_not_exist_is_refused(saved):
    folder = saved("pca")
    text = (folder / "config.json").read_text().replace('"pca"', '"pcaa"')
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="unknown method 'pcaa'; did you mean 'pca'"):
        load_pretrained(folder)


@pytest.mark.parametrize("changes", [{"quantile": 0.5}, {"smooth_sigma": 2.0}], ids=str)
@each_kind
def test_changed_inference_fields_drop_the_threshold_until_calibration(name, saved, changes):
    method = KINDS[name].from_pretrained(saved(name)).with_settings(**changes)
    assert method.threshold_ is None
    assert method.pixel_threshold_ is None
    assert method.calibration_scores_ is None
    assert method.map_calibration_ is None
    assert replace(fitted(name).config, **changes) == method.config
    method.calibrate(pictures(20, seed=1))
    assert method.threshold_ == conformal_threshold(
        method.calibration_scores_, method.config.quantile
    )
    if "quantile" in changes:
        np.testing.assert_allclose(
            method.calibration_scores_, fitted(name).calibration_scores_, atol=1e-6
        )
        assert method.threshold_ < fitted(name).threshold_


@each_method
def test_other_settings_share_weights_and_nothing_else(name, saved):
    x, method = pictures(3, seed=4), fitted(name)
    before = {k: v.clone() for k, v in method.network.state_dict().items()}
    other = method.with_settings(smooth_sigma=2.0)
    assert other.threshold_ is None and other.map_calibration_ is None
    assert other.config == replace(method.config, smooth_sigma=2.0)
    loaded = METHODS[name].from_pretrained(saved(name)).with_settings(smooth_sigma=2.0)
    assert_same(other.predict(x), loaded.predict(x))
    for one, same in zip(method.network.parameters(), other.network.parameters(), strict=True):
        assert one.data_ptr() == same.data_ptr()
        assert one.requires_grad == same.requires_grad
    for one, own in zip(method.network.buffers(), other.network.buffers(), strict=True):
        assert one.data_ptr() != own.data_ptr() or not one.numel()
    other.calibrate(pictures(20, seed=9))
    for key, value in method.network.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_settings_that_would_need_training_or_do_not_exist():
    method = fitted("anoddpm")
    with pytest.raises(ValueError, match=r"^denoiser cannot be changed on a trained model"):
        method.with_settings(denoiser=None)
    with pytest.raises(ValueError, match=r"unknown setting 'n_noise'; did you mean 'n_noises'\?"):
        method.with_settings(n_noise=2)
    for value in (0, 2.5, "2", True):
        with pytest.raises(ValueError, match="n_noises"):
            method.with_settings(n_noises=value)
    with pytest.raises(ValueError, match="calibrate must be a valid boolean, got 'no'"):
        method.with_settings(calibrate="no")


@each_kind
def test_other_settings_stay_on_the_device_of_the_method(name):
    method = KINDS[name](tiny_config(name))
    method.network.to("meta")  # as a GPU
    network = method.with_settings(smooth_sigma=2.0).network
    assert {v.device.type for v in [*network.parameters(), *network.buffers()]} <= {"meta"}


@each_kind
def test_too_few_images_change_no_calibration(name):
    method = fitted(name)
    before = method.threshold_, method.map_calibration_
    with pytest.raises(ValueError, match="calibration: 4 images are too few for map statistics, 5"):
        method.calibrate(pictures(4))
    assert (method.threshold_, method.map_calibration_) == before


@each_kind
def test_loaded_tensors_are_on_the_device_that_images_are_moved_to(name, saved, monkeypatch):
    folder = saved(name)
    monkeypatch.setattr(checkpoints.processes, "device", lambda: torch.device("meta"))  # as a GPU
    method = KINDS[name].from_pretrained(folder)
    if {v.device.type for v in method.network.state_dict().values()} != {"meta"}:
        pytest.fail("the tensors are not where they should be")
    assert method.device.type == "meta"


# --------------------------------------------------------------------------------------- blur


def test_blur_keeps_the_mean_and_spreads_a_point():
    maps = torch.zeros(2, 21, 21)
    maps[0, 10, 10] = 1
    blurred = blur(maps, 1.5)
    assert blurred.shape == maps.shape
    assert blurred[0].sum().item() == pytest.approx(1, abs=1e-5)
    assert blurred[0, 10, 10] == blurred[0].max() < 0.1
    assert not blurred[1].any()
    torch.testing.assert_close(blurred[0], blurred[0].T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 40)], ids=str)
def test_blur_takes_maps_smaller_than_its_kernel(size):
    constant = torch.full((1, *size), 0.7)
    torch.testing.assert_close(blur(constant, 4.0), constant, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["anoddpm", "bernoulli"])
def test_prediction_keeps_no_state_but_the_last(name):
    """More steps take no more memory."""
    peaks = []
    for steps in (5, 40):
        config = get_method(name).Config.for_profile("ci", channels=1, image_size=32)
        method = get_method(name)(replace(config, noise_level=99, steps=steps))
        method.network.eval()
        with TensorsAlive() as alive:
            method.predict(torch.zeros(4, 1, 32, 32))
        peaks.append(alive.peak)
    assert peaks[1] < 1.05 * peaks[0]


def test_indices_are_stored_as_they_are(tmp_path):
    method = get_method("padim")(get_method("padim").Config(image_size=32, input_size=32, grid=2))
    picked = method.network["statistics"].picked
    picked += 4001  # beyond what float16 can count
    method.save_pretrained(tmp_path / "stored", dtype=torch.float16)
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    assert torch.equal(stored["network.statistics.picked"], picked)
    assert stored["network.statistics.mean"].dtype == torch.float16


def test_exact_leaves_other_settings_alone():
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, deterministic=True, benchmark=True, allow_tf32=True):
        with exact():
            assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == (False, True, True)
        assert cudnn.allow_tf32


# ------------------------------------------------------------- what goes wrong while saving


def test_an_interrupt_between_old_and_new_keeps_a_checkpoint(saved, monkeypatch):
    folder, usual = saved("pca"), Path.replace

    def replace_until_new(path, target):
        if Path(target) == folder and path.suffix != ".old":
            assert not folder.exists()
            raise KeyboardInterrupt
        return usual(path, target)

    monkeypatch.setattr(Path, "replace", replace_until_new)
    with pytest.raises(KeyboardInterrupt):
        fitted("pca").save_pretrained(folder)
    x = pictures(3, seed=4)
    assert_same(METHODS["pca"].from_pretrained(folder).predict(x), fitted("pca").predict(x))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_checkpoint_loads_with_its_schedule(schedule, tmp_path):
    config = tiny_config("anoddpm")
    config = replace(config, denoiser=replace(config.denoiser, beta_schedule=schedule))
    method = fit("anoddpm", config=config)
    method.save_pretrained(tmp_path / "saved")
    x = pictures(3, seed=4)
    assert_same(load_pretrained(tmp_path / "saved").predict(x), method.predict(x))
