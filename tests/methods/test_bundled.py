"""Bundled weights still score as they did when they were stored."""

import json
from functools import cache

import pytest
import torch

from diffad_lite.core.files import data_dir
from diffad_lite.data.datasets import load_dataset
from diffad_lite.methods.base import load_pretrained

FOLDER = data_dir() / "checkpoints"
INDEX = json.loads((FOLDER / "index.json").read_text())


@cache
def cells():
    """Test images of the solar cells by name."""
    data = load_dataset("elpv", "mono")
    return dict(zip(data.test_ids, data.test_images, strict=True))


@pytest.mark.parametrize("name", INDEX)
def test_bundled_weights_reproduce_their_scores(name):
    stored = INDEX[name]["scores"]
    assert len(stored) == 16
    assert len({key.split("/")[0] for key in stored}) == 2  # normal and defective
    batch = [cells()[key] for key in stored]
    scores = load_pretrained(FOLDER / name).predict(torch.stack(batch)).image_score
    assert scores.tolist() == pytest.approx(list(stored.values()), rel=1e-3, abs=1e-4)


@pytest.mark.slow  # minutes: each of 118 images is scored twice
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["elpv-mono-glad", "elpv-mono-mdps"])
def test_calibrating_bundled_weights_again_leaves_their_scores(name):
    """Statistics behind maps are those of all images; only the threshold's are of other folds."""
    method, stored = load_pretrained(FOLDER / name), INDEX[name]["scores"]
    images = torch.stack([cells()[key] for key in list(stored)[:4]])
    before = method.predict(images).image_score
    method.network["statistics"].pixel_scale.fill_(1.0)
    method.calibrate(load_dataset("elpv", "mono").calibration)
    torch.testing.assert_close(method.predict(images).image_score, before, rtol=1e-3, atol=1e-4)
