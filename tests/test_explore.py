"""Sliders swap pictures drawn beforehand; without a front end the same call prints one."""

import ipywidgets
import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")

from diffad_lite import explore as module
from diffad_lite import plots
from diffad_lite.datasets import load_dataset
from diffad_lite.explore import explore, render_png
from diffad_lite.gaussian import GaussianDiffusion, randn
from diffad_lite.schedules import NoiseSchedule

PNG = b"\x89PNG"


@pytest.fixture
def shown(monkeypatch):
    displayed = []
    monkeypatch.setattr(module, "display", displayed.append)
    return displayed


@pytest.fixture
def calls():
    return []


@pytest.fixture
def render(calls):
    def draw(level: int, gain: float = 1.0) -> plots.Result:
        calls.append((level, gain))
        return plots.show_curves([0, 1], {"c": [level, gain]}, xlabel="x", ylabel="y")

    return draw


def test_without_a_front_end_the_middle_is_printed(render, calls, shown):
    explore(render, level=[1, 2, 3], gain=[0.5, 1.5])
    assert calls == [(2, 1.5)]
    assert shown[0].data.startswith(PNG)


def test_without_a_front_end_the_chosen_settings_are_printed(render, calls, shown):
    explore(render, static=[{"level": 1}, {"level": 3}], level=[1, 2, 3])
    assert calls == [(1, 1.0), (3, 1.0)]
    assert len(shown) == 2


def test_a_live_slider_swaps_pictures_and_draws_nothing(render, calls, shown, monkeypatch):
    monkeypatch.setattr(module, "is_live", lambda: True)
    explore(render, level=[1, 2, 3])
    (box,) = shown
    slider, picture = box.children
    assert isinstance(slider, ipywidgets.SelectionSlider)
    assert len(calls) == 3, "all frames are drawn beforehand"
    before = bytes(picture.value)
    slider.value = 3
    assert bytes(picture.value) != before
    assert bytes(picture.value).startswith(PNG)
    assert len(calls) == 3, "moving the slider drew a frame"


def test_unattended_runs_are_not_live(monkeypatch):
    monkeypatch.setenv("DIFFAD_STATIC", "1")
    assert not module.is_live()
    monkeypatch.delenv("DIFFAD_STATIC")
    monkeypatch.delenv("CI", raising=False)
    assert not module.is_live(), "there is no kernel here"


def test_too_many_frames_and_empty_controls_are_refused(render):
    with pytest.raises(ValueError, match="combinations are too many"):
        explore(render, level=range(100), gain=range(100))
    with pytest.raises(ValueError, match="at least one control"):
        explore(render)
    with pytest.raises(ValueError, match="at least one value"):
        explore(render, level=[])


def drawn(result: plots.Result) -> dict:
    figure, data = result
    assert render_png(figure).startswith(PNG)
    return data


def test_every_figure_draws_and_returns_its_numbers():
    images = torch.rand(5, 3, 12, 10) * 2 - 1
    maps = torch.rand(5, 12, 10)
    assert drawn(plots.show_images(images, list("abcde"), columns=3))["images"] is images
    masks = [None, np.zeros((24, 20), bool), np.eye(24, 20, dtype=bool), None, None]
    data = drawn(plots.show_detections(images, maps, reconstructions=images, masks=masks))
    assert data["scale"] == (float(maps.min()), float(maps.max()))
    drawn(plots.show_detections(images[:, :1], maps, scale=(0, 2), threshold=1.0))
    diffusion = GaussianDiffusion(NoiseSchedule.named("linear", 50))
    x_t = randn(images, torch.Generator().manual_seed(0))
    steps = list(diffusion.ddim_sample(lambda x, t: x, x_t, diffusion.schedule.timesteps(49, 10)))
    assert drawn(plots.show_trajectory(steps, count=4))["t"][-1] == -1
    labels, scores = [0, 0, 1, 1], [0.1, 0.4, 0.3, 0.9]
    assert drawn(plots.show_scores(labels, scores, threshold=0.35))["image_auroc"] == 0.75
    bars = drawn(plots.show_bars({"a": 0.9}, {"a": (0.8, 0.95)}, xlabel="AUROC"))
    assert bars == {"a": (0.9, 0.8, 0.95)}
    sheet = drawn(plots.show_kinds(load_dataset("shapes", image_size=16), columns=4))
    assert len(sheet["ids"]["good"]) == 4
    assert len(sheet["ids"]["dent"]) == 2, "anomalous images stand twice"
