"""The run on a GPU: cost model, fields, resuming, limits, tables; here with tiny networks."""

import copy
import json
import sys
import time
from functools import partial

import gpu
import gpu_measures
import pytest
import torch
from gpu import Measurement, measure, open_record
from gpu_measures import LARGER_BATCH, PAPER_SIZE, inference, precision, quality, training
from gpu_tables import NO_RECORD, draw_costs, gpu_tables, read_gpu
from trainings import PUBLISHED, offline_config

from diffad_lite.data.datasets import load_dataset
from diffad_lite.experiments.run import Run
from diffad_lite.training import loop
from diffad_lite.training.state import TrainConfig

MACHINE = {"device": "cpu", "commit": "abc", "versions": {"torch": "2"}, "threads": 1}
LAUNCHED = {"kind": "launch", "steps": 2, "largest_difference": 0.0}
STAGES = {"autoencoder", "flips"}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record of a few measurements, and its file."""
    path = tmp_path_factory.mktemp("gpu") / "smoke.json"
    record = open_record(path, True, MACHINE)
    parts = [
        Measurement("train bernoulli", partial(training, name="bernoulli", smoke=True), 60),
        Measurement("train grad", partial(training, name="grad", smoke=True), 60),
        Measurement("predict glad", partial(inference, name="glad", smoke=True), 60),
        Measurement("quality pca", partial(quality, run=Run("pca", "shapes", image_size=16)), 60),
        Measurement("launch", lambda result: result.update(LAUNCHED), 60),
    ]
    assert measure(record, path, parts, 4), record
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------- cost model


def test_hours_are_steps_times_seconds():
    config = TrainConfig(steps=300_000, batch_size=1)
    assert gpu_measures.training_hours(0.06, config, 1) == pytest.approx(5.0)  # 18,000 s
    # With 16 images per step, as many images take 18,750 steps.
    assert gpu_measures.training_hours(0.48, config, 16) == pytest.approx(2.5)  # 9,000 s


def test_epochs_become_steps_of_whole_batches():
    config = TrainConfig(epochs=3000, steps=None, batch_size=16)
    # The 167 training images of bottle are 10 batches: 30,000 steps.
    assert gpu_measures.training_hours(0.6, config, 16) == pytest.approx(5.0)


def test_times_are_summed_up_by_their_median():
    assert gpu_measures.spread([3.0, 1.0, 9.0]) == {
        "seconds": 3.0,
        "seconds_range": [1.0, 9.0],
        "n_times": 3,
    }


# ----------------------------------------------------------------------------- measurements


def test_each_stage_is_trained_and_timed(record):
    result = record["measurements"]["train bernoulli"]
    assert result["kind"] == "training"
    assert (result["variant"], result["larger_batch"]) == ("bf16", False)
    assert result["autocast"] in ("bfloat16", "none")
    assert result["stages"].keys() == STAGES
    profile = offline_config("bernoulli", "paper", PAPER_SIZE)
    for stage, full in (("autoencoder", profile.train_autoencoder), ("flips", profile.train)):
        cost = result["stages"][stage]
        assert cost["batch"] == 2
        assert cost["n_times"] == 2
        assert cost["parameters"] > 0
        assert cost["peak_gib"] is None  # no GPU
        assert 0 < cost["seconds_range"][0] <= cost["seconds"] <= cost["seconds_range"][1]
        assert full.batch_size > 2  # of which the smoke test leaves two
        assert cost["hours"] == pytest.approx(cost["profile_steps"] * cost["seconds"] / 3600)


def test_the_pool_of_grad_is_scaled_to_the_profile(record):
    pool = record["measurements"]["train grad"]["pool"]
    assert pool["images"] == offline_config("grad", "paper", PAPER_SIZE).n_patterns
    assert pool["hours"] == pytest.approx(pool["images"] * pool["seconds_per_image"] / 3600)


def test_scoring_counts_network_evaluations(record):
    result = record["measurements"]["predict glad"]
    assert result["kind"] == "inference"
    assert result["network_evaluations"] > 1
    assert result["seconds"] > 0


def test_quality_is_that_of_a_run(record):
    result = record["measurements"]["quality pca"]
    low, high = result["image_auroc_ci"]
    assert 0 <= low <= result["image_auroc"] <= high <= 1
    assert result["dataset"] == "shapes"
    assert result["n_test"] == len(load_dataset("shapes", image_size=16).test_images)


def test_only_a_batch_of_one_is_enlarged():
    assert set(gpu.BATCH_OF_ONE) <= set(PUBLISHED)
    for name in gpu.BATCH_OF_ONE:
        result = {}
        training(result, name, smoke=True, larger=True)
        assert result["stages"]["diffusion"]["batch"] == LARGER_BATCH
        assert len(result["stages"]) == 1


def test_out_of_memory_is_a_result_and_the_next_stage_is_measured(monkeypatch):
    def train_network(network, *arguments, stage, **options):
        if stage == "autoencoder":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loop.train_network(network, *arguments, stage=stage, **options)

    monkeypatch.setattr(gpu_measures, "train_network", train_network)
    result = {}
    training(result, "bernoulli", smoke=True)
    assert result["stages"]["autoencoder"]["out_of_memory"]
    assert "hours" not in result["stages"]["autoencoder"]
    assert result["stages"]["flips"]["hours"] > 0


def test_steps_before_a_time_limit_count(monkeypatch):
    def stopped(network, loss, images, config, **options):
        three = gpu_measures.replace(config, steps=3)
        loop.train_network(network, loss, images, three, **options)
        raise gpu.TimeIsUp("stopped after 1 s")

    monkeypatch.setattr(gpu_measures, "train_network", stopped)
    result = {}
    with pytest.raises(gpu.TimeIsUp):
        training(result, "bernoulli", smoke=True)
    assert result["stages"].keys() == {"autoencoder"}
    assert result["stages"]["autoencoder"]["n_times"] == 2


def test_float32_is_with_or_without_tf32_and_all_is_as_before():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before, supports = [s.allow_tf32 for s in switches], loop.supports_bf16
    for name, allowed in (("tf32", True), ("float32", False)):
        with precision(name):
            assert [s.allow_tf32 for s in switches] == [allowed, allowed]
            assert not loop.supports_bf16(torch.device("cpu"))
    with precision("bf16"):
        assert loop.supports_bf16 is supports
    assert [s.allow_tf32 for s in switches] == before
    assert loop.supports_bf16 is supports


# --------------------------------------------------------------------- resuming and limits


def refuse(result):
    raise AssertionError("measured again")


def test_a_second_call_does_nothing(record, tmp_path):
    path = tmp_path / "smoke.json"
    path.write_text(json.dumps(record))
    again = open_record(path, True, MACHINE)
    names = list(record["measurements"])
    assert measure(again, path, [Measurement(name, refuse, 1) for name in names], 1)
    assert again == record
    assert json.loads(path.read_text()) == record


@pytest.mark.parametrize("change", [{"device": "NVIDIA H200"}, {"commit": "abd"}])
def test_another_machine_or_commit_starts_anew(record, tmp_path, change, capsys):
    path = tmp_path / "smoke.json"
    path.write_text(json.dumps(record))
    assert open_record(path, True, MACHINE | change)["measurements"] == {}
    assert "of another machine or commit" in capsys.readouterr().out


def test_a_measurement_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path):
    path, record = tmp_path / "smoke.json", open_record(tmp_path / "none", True, MACHINE)

    def slow(result):
        result["part"] = 1
        time.sleep(60)

    def full(result):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def quick(result):
        result["value"] = 2

    parts = [("slow", slow), ("wrong", refuse), ("full", full), ("quick", quick)]
    started = time.monotonic()
    assert not measure(
        record, path, [Measurement(*part, 1.1 / gpu.SMOKE_PATIENCE) for part in parts], 1
    )
    assert time.monotonic() - started < 30
    results = json.loads(path.read_text())["measurements"]
    assert results["slow"]["part"] == 1
    assert results["slow"]["error"] == "TimeIsUp: stopped after 1 s"
    assert results["wrong"]["error"] == "AssertionError: measured again"
    assert results["full"]["out_of_memory"]
    assert results["quick"]["value"] == 2
    # The next call tries the first two again, and nothing else.
    parts = [("slow", quick), ("wrong", quick), ("full", refuse), ("quick", refuse)]
    assert measure(record, path, [Measurement(*part, 9) for part in parts], 1)


def test_nothing_begins_after_the_time_is_up(tmp_path):
    record = open_record(tmp_path / "none", True, MACHINE)
    assert not measure(record, tmp_path / "smoke.json", [Measurement("late", refuse, 9)], 0.01)
    assert record["measurements"] == {}


def test_all_limits_fit_into_eight_minutes():
    for smoke in (True, False):
        measurements = gpu.plan(smoke, None)
        assert sum(m.limit for m in measurements) <= 60 * gpu.MINUTES
        names = [m.name for m in measurements]
        assert names[:6] == [f"train {name}" for name in PUBLISHED]
        assert len(set(names)) == len(names)


def test_the_command_says_that_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    parts = [Measurement("train grad", partial(training, name="grad", smoke=True), 60)]
    monkeypatch.setattr(gpu, "plan", lambda smoke, root: parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), "--commit", "abc"])
    assert gpu.main() == 0
    assert capsys.readouterr().out.startswith("No GPU: a smoke test with tiny networks")
    record = json.loads((tmp_path / "smoke.json").read_text())
    assert record["smoke"] is True
    assert gpu.TINY in record["notes"]
    assert record["machine"]["commit"] == "abc"
    assert {"device", "cores", "bf16", "cuda", "versions"} <= record["machine"].keys()
    assert {p.name for p in tmp_path.iterdir()} == {"smoke.json", "smoke.png"}


def test_exported_images_are_split_as_always(tmp_path, monkeypatch):
    shapes = load_dataset("shapes", image_size=16).subset(8)
    monkeypatch.setattr(gpu, "load_dataset", lambda *names, image_size: shapes)
    gpu.export_cells(tmp_path)
    data = Run("pca", "folder", root=str(tmp_path), image_size=16).load_data()
    assert torch.allclose(data.train, shapes.train, atol=1 / 127)
    assert len(data.calibration) == len(shapes.calibration)
    assert sorted(data.test_labels.tolist()) == sorted(shapes.test_labels.tolist())


# ------------------------------------------------------------------------ tables and figure


def published(record):
    """As if a GPU had made the record."""
    made = copy.deepcopy(record) | {"smoke": False}
    for result in made["measurements"].values():
        for cost in [result, *result.get("stages", {}).values()]:
            if "peak_gib" in cost:
                cost["peak_gib"] = 12.34
    return made


def test_the_page_names_the_machine_and_every_stage(record):
    made = published(record)
    made["measurements"]["train bernoulli"]["stages"]["flips"] |= {"seconds": 0.5, "hours": 30.56}
    made["measurements"]["train grad"]["stages"]["warmup"] = {
        "batch": 24,
        "profile_steps": 6666,
        "out_of_memory": True,
    }
    text = gpu_tables(made)
    assert text.startswith("cpu, PyTorch 2, commit abc; images of 32 pixels a side")
    assert "ImageNet networks have random weights" in text
    assert "| masked Bernoulli | flips | bf16 | 2 | 220,000 | 0.500 | 12.3 | 30.6 |" in text
    assert "| GRAD-style | warmup | bf16 | 24 | 6,666 | out of memory | - | - |" in text
    assert "| GLAD |" in text
    assert "PCA" in text and "image AUROC" in text
    assert "the losses differ by at most 0." in text


def test_without_a_record_the_page_says_how_to_make_one(tmp_path, record):
    assert read_gpu(tmp_path) is None
    assert gpu_tables(None) == NO_RECORD
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"is no record of a GPU; take the gpu\.json"):
        read_gpu(tmp_path)
    (tmp_path / "gpu.json").write_text(json.dumps(published(record)))
    assert read_gpu(tmp_path) == published(record)


def test_a_broken_record_is_named(record):
    made = published(record)
    del made["measurements"]["train bernoulli"]["stages"]["flips"]["hours"]
    with pytest.raises(ValueError, match=r"gpu\.json: KeyError: 'hours'; call 'make gpu' again"):
        gpu_tables(made)


def test_the_figure_shows_each_stage_and_what_did_not_fit(record):
    made = published(record)
    made["measurements"]["train bernoulli"]["stages"]["flips"] = {"out_of_memory": True}
    fig, drawn = draw_costs(made)
    assert drawn["labels"][:2] == ["masked Bernoulli, autoencoder", "masked Bernoulli, flips"]
    assert [text.get_text() for text in fig.axes[0].texts] == ["bf16: out of memory"]
    assert [ax.get_xscale() for ax in fig.axes] == ["log", "log"]
    assert "Smoke test" in draw_costs(record)[0].get_suptitle()
    assert "Smoke test" not in fig.get_suptitle()
