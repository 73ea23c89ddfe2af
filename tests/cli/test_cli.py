"""The command: bad input is one line and exit code 2; runs are recorded, resumed and skipped."""

import contextlib
import copy
import csv
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from diffad_lite.cli.main import main
from diffad_lite.evaluation import records
from diffad_lite.evaluation.metrics import verdict
from diffad_lite.evaluation.records import collect, read_results, select
from diffad_lite.evaluation.tables import render, tables
from diffad_lite.experiments.evaluate import evaluate, load_checkpoint
from diffad_lite.experiments.grid import find_missing, read_grid, scorings, sweep, trainings
from diffad_lite.experiments.run import Run, run_hash
from diffad_lite.methods import base
from diffad_lite.methods.base import Method
from diffad_lite.methods.baselines import PCAResidual
from diffad_lite.methods.checkpoints import read_record
from diffad_lite.training.loop import train_network

SMOKE = ("--profile", "ci", "--image-size", "32", "--quiet")
FIELDS = set(
    """method variant profile dataset category plant seed split_seed data_fingerprint config
    config_hash checkpoint image_size n_train n_calibration n_test image_auroc image_auroc_ci
    image_ap image_f1max_oracle f1_at_normal_threshold per_defect pixel_auroc pixel_ap aupro
    dice_oracle train_seconds train_steps ms_per_image network_evaluations_per_image n_parameters
    peak_memory_mb device threads dtype versions commit""".split()  # noqa: SIM905
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--method", "pcaa", "--out", "o"], "unknown method 'pcaa'; did you mean"),
        (["evaluate", "--method", "pca", "--dataset", "elvp", "--out", "o"], "did you mean 'elpv'"),
        (["evaluate", "--method", "pca", "--category", "nono", "--out", "o"], "mono, poly"),
        (
            ["evaluate", "--method", "pca", "--profile", "big", "--out", "o"],
            "'ci', 'lite' or 'paper'",
        ),
        (["evaluate", "--method", "pca", "--set", "smoth=1", "--out", "o"], "unknown field"),
        (["evaluate", "--method", "pca", "--set", "smooth", "--out", "o"], "KEY=VALUE"),
        (["evaluate", "--method", "pca", "--plant", "cell", "--out", "o"], "did you mean 'cells'"),
        (["evaluate", "--method", "pca", "--dataset", "folder", "--out", "o"], "--root DIR"),
        (["evaluate", "--method", "pca", "--checkpoint", "nowhere", "--out", "o"], "nowhere"),
        (["evaluate", "--method", "pca", "--dataset", "digits", "--out", "o"], "only one class"),
        (["datasets", "--dataset", "folder", "--root", "gone"], "gone does not exist"),
        (["sweep", "gone.yaml", "--out", "o"], "no grid at gone.yaml"),
        (
            ["report", "--results", "gone"],
            "gone has no records (no <grid>.jsonl in it and no result",
        ),
        (["notebooks", "--folder", "gone"], "no notebooks in gone"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir()), "something half-written was left behind"


def test_help_and_parsing_do_not_import_torch():
    code = (
        "import sys, diffad_lite.cli.main as c; c.build_parser(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_evaluate_writes_the_whole_record(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["evaluate", "--method", "anoddpm", "--dataset", "shapes", "--maps", *SMOKE]
    assert main([*arguments, "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert set(result) >= FIELDS
    assert result["train_steps"] == 20
    assert result["n_test"] == 32
    assert result["network_evaluations_per_image"] == 1
    assert 0 <= result["aupro"] <= 1
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert len(rows) == 32
    maps = list((out / "maps" / "disc" / "test").rglob("*.tiff"))
    assert len(maps) == 32
    with Image.open(maps[0]) as image:
        assert (image.size, image.mode) == ((64, 64), "F")  # the original size, float32
    assert (out / "figure.png").stat().st_size > 10_000
    assert "image AUROC" in capsys.readouterr().out
    # The same command again finds its checkpoint and scores the same.
    assert main([*arguments, "--out", str(out)]) == 0
    assert json.loads((out / "result.json").read_text())["image_auroc"] == result["image_auroc"]
    # Another configuration does not silently take it over.
    assert main([*arguments, "--set", "denoiser.train.steps=21", "--out", str(out)]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_a_checkpoint_of_another_split_is_refused(tmp_path):
    run = Run("pca", "shapes", profile="ci", image_size=16)
    evaluate(run, tmp_path / "run")
    other = Run("pca", "digits", category="3", profile="ci", image_size=16).load_data()
    checkpoint = tmp_path / "run" / "checkpoint"
    with pytest.raises(ValueError, match="another split or data set"):
        load_checkpoint(checkpoint, run, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "mean_image"}, "is a checkpoint of 'pca', not of 'mean_image'"),
        ({"seed": 2}, "was trained with seed 0, not 2"),
        ({"profile": "lite"}, "was trained with profile 'ci', not 'lite'"),
        ({"resize": "pad"}, "was trained with resize 'squash', not 'pad'"),
    ],
)
def test_a_record_cannot_claim_another_training(changes, message, tmp_path):
    run = Run("pca", "shapes", profile="ci", image_size=16)
    evaluate(run, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        evaluate(replace(run, **changes), tmp_path / "x", checkpoint=tmp_path / "run/checkpoint")
    assert not (tmp_path / "x").exists()


def test_development_images_do_not_enter_their_own_calibration(tmp_path):
    run = Run("pca", "shapes", profile="ci", image_size=16)
    evaluate(run, tmp_path / "run")
    planted = replace(run, plant="development")
    again = evaluate(planted, tmp_path / "run")  # the same folder: its checkpoint is loaded
    fresh = evaluate(planted, tmp_path / "fresh")
    assert again["n_calibration"] == 30
    assert again["threshold"] == fresh["threshold"]
    assert again["image_auroc"] == fresh["image_auroc"]


def test_a_training_in_limited_time_is_used_with_a_word_and_not_taken_for_another(tmp_path, capsys):
    command = ["--method", "anoddpm", "--dataset", "shapes", "--profile", "ci", "--quiet"]
    command += ["--image-size", "16", "--out", str(tmp_path / "run")]
    assert main(["train", *command, "--max-minutes", "0.5"]) == 0
    assert capsys.readouterr().err == ""
    checkpoint = tmp_path / "run" / "checkpoint"
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert main(["evaluate", *command, "--max-minutes", "0.5"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["evaluate", *command]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{checkpoint} was trained with --max-minutes 0.5 (20 steps) and is used; delete" in said
    assert main(["evaluate", *command, "--max-minutes", "2"]) == 2
    said = capsys.readouterr().err
    assert "trained with --max-minutes 0.5, not with --max-minutes 2; leave it out to use" in said
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    shutil.rmtree(tmp_path / "run")
    assert main(["train", *command]) == 0
    assert main(["train", *command, "--max-minutes", "2"]) == 2
    assert "trained without --max-minutes, not with --max-minutes 2" in capsys.readouterr().err


def test_a_time_limit_on_a_checkpoint_is_refused(tmp_path, capsys):
    command = ["evaluate", "--method", "anoddpm", "--checkpoint", "bundled", "--max-minutes", "1"]
    assert main([*command, "--out", str(tmp_path / "o")]) == 2
    assert "nothing is trained with --checkpoint, so --max-minutes" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_paper_profile_is_of_256_pixels():
    assert Run("anoddpm", profile="paper").image_size == 256
    assert Run("anoddpm").image_size == 64


def test_inference_settings_change_on_a_checkpoint_and_training_ones_do_not(tmp_path):
    run = Run("anoddpm", "shapes", profile="ci", image_size=16)
    evaluate(run, tmp_path / "run", progress=False)
    checkpoint = tmp_path / "run" / "checkpoint"
    raw = Run("anoddpm", "shapes", profile="ci", image_size=16, settings={"calibrate": "false"})
    result = evaluate(raw, tmp_path / "raw", checkpoint=checkpoint)
    assert result["config"]["calibrate"] is False
    wider = Run(
        "anoddpm", "shapes", profile="ci", image_size=16, settings={"denoiser.unshuffle": "1"}
    )
    with pytest.raises(
        ValueError, match=r"denoiser\.unshuffle cannot be changed on a trained model"
    ):
        evaluate(wider, tmp_path / "wider", checkpoint=checkpoint)
    assert not (tmp_path / "wider").exists()


GRID = """
profile: ci
methods: [mean_image, pca]
seeds: [0, 1]
data:
  - {dataset: shapes, image_size: 16}
plants: [null, cells]
variants:
  raw: {calibrate: false}
  default: {}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A folder with the grid and all its runs, which tests copy."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "grid.yaml").write_text(GRID)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert sweep(read_grid(folder / "grid.yaml"), folder / "runs") == []
    assert "done before" not in out.getvalue()
    return folder


def test_a_sweep_skips_what_is_done_and_redoes_what_is_broken(swept, tmp_path, capsys):
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    grid, out = read_grid(tmp_path / "grid.yaml"), tmp_path / "runs"
    results = read_results(out)
    assert len(results) == 16
    broken = out / "pca" / "shapes-16px" / "s1" / "raw" / "result.json"
    before = json.loads(broken.read_text())["image_auroc"]
    broken.write_text('{"image_au')
    assert sweep(grid, out) == []
    said = capsys.readouterr().out
    assert said.count("done before") == 15
    assert f"{broken} is broken" in said
    assert json.loads(broken.read_text())["image_auroc"] == before


def test_a_failing_cell_is_reported_and_the_others_run(tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID.replace("mean_image", "nothing"))
    failures = sweep(read_grid(tmp_path / "grid.yaml"), tmp_path / "runs")
    assert len(failures) == 2
    assert "unknown method 'nothing'" in failures[0]
    assert len(read_results(tmp_path / "runs")) == 8
    assert (tmp_path / "runs" / "nothing" / "shapes-16px" / "s0" / "error.txt").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [pca", "not valid YAML"),
        ("- pca", "must be a mapping"),
        ("method: [pca]", "did you mean 'methods'"),
        ("methods: [pca]", "names no data"),
        ("{methods: [pca], data: [elpv]}", "is like {dataset: elpv}, got 'elpv'"),
        ("{methods: [pca], data: [{dataset: elpv, size: 3}]}", "unknown key of data"),
    ],
)
def test_a_bad_grid_says_what_is_wrong(text, message, tmp_path):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_grid(tmp_path / "grid.yaml")


def test_an_entry_of_data_may_have_its_own_methods_seeds_and_plants(monkeypatch):
    own = {"root": "$PLATES/a", "category": "b", "methods": ["pca"], "seeds": [5], "plants": [None]}
    grid = {
        "methods": ["brightness", "pca"],
        "seeds": [0, 1],
        "data": [{"dataset": "shapes"}, {"dataset": "folder", **own}],
        "plants": ["cells"],
    }
    with pytest.raises(ValueError, match=r"set the environment variable .* \$PLATES/a"):
        list(trainings(grid))
    monkeypatch.setenv("PLATES", "images")
    runs = list(trainings(grid))
    assert len(runs) == 5
    (run, last) = runs[-1]
    assert (run.method, run.seed, run.root, run.category) == ("pca", 5, "images/a", "b")
    assert [scoring.plant for scoring in scorings(last, run)] == [None]
    assert [scoring.plant for scoring in scorings(runs[0][1], runs[0][0])] == ["cells"]


def write_folder(base: Path, shade: int) -> None:
    """Write a loose folder of 20 normal images around a shade of grey."""
    base.mkdir(parents=True)
    rng = np.random.default_rng(shade)
    for i in range(20):
        pixels = rng.integers(shade, shade + 40, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(base / f"{i:02d}.png")


def test_folders_of_images_have_runs_of_their_own(tmp_path, capsys):
    """Without a category, the root's name stands in the run's folder, as in its record."""
    roots = {name: tmp_path / "images" / name for name in ("bolts", "nuts")}
    for i, root in enumerate(roots.values()):
        write_folder(root, 50 + 90 * i)
    data = [{"dataset": "folder", "image_size": 16, "root": str(r)} for r in roots.values()]
    grid = {"profile": "ci", "methods": ["mean_image"], "plants": ["cells"], "data": data}
    assert sweep(grid, tmp_path / "out") == []
    assert "done before" not in capsys.readouterr().out
    records = {record["name"]: record for record in read_results(tmp_path / "out")}
    names = {n: f"mean_image/folder-{n}-16px/s0/default-cells" for n in roots}
    assert set(records) == set(names.values())
    assert {n: records[name]["category"] for n, name in names.items()} == {n: n for n in roots}
    alone = Run("mean_image", "folder", None, str(roots["nuts"]), 16, plant="cells", profile="ci")
    expected = evaluate(alone, tmp_path / "alone", progress=False)
    assert records[names["nuts"]]["image_auroc"] == expected["image_auroc"]
    assert find_missing(grid, records.values()) == ([], 2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"root": "a/plates"}, {"root": "b/plates"}], "'root': 'a/plates'} and {'root': 'b/pla"),
        (
            [{"root": "a", "category": "x"}, {"root": "b", "category": "x"}],
            "the folder pca/folder-x",
        ),
        (
            [{"root": "a"}, {"root": "a", "variants": {"default": {"calibrate": False}}}],
            "s0/default: {'settings': {}} and {'settings': {'calibrate': 'false'}}",
        ),
    ],
)
def test_runs_that_would_share_a_folder_are_refused(entries, message, tmp_path, capsys):
    data = [{"dataset": "folder"} | entry for entry in entries]
    path = tmp_path / "grid.yaml"
    path.write_text(json.dumps({"methods": ["pca"], "data": data}))
    for options in (["--out", str(tmp_path / "out")], ["--dry-run"]):
        assert main(["sweep", str(path), *options]) == 2
        said = capsys.readouterr().err
        assert "two runs of the grid would share the folder pca/folder-" in said
        assert message in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    twice = {"methods": ["pca"], "data": [{"dataset": "shapes"}] * 2}
    assert len(find_missing(twice, [])[0]) == 2  # the same run twice is one run


NETWORK = {"base_channels": 8, "channel_mults": [1, 2], "attention_levels": []}
SMALL = {f"denoiser.{name}": value for name, value in NETWORK.items()}
SHORT = {"denoiser.train.steps": 3}


def test_trainings_of_a_grid_are_made_and_tabled_apart(tmp_path):
    """As an ablation is: the same data and seeds, other settings of training."""
    grid = {
        "profile": "ci",
        "methods": ["pca"],
        "seeds": [0, 1],
        "data": [{"dataset": "shapes", "image_size": 16}],
        "trainings": {"one": {"n_components": 1}, "": {}},
    }
    assert sweep(grid, tmp_path) == []
    folder = tmp_path / "pca" / "shapes-16px"
    made = {p.parent.relative_to(folder).as_posix() for p in folder.rglob("checkpoint")}
    assert made == {"one/s0", "one/s1", "s0", "s1"}
    rendered = tables(read_results(tmp_path))
    assert {len(rendered[name].splitlines()) for name in ("overview", "shapes-disc")} == {3}
    rows = [line.split(" | ") for line in rendered["shapes-disc-pca-ablation"].splitlines()[2:]]
    assert [row[0] for row in rows] == ["| full", "| one"]
    assert rows[0][4:] == ["-", "- |"]
    results = read_results(tmp_path)
    full, one = (select(results, training=name) for name in ("", "one"))
    expected = records.mean(full, "image_auroc") - records.mean(one, "image_auroc")
    assert rows[1][4].startswith(f"{expected:+.3f} [")
    low, high = map(float, rows[1][4].split("[")[1].rstrip("]").split(", "))
    assert low <= expected <= high
    assert rows[1][5].rstrip(" |") == verdict(low, high)


def test_a_method_goes_on_from_the_training_of_anoddpm(tmp_path, monkeypatch):
    """The first stage is copied, not made again, where it is the same training, and only there."""
    data = [{"dataset": "shapes", "image_size": 16}]
    denoiser = SMALL | SHORT
    base = {"profile": "ci", "data": data, "variants": {"default": {}}}
    sweep(base | {"methods": ["anoddpm"], "settings": denoiser}, tmp_path)
    made = []

    def spy(network, *args, stage, **options):
        made.append(stage if options["workdir"] is None else stage_of(options["workdir"], stage))
        return train_network(network, *args, stage=stage, **options)

    def stage_of(folder, stage):
        return f"{stage} begun" if (folder / f"{stage}.state.safetensors").exists() else stage

    for module in ("denoiser", "diffusionad", "glad"):
        monkeypatch.setattr(f"diffad_lite.methods.{module}.train_network", spy)
    same = denoiser | {"train.steps": 3}
    assert sweep(base | {"methods": ["diffusionad"], "settings": same}, tmp_path) == []
    assert made == ["diffusion begun", "joint"]
    made.clear()
    made.clear()
    trained = {"": {}, "seen": {"standardise": True}}  # AnoDDPM's own training of that name, too
    sweep(base | {"methods": ["anoddpm"], "settings": denoiser, "trainings": trained}, tmp_path)
    assert made == ["diffusion"]
    made.clear()
    grid = base | {"methods": ["glad"], "settings": same, "trainings": {"seen": {}}}
    assert sweep(grid, tmp_path) == []
    assert made == ["diffusion begun", "anomaly_oriented"]
    made.clear()
    other = {"other": {"denoiser.train.steps": 4}}
    grid = base | {"methods": ["diffusionad"], "settings": same, "trainings": other}
    assert sweep(grid, tmp_path) == []
    assert made == ["diffusion", "joint"]


def test_a_field_that_came_later_does_not_undo_what_was_made_before(tmp_path, capsys):
    """A record without it is one with its default."""
    grid = {"profile": "ci", "methods": ["anoddpm"], "settings": SMALL | SHORT}
    grid["data"] = [{"dataset": "shapes", "image_size": 16}]
    assert sweep(grid, tmp_path) == []
    folder = tmp_path / "anoddpm" / "shapes-16px" / "s0"
    for path in ("state/training.json", "checkpoint/config.json", "default/result.json"):
        record = json.loads((folder / path).read_text())
        del record["config"]["standardise"]
        if "config_hash" in record:
            run = Run("anoddpm", "shapes", "disc", image_size=16, profile="ci")
            record["config_hash"] = run_hash(run, record["config"])
        (folder / path).write_text(json.dumps(record))
    before = (folder / "default" / "result.json").stat().st_mtime_ns
    assert sweep(grid, tmp_path) == []
    assert "done before" in capsys.readouterr().out
    assert (folder / "default" / "result.json").stat().st_mtime_ns == before
    changed = grid | {"settings": SMALL | SHORT | {"standardise": True}}
    (failure,) = sweep(changed, tmp_path)
    assert "another configuration" in failure


def test_variants_of_another_name_are_ablations(tmp_path):
    """They stand in a table of their own, not among the methods."""
    grid = {"profile": "ci", "methods": ["pca"], "seeds": [0]}
    grid["data"] = [{"dataset": "shapes", "image_size": 16}]
    grid["variants"] = {"raw": {"calibrate": False}, "default": {}, "blurred": {"smooth_sigma": 3}}
    assert sweep(grid, tmp_path) == []
    rendered = tables(read_results(tmp_path))
    assert len(rendered["shapes-disc"].splitlines()) == 2 + 2
    rows = [line.split(" | ")[0] for line in rendered["shapes-disc-pca-ablation"].splitlines()[2:]]
    assert rows == ["| full", "| full, blurred"]


def test_sizes_of_images_stand_in_rows_of_their_own(tmp_path):
    for size in (16, 64):
        for dataset in ("shapes", "digits") if size == 16 else ("shapes",):
            category = {"digits": "3"}.get(dataset)
            run = Run("brightness", dataset, category, profile="ci", image_size=size)
            evaluate(run, tmp_path / f"{dataset}{size}", progress=False)
    rendered = tables(read_results(tmp_path))
    first = [line.split(" | ")[0] for line in rendered["shapes-disc"].splitlines()[2:]]
    assert first == [
        "| brightness (control), 16 px, calibrated",
        "| brightness (control), calibrated",
    ]
    rows = rendered["overview"].splitlines()[2:]
    assert [row.endswith("| - |") for row in rows] == [False, False]
    assert rows[1].split(" | ")[1] == "-"  # 64 pixels: shapes only


def test_a_dry_run_says_what_is_left_and_makes_nothing(swept, tmp_path, capsys):
    shutil.copytree(swept / "runs" / "pca", tmp_path / "runs" / "pca")
    before = sorted(tmp_path.rglob("*"))
    command = ["sweep", str(swept / "grid.yaml"), "--dry-run", "--out"]
    assert main([*command, str(swept / "runs")]) == 0
    assert capsys.readouterr().out == "16 of 16 are done; nothing left to do\n"
    (tmp_path / "runs" / "pca" / "shapes-16px" / "s1" / "raw" / "result.json").unlink()
    assert main([*command, str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 10
    assert "to do: pca/shapes-16px/s1/raw" in printed
    assert "to do: mean_image/shapes-16px/s0/default-cells" in printed
    assert printed[-1] == "7 of 16 are done; 9 left to do"
    assert len(sorted(tmp_path.rglob("*"))) == len(before) - 1
    (tmp_path / "begun" / "pca").mkdir(parents=True)  # interrupted in the first training
    assert main([*command, str(tmp_path / "begun")]) == 0
    assert capsys.readouterr().out.endswith("0 of 16 are done; 16 left to do\n")
    assert main([*command, str(tmp_path / "nowhere")]) == 0
    assert capsys.readouterr().out.endswith("0 of 16 are done; 16 left to do\n")
    other = tmp_path / "other.yaml"  # the same names, other settings
    other.write_text(GRID.replace("default: {}", "default: {top_fraction: 0.5}"))
    assert main(["sweep", str(other), "--dry-run", "--out", str(swept / "runs")]) == 0
    assert capsys.readouterr().out.endswith("8 of 16 are done; 8 left to do\n")
    assert main(["sweep", str(other)]) == 2
    assert "sweep needs --out" in capsys.readouterr().err


def test_a_dry_run_counts_records_that_a_sweep_would_make_again(swept):
    grid, found = read_grid(swept / "grid.yaml"), read_results(swept / "runs")
    assert find_missing(grid, found) == ([], 16)
    for spoil in (
        lambda r: r.pop("config_hash"),
        lambda r: r["config"].pop("channels"),
        lambda r: r["config"].update(gone=1),
    ):
        spoilt = copy.deepcopy(found)
        spoil(spoilt[3])
        assert find_missing(grid, spoilt) == ([spoilt[3]["name"]], 16)
    with pytest.raises(ValueError, match="unknown method 'pcaa'; did you mean 'pca'"):
        find_missing(grid | {"methods": ["pcaa"]}, [])


def test_records_go_to_the_grid_that_names_them(swept, tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "few.yaml").write_text(GRID.replace("[mean_image, pca]", "[pca]"))
    (tmp_path / "other.yaml").write_text("- no: grid\n")
    report = ["report", "--runs", str(swept / "runs"), "--results", str(results)]
    assert main(report) == 0
    assert "16 records copied" in capsys.readouterr().out
    found = read_results(results)
    assert {(r["method"], r["file"].stem) for r in found} == {
        ("pca", "few"),
        ("mean_image", "runs"),
    }
    assert main(report) == 0
    assert [r["name"] for r in read_results(results)] == [r["name"] for r in found]


def test_report_renders_marked_tables_and_then_changes_nothing(swept, tmp_path):
    results, page = tmp_path / "results", tmp_path / "page.md"
    assert collect(swept / "runs", results, "runs") == 16
    head = "<!-- table shapes-disc: rendered by 'make tables' -->\n"
    page.write_text(f"before\n{head}stale words\n<!-- end -->\nafter\n")
    assert set(render(results, [page])) == {page, results / "tables.md"}
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale words" not in text
    assert "| PCA residual, 16 px, raw maps | 0, 1 |" in text
    assert render(results, [page]) == []
    rendered = tables(read_results(results))
    pixels = {"shapes-disc-pixels", "shapes-disc-cells"}
    details = {f"{name}-details" for name in pixels}
    assert set(rendered) == {"overview", "shapes-disc", *pixels, *details}
    assert rendered["overview"].splitlines()[0] == "| method | disc |"
    assert len(rendered["overview"].splitlines()) == 4  # two methods, default settings
    page.write_text(head.replace("shapes-disc", "shapes-cube") + "<!-- end -->\n")
    with pytest.raises(ValueError, match="shapes-cube"):
        render(results, [page])


def test_a_folder_of_many_sizes_with_masks_runs_from_start_to_end(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(30, 40), (55, 33), (48, 48)]
    for part, count in (("train/good", 14), ("test/good", 4), ("test/hole", 4)):
        folder = tmp_path / "data" / "plate" / part
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(120, 136, (*sizes[i % 3], 3), dtype=np.uint8)
            if "hole" in part:
                pixels[10:20, 10:20] = 0
                mask = np.zeros(pixels.shape[:2], np.uint8)
                mask[10:20, 10:20] = 255
                truth = tmp_path / "data" / "plate" / "ground_truth" / "hole"
                truth.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(truth / f"{i:03d}_mask.png")
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    for resize in ("squash", "pad"):
        run = Run("mean_image", "folder", "plate", str(tmp_path / "data"), 32, resize)
        result = evaluate(run, tmp_path / resize, save_maps=True)
        assert result["image_auroc"] == 1.0
        assert result["pixel_auroc"] > 0.95
        for path in Path(tmp_path / resize / "maps" / "plate" / "test" / "hole").iterdir():
            with Image.open(path) as image:
                height, width = sizes[int(path.stem) % 3]
                assert image.size == (width, height)


def test_a_comment_that_is_no_table_stays(swept, tmp_path):
    shutil.copytree(swept / "runs" / "pca" / "shapes-16px" / "s0" / "raw", tmp_path / "runs")
    page, words = tmp_path / "page.md", "<!-- table of contents -->\nwords\n"
    page.write_text(words)
    render(tmp_path / "runs", [page])
    assert page.read_text() == words


def test_images_of_another_size_are_calibrated_anew(tmp_path):
    run = Run("padim", "shapes", profile="ci", image_size=32)
    evaluate(run, tmp_path / "out", progress=False)
    larger = replace(run, image_size=64)
    data = larger.load_data()
    method = load_checkpoint(tmp_path / "out" / "checkpoint", larger, data)
    found = method.predict(data.calibration).image_score.numpy()
    np.testing.assert_allclose(found, method.calibration_scores_, rtol=1e-4)


def test_a_checkpoint_without_a_pixel_threshold_is_calibrated_again(tmp_path):
    """As older versions wrote it."""
    run = Run("pca", "shapes", profile="ci", image_size=32)
    evaluate(run, tmp_path / "out", progress=False)
    path, data = tmp_path / "out" / "checkpoint" / "model.safetensors", run.load_data()
    tensors = load_file(path)
    expected = tensors.pop("pixel_threshold").item()
    save_file(tensors, path)
    method = load_checkpoint(path.parent, run, data)
    assert method.pixel_threshold_ == pytest.approx(expected, rel=1e-6)


def test_no_workers_are_refused(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(GRID)
    command = ["sweep", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "o")]
    assert main([*command, "--workers", "0"]) == 2
    assert "workers must be at least 1, got 0" in capsys.readouterr().err


def test_a_calibration_in_limited_time_is_recorded_and_not_made_longer(
    tmp_path, monkeypatch, capsys
):
    now, infer = [0.0], PCAResidual._infer

    def slow(self, images, *rest):
        now[0] += len(images)
        return infer(self, images, *rest)

    monkeypatch.setattr(PCAResidual, "_infer", slow)
    monkeypatch.setattr(base, "time", SimpleNamespace(monotonic=lambda: now[0]))
    command = ["--method", "pca", "--dataset", "shapes", "--image-size", "16", "--quiet"]
    limited = [*command, "--out", str(tmp_path / "run"), "--max-minutes", "0.25"]
    assert main(["train", *limited]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the time budget (--max-minutes) allowed 10 of 60 calibration images; the" in said
    record = read_record(tmp_path / "run" / "checkpoint")
    assert (record["n_calibration"], record["n_calibration_available"]) == (10, 60)
    monkeypatch.setattr(Method, "calibrate", None)  # must not be called
    assert main(["evaluate", *limited]) == 0
    assert "10 scores, q = 0.95: the maximum is used" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["n_calibration"] == 10
    monkeypatch.undo()
    again = ["--checkpoint", str(tmp_path / "run"), "--set", "smooth_sigma=2"]
    assert main(["evaluate", *command, *again, "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().err
    assert "10 of 60 calibration images are scored again and give the threshold" in said
    assert json.loads((tmp_path / "again" / "result.json").read_text())["n_calibration"] == 10
