"""Sliders swap pictures drawn beforehand; without a front end the same call prints one."""

import io
import sys

import ipywidgets
import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch

matplotlib.use("Agg")

from diffad_lite import plots
from diffad_lite.data.datasets import load_dataset
from diffad_lite.data.planting import KINDS
from diffad_lite.diffusion.gaussian import GaussianDiffusion, randn
from diffad_lite.diffusion.schedules import NoiseSchedule
from diffad_lite.methods.base import get_method
from diffad_lite.notebook.explore import (
    PLACES,
    explore,
    explore_planting,
    in_units,
    plant_at,
    render_png,
    show_grid,
    show_planted,
)

module = sys.modules["diffad_lite.notebook.explore"]  # the room's name is the function

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


def test_live_sliders_choose_among_pictures_drawn_beforehand(render, calls, shown, monkeypatch):
    monkeypatch.setattr(module, "is_live", lambda: True)
    links = []
    monkeypatch.setattr(ipywidgets, "jslink", lambda *ends: links.append(ends))
    explore(render, level=[1, 2, 3], gain=[0.5, 1.5])
    (box,) = shown
    level, gain, stack = box.children
    assert isinstance(level, ipywidgets.SelectionSlider)
    assert len(calls) == 6, "all frames are drawn beforehand"
    pictures = [bytes(picture.value) for inner in stack.children for picture in inner.children]
    assert len(set(pictures)) == 6
    assert all(picture.startswith(PNG) for picture in pictures)
    # The browser's own links; nothing comes back to the kernel when a slider moves.
    assert ((level, "index"), (stack, "selected_index")) in links
    assert [((gain, "index"), (s, "selected_index")) for s in stack.children] == links[:3]
    assert (stack.selected_index, stack.children[0].selected_index) == (level.index, gain.index)
    level.value = 3
    assert len(calls) == 6, "moving the slider drew a frame"


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
    assert drawn(plots.show_trajectory(steps))["t"][-1] == -1
    labels, scores = [0, 0, 1, 1], [0.1, 0.4, 0.3, 0.9]
    assert drawn(plots.show_scores(labels, scores, threshold=0.35))["image_auroc"] == 0.75
    bars = drawn(plots.show_bars({"a": 0.9}, {"a": (0.8, 0.95)}, xlabel="AUROC"))
    assert bars == {"a": (0.9, 0.8, 0.95)}
    sheet = drawn(plots.show_kinds(load_dataset("shapes", image_size=16)))
    assert len(sheet["ids"]["good"]) == 8
    assert len(sheet["ids"]["dent"]) == 4, "anomalous images stand twice"


# --- grids, and a defect of one's own


def pixels(png):
    return np.asarray(PIL.Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_a_grid_shows_images_and_maps_on_one_scale():
    images, maps = torch.rand(2, 1, 32, 32) * 2 - 1, torch.full((2, 32, 32), 0.5)
    rows = [[images[i], maps[i]] for i in range(2)]
    masks = [None, np.eye(60, dtype=bool)]
    titles = [["a", "b"], ["c", "d"]]
    figure, data = show_grid(rows, titles, scale=(0, 1), threshold=0.7, masks=masks)
    assert data == {"scale": (0, 1), "grey": True}
    few, whole = (render_png(show_grid(rows, titles, masks=masks)[0], d) for d in (data, None))
    assert few.startswith(PNG)
    assert len(few) < len(whole)
    assert np.abs(pixels(few) - pixels(whole)).mean() < 2, "few colours change what is seen"
    white = pixels(whole) == 255
    assert (pixels(few)[white] == 255).all(), "the page is white"
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "b", "c", "d"]


def test_a_grid_of_colour_images_keeps_their_colours():
    _, data = show_grid([[torch.rand(3, 16, 16), torch.rand(16, 16)]], [["", ""]])
    assert not data["grey"]


@pytest.fixture
def cell():
    made = np.random.default_rng(0)
    return (120 + 20 * made.random((1, 64, 64))).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS["cells"])
