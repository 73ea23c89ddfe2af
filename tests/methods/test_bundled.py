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
