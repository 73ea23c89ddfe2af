"""Performance: from a record to tables, the error of a broken record, and what is measured."""

import copy
import json
from pathlib import Path

import pytest
import torch
from performance_tables import performance_tables, read_performance, rendered_tables
from trainings import N_IMAGES, offline_config

from diffad_lite.evaluation.tables import replace_tables
from diffad_lite.methods.denoiser import Denoiser

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
SIDE = {"parameters": 2_700_000, "step": [0.2, 0.1], "images": [5.0, 10.0], "mb": 100.0}
COST = {"parameters": 2_000_000, "steps": 1000, "batch": 16, "flops": 36e12, "gb": 1.5}
RECORD = {
    "diffusers": {
        name: {"ours": SIDE, "theirs": SIDE | {"step": [0.4, 0.3], "mb": 250.0}}
        for name in ("as used", "same stem", "no stem")
    },
    "metrics": {"seconds": 2.5, "aupimo": 0.8, "mb": 400.0, "maps": 1000, "size": 256},
    "start": {
        "import torch": 2.0,
        "import diffad_lite": 0.01,
        "import diffad_lite.experiments": 1.5,
        "diffad --help": 0.1,
    },
    "scale": {
        "size": {"32": 0.05, "64": 0.1},
        "batch": {"4": 0.03},
        "images": {"64": 0.1},
        "noises": {"1": 8.0},
    },
    "predicted": {
        "64": {"flops": 1e10, "seconds": 0.1, "gb": 0.2, "measured_gb": 0.25},
        "128": {"flops": 4e10, "seconds": 0.5, "gb": 0.7, "measured_gb": 0.8},
    },
    "paper": {"glad": {"diffusion": COST, "anomaly_oriented": COST | {"steps": 10}}},
    "latency": {"median_ms": 50.0, "presses": 30},
}


def test_ratios_are_those_of_each_round_and_say_who_is_better():
    table = performance_tables(RECORD)["performance-diffusers"]
    assert table.count("\n") == 1 + 3
    assert "| 150 / 350 | 2.50 [2.00, 3.00] |" in table  # ours is faster
    assert "| 100 / 250 | 2.50 |" in table  # and smaller


def test_times_of_the_paper_profiles_follow_from_operations():
    tables = performance_tables(RECORD)
    assert "| 128 | 40 | 0.400 | 0.500 | 0.70 | 0.80 |" in tables["performance-predicted"]
    hours = 1000 * 36e12 / (4e10 / 0.5) / 3600  # at the rate of the largest side
    row = "| GLAD | diffusion | 2.0 M | 1,000 x 16 | 36.00 | 1.5 |"
    assert f"{row} {hours:,.0f} | 0.1 |" in tables["performance-paper"]
    assert "| GLAD | anomaly oriented |" in tables["performance-paper"]


def test_topics_that_were_not_measured_have_no_table():
    assert performance_tables({}) == {}
    assert list(performance_tables({"scale": RECORD["scale"]})) == ["performance-scale"]
    without = {k: v for k, v in RECORD.items() if k != "latency"}
    assert "slider" in performance_tables(RECORD)["performance-start"]
    assert "slider" not in performance_tables(without)["performance-start"]


def test_a_broken_record_is_named(tmp_path):
    assert read_performance(tmp_path) == {}
    (tmp_path / "performance.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="is no record of performance; run 'make bench' again"):
        read_performance(tmp_path)
    broken = copy.deepcopy(RECORD)
    del broken["diffusers"]["same stem"]["ours"]["mb"]
    with pytest.raises(ValueError, match=r"performance\.json, diffusers: KeyError: 'mb'"):
        performance_tables(broken)


def test_rendering_the_page_changes_nothing():
    assert replace_tables(PAGE, rendered_tables()) == PAGE.read_text(), (
        "run 'make tables' and commit"
    )


def test_the_predicted_costs_are_those_of_todays_paper_profiles():
    """Steps, batch and weights; ``make bench TOPICS=paper`` brings the record up to date."""
    costs = json.loads((PAGE.parents[1] / "data" / "results" / "performance.json").read_text())
    for name, stages in costs["paper"].items():
        config = offline_config(name, "paper", 256)
        trainings = {
            "diffusion": getattr(getattr(config, "denoiser", None), "train", None),
            "autoencoder": getattr(config, "train_autoencoder", None),
            **dict.fromkeys(("joint", "anomaly_oriented", "flips"), getattr(config, "train", None)),
        }
        for stage in stages.keys() & trainings.keys():
            cost, train = stages[stage], trainings[stage]
            assert (cost["steps"], cost["batch"]) == (train.total_steps(N_IMAGES), train.batch_size)
        if "diffusion" in stages:
            with torch.device("meta"):
                network = Denoiser(config.denoiser, config.channels).network
            assert stages["diffusion"]["parameters"] == sum(p.numel() for p in network.parameters())


@pytest.fixture
def bench():
    """The measurements behind ``make bench``."""
    pytest.importorskip("diffusers")
    import measures

    return measures


def test_both_networks_have_about_as_many_weights(bench):
    for ours, theirs in bench.PAIRS.values():
        networks = bench.twin.our_network(ours), bench.twin.Unshuffled(theirs, 64)
        a, b = (sum(p.numel() for p in network.parameters()) for network in networks)
        assert abs(a / b - 1) < 0.05


def test_stages_are_counted_and_none_is_trained(bench):
    stages = bench.stages("grad", "lite", 64)
    assert {"warmup", "detector"} < stages.keys()
    assert stages["detector"]["steps"] == 2 * stages["warmup"]["steps"]
    double = bench.count_step(
        torch.nn.Conv2d(1, 1, 3, bias=False),
        lambda network, x, generator: network(x).square().mean(),
        torch.zeros(4, 1, 10, 10),
        bench.TrainConfig(steps=1, batch_size=4),
    )
    forward = 2 * 9 * 8 * 8 * 4
    assert double["flops"] == 2 * forward  # and backward to the weights alone