def test_a_defect_lies_in_its_window_near_the_wanted_place(cell, kind):
    for place in PLACES.values():
        planted, mask = plant_at(cell, kind, place=place, size=0.4)
        rows, columns = np.nonzero(mask)
        assert np.array_equal(mask, (planted != cell).any(0))
        assert np.ptp(rows) <= 26, "0.4 of 64 pixels"
        assert np.ptp(columns) <= 26
        assert np.hypot(rows.mean() / 64 - place[0], columns.mean() / 64 - place[1]) < 0.25
    again, _ = plant_at(cell, kind, place=place, size=0.4)
    assert np.array_equal(planted, again), "the same arguments give the same defect"


def test_a_defect_grows_with_its_window(cell):
    areas = [plant_at(cell, "crack", place=(0.5, 0.5), size=s)[1].sum() for s in (0.4, 1.0)]
    assert areas[1] > 1.5 * areas[0]


def test_places_and_sizes_out_of_range_are_refused(cell):
    for wrong in ({"place": (0.5, 1.2), "size": 0.5}, {"place": (0.5, 0.5), "size": 0}):
        with pytest.raises(ValueError, match="must be fractions in"):
            plant_at(cell, "crack", **wrong)


@pytest.fixture
def fitted():
    """Two quick methods, fitted on made cells of 32 pixels."""
    made = torch.Generator().manual_seed(0)
    normal = torch.rand(40, 1, 32, 32, generator=made) * 0.2
    methods = {}
    for name in ("pca", "mean_image"):
        config = get_method(name).Config.for_profile("ci", channels=1, image_size=32)
        methods[name] = get_method(name)(config).fit(normal[:20], normal[20:], seed=0)
    return methods


def test_units_keep_decisions_and_order(fitted):
    method = fitted["pca"]
    scores = torch.from_numpy(method.calibration_scores_)
    units = in_units(scores, method)
    assert np.isclose(np.median(units), 0, atol=1e-5)
    assert torch.equal(units > 1, scores > method.threshold_)
    assert torch.equal(units.argsort(), scores.argsort())
    assert in_units(torch.tensor(method.threshold_), method) == 1


DEFECT = {"kind": "inactive", "place": (0.5, 0.5), "size": 0.7, "severity": 1.0}


def test_every_method_sees_the_defect_and_the_clean_image(fitted, cell):
    names = []
    figure, data = show_planted(cell, fitted, tick=names.append, **DEFECT)
    assert names == ["pca", "mean_image"]
    assert all(planted > clean for planted, clean in data["scores"].values())
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == "inactive"
    assert texts[3] == "without"
    assert texts[1] == f"pca {data['scores']['pca'][0]:.2f}"
    assert render_png(figure, data).startswith(PNG)


def test_without_a_front_end_planted_defects_are_printed(fitted, cell, shown):
    explore_planting({"cell 1": cell}, fitted, static=[{"severity": 0.5}, {"kind": "spot"}])
    assert len(shown) == 2
    assert all(image.data.startswith(PNG) for image in shown)
    explore_planting({"cell 1": cell}, fitted)
    assert len(shown) == 3, "the first choice"


def test_a_defect_is_planted_when_the_button_is_pressed(fitted, cell, shown, monkeypatch):
    monkeypatch.setattr(module, "is_live", lambda: True)
    explore_planting({"cell 1": cell}, fitted)
    (box,) = shown
    *choices, row, picture = box.children
    button, bar, note = row.children
    before = bytes(picture.value)
    assert before.startswith(PNG)
    next(c for c in choices if c.description == "kind").value = "inactive"
    assert bytes(picture.value) == before, "nothing is computed before the button is pressed"
    button.click()
    assert bytes(picture.value) != before
    assert (bar.value, bar.max, note.value) == (2, 2, "done")
    assert not button.disabled


def test_an_error_is_shown_and_the_button_can_be_pressed_again(fitted, cell, shown, monkeypatch):
    monkeypatch.setattr(module, "is_live", lambda: True)
    explore_planting({"cell 1": cell}, fitted)
    button, _, note = shown[0].children[-2].children
    monkeypatch.setattr(module, "show_planted", lambda *a, **k: 1 / 0)
    button.click()
    assert note.value == "ZeroDivisionError: division by zero"
    assert not button.disabled
