"""Fuzzing of the files that runs and users write: records, tables, claims, grids; of arguments."""

import contextlib
import copy
import io
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzzing import FILE_NAMES, Case, check_inputs, choose, corrupt, sandboxed
from test_fuzz_checkpoints import JSON_FAULTS, corrupt_json, corrupt_values, hostile_value
from test_fuzz_images import corrupt_table

from diffad_lite.cli.main import main
from diffad_lite.core.config import override
from diffad_lite.data import datasets
from diffad_lite.evaluation.claims import claims_table, judge_all
from diffad_lite.evaluation.records import (
    auroc_over_seeds,
    collect,
    difference_of,
    grouped,
    label_of,
    read_results,
    read_scores,
    read_speeds,
)
from diffad_lite.experiments import run
from diffad_lite.experiments.evaluate import bundle
from diffad_lite.experiments.grid import (
    GRID_TYPES,
    SHARED_TYPES,
    folder_of,
    is_done,
    read_grid,
    scorings,
    trainings,
)
from diffad_lite.experiments.run import Run
from diffad_lite.methods.base import METHODS
from diffad_lite.notebook import runner
from diffad_lite.notebook.runner import UNFINISHED

pytestmark = pytest.mark.filterwarnings("ignore")


# -------------------------------------------------------------------------------- records

SCORES = "id,label,defect_type,image_score\n" + "".join(
    f"{'hole' if i % 2 else 'good'}/{i},{i % 2},{'hole' if i % 2 else 'good'},{i * 7 % 5}.25\n"
    for i in range(10)
)
CLAIMS = [
    {
        "method": "PCA",
        "claim": "it helps",
        "source": "here",
        "quantity": "image_auroc",
        "better": {"method": "pca", "dataset": "shapes", "category": "disc"},
        "than": {"method": "mean_image", "dataset": "shapes", "category": "disc"},
    },
    {
        "method": "PCA",
        "claim": "it is fast",
        "source": "here",
        "quantity": "seconds",
        "better": {"name": "pca"},
        "than": {"name": "padim"},
        "minimum": 2,
    },
    {"method": "PCA", "claim": "it is nice", "source": "here", "remark": "a matter of taste"},
]


def record(method: str, seed: int) -> dict[str, Any]:
    numbers = dict.fromkeys(("image_auroc", "image_ap", "threshold", "f1_at_normal_threshold"), 0.5)
    numbers |= dict.fromkeys(("train_seconds", "train_steps", "ms_per_image"), 3)
    numbers |= {"false_alarms_at_normal_threshold": 0.1, "network_evaluations_per_image": 4.0}
    masked = dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro", "dice_oracle"), 0.4)
    words = {"dataset": "shapes", "category": "disc", "resize": "squash", "profile": "ci"}
    words |= {"plant": None, "variant": "default", "method": method, "config_hash": "0"}
    config = {"calibrate": True, "train": {"steps": 3}}
    more = {"per_defect": {"hole": {"n": 5, "aupro": 0.3}}, "image_auroc_ci": [0.4, 0.6]}
    return {**words, "image_size": 16, "seed": seed, "config": config, **numbers, **masked, **more}


def write_results(folder: Path) -> Path:
    """Write records of two methods with two seeds, their speed, and claims; return their folder."""
    results = folder / "results"
    for method in ("pca", "mean_image"):
        for seed in (0, 1):
            run_folder = results / method / f"s{seed}"
            run_folder.mkdir(parents=True)
            text = json.dumps(record(method, seed), indent=1)
            (run_folder / "result.json").write_text(text)
            (run_folder / "scores.csv").write_text(SCORES)
    setting = {"ms": [1.0, 1.5], "mb": 2.0, "evaluations": 1, "parameters": 5}
    speed = {"settings": {"pca": setting, "padim": setting | {"ms": [9.0, 8.0]}}}
    (results / "speed.json").write_text(json.dumps(speed))
    (folder / "claims.yaml").write_text(yaml.safe_dump(CLAIMS, sort_keys=False))
    return results


def use_results(results: Path) -> None:
    """Do with results what a report does."""
    records = read_results(results)
    groups = list(grouped(records).values())
    for group in groups:
        label_of(group)
        assert all(np.isfinite(auroc_over_seeds(group)))
    difference_of(groups[0], groups[-1])
    read_speeds(results)
    claims_table(judge_all(records, results))
    assert collect(results, results.with_name("copies"), "grid") == len(records)


def read_collected(copies: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an incomplete final line is skipped with a warning
        records = read_results(copies)
    for result in records:
        labels, scores = read_scores(result)
        assert len(labels) == len(scores)


def record_case(rng: np.random.Generator, folder: Path) -> Case:
    results = write_results(folder)
    run_folder = results / choose(rng, ("pca", "mean_image")) / "s1"
    result, copies = run_folder / "result.json", results.with_name("copies")
    action = partial(use_results, results)
    others = ("speed", "speed", "claims", "done", "series", "lines", "lines", "archive")
    kind = choose(rng, ("record",) * 4 + ("scores",) * 3 + others)
    description = kind
    if kind in ("lines", "archive"):
        collect(results, copies, "grid")
        action = partial(read_collected, copies)
    match kind:
        case "record":
            description += ": " + corrupt_json(rng, result)
        case "scores":
            (run_folder / "scores.csv").write_bytes(corrupt_table(rng, SCORES))
        case "speed":
            description += ": " + corrupt_json(rng, results / "speed.json")
        case "claims":
            claims = copy.deepcopy(CLAIMS)
            description += ": " + corrupt_values(rng, choose(rng, claims))
            text = yaml.safe_dump(claims, sort_keys=False)
            (folder / "claims.yaml").write_text(choose(rng, (text, text, text, choose(rng, YAMLS))))
        case "lines":
            path = copies / "grid.jsonl"
            lines = path.read_bytes().splitlines()
            index, fault = int(rng.integers(len(lines))), choose(rng, JSON_FAULTS)
            lines[index] = JSON_FAULTS[fault](lines[index].decode())
            path.write_bytes(b"\n".join(lines) + choose(rng, (b"", b"\n")))
            description += f": {fault}"
        case "archive":
            path = copies / "grid-scores.npz"
            path.write_bytes(corrupt(rng, path.read_bytes()))
        case "done":
            description += ": " + corrupt_json(rng, result)
            done = Run("pca", "shapes", "disc", image_size=16, seed=1)
            action = partial(is_done, done, result, METHODS["pca"].Config())
        case "series":
            path = folder / UNFINISHED
            path.write_text(json.dumps({"key": "the key", "done": ["01_a.ipynb"], "more": 1.0}))
            description += ": " + corrupt_json(rng, path)
            action = partial(runner._finished_before, path, "the key")
    return Case(description, action, (folder,))


def test_records(tmp_path):
    check_inputs("records", tmp_path, record_case)


@pytest.mark.parametrize("text", ["[]", "3", '{"a": 1}', "{", '{"../../x": {"file": "../../y"}}'])
def test_an_odd_index_of_bundled_weights(text, tmp_path, monkeypatch):
    """Names in ``index.json`` are never used as paths; a file that is no index is kept."""
    index = tmp_path / "data" / "checkpoints" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text(text)
    monkeypatch.setenv("DIFFAD_DATA", str(tmp_path / "data"))
    run = Run("pca", "shapes", image_size=16, profile="ci", settings={"n_components": "3"})
    data = run.load_data()
    method = METHODS["pca"](run.configure(data)).fit(data.train, data.calibration, seed=0)
    with sandboxed(tmp_path):
        if text.startswith('{"'):
            bundle(run, data, method, command="diffad train")
            assert json.loads(index.read_text()).keys() == {*json.loads(text), "shapes-disc-pca"}
        else:
            with pytest.raises(ValueError, match=r"index\.json"):
                bundle(run, data, method, command="diffad train")
            assert index.read_text() == text


# ---------------------------------------------------------------------------------- grids

ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
)
YAMLS = (
    ALIAS_BOMB,
    ALIAS_BOMB + "methods: *j\ndata: *j\n",
    "methods: &m [pca, *m]\ndata: [{dataset: shapes}]\n",
    "methods: [pca]\ndata: &d [{dataset: shapes, plants: *d}]\n",
    "methods: [pca]\nsettings: &s {a: *s}\ndata: [{dataset: shapes}]\n",
    "[" * 50_000,
    "{a: " * 50_000,
    "- " * 20_000 + "a",
    "&a " * 5,
    "!!python/object/apply:os.system ['false']",
    "!!python/name:os.system",
    "!!python/object/new:type [x, [], {}]",
    "!!timestamp x",
    "!!int x",
    "!!int ''",
    "!!float x",
    "!!bool maybe",
    "!!binary é",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "a: 2001-99-99",
    "methods: [pca]\nseeds: [" + "9" * 9999 + "]\ndata: [{dataset: shapes}]\n",
    "methods: [pca]\nseeds: [0x" + "f" * 9999 + "]\ndata: [{dataset: shapes}]\n",
    "methods: [pca]\nsettings: {a: 0x" + "f" * 9999 + "}\ndata: [{dataset: shapes}]\n",
    "methods: [pca]\nsettings: {a: 2001-01-01}\ndata: [{dataset: shapes}]\n",
    "methods: [pca]\nvariants: {a: {b: !!set {c}}}\ndata: [{dataset: shapes}]\n",
    "methods: [pca]\nvariants: {../../x: {}, a/b: {}}\ndata: [{dataset: shapes}]\n",
    "methods: [../../x]\ndata: [{dataset: shapes}]\n",
    "methods: [pca]\ndata: [{dataset: ../../x}]\n",
    "methods: [pca]\ndata: [{dataset: shapes, category: ../../x}]\n",
    "methods: [pca]\ndata: [{dataset: shapes, resize: x/../../../y}]\n",
    "methods: [pca]\ntrainings: {..: {}}\ndata: [{dataset: shapes}]\n",
    "? [a, b]\n: c",
    "a: b: c",
    "\ta: b",
    "%TAG ! x",
    "--- a\n--- b",
    "<<: 3",
    "a: *b",
    "a: 1\na: 2",
    "\0",
    "a: |\n  x\n b",
    "'",
    "é",
)


def random_grid(rng: np.random.Generator) -> dict[str, Any]:
    """Return a grid whose values are valid but for two at most."""
    words = ("pca", "anoddpm", "shapes", "disc", "..", "../x", "/x", "a\0b", "", *FILE_NAMES[:8])
    valid: dict[str, Any] = {
        "profile": "ci",
        "methods": ["pca", "anoddpm"],
        "seeds": [0, 1],
        "plants": [None, "cells"],
        "variants": {"raw": {"calibrate": False}, "default": None},
        "trainings": {"few": {"denoiser.train.steps": 3}},
        "settings": {"smooth_sigma": 0.5},
    }
    grid = {k: v for k, v in valid.items() if k == "methods" or rng.random() < 0.5}
    entry: dict[str, Any] = {"dataset": "shapes", "image_size": 16, "resize": "pad"}
    entry |= {"category": "disc", "root": choose(rng, ("$NOT_THERE", "~", "x", "${", "é ö"))}
    entry = {k: v for k, v in entry.items() if k == "dataset" or rng.random() < 0.4}
    entry |= {k: v for k, v in valid.items() if k in SHARED_TYPES and rng.random() < 0.15}
    grid["data"] = [entry] * int(rng.integers(1, 3))
    for _ in range(int(choose(rng, (0, 1, 1, 2)))):
        node = choose(rng, (grid, entry))
        key = choose(rng, (*node, "more"))
        word = choose(rng, words)
        node[key] = choose(rng, (hostile_value(rng), word, [word], {word: {}}))
    return grid


def plan(path: Path, out: Path) -> None:
    """Read a grid and list its scorings, all of them below ``out``."""
    out = out.resolve()
    for training, settings in trainings(read_grid(path)):
        folder = folder_of(training, out)
        assert folder.resolve().is_relative_to(out)
        for scoring in scorings(settings, training):
            assert (folder / scoring.variant).resolve().is_relative_to(out)
            with contextlib.suppress(ValueError):  # PCA may lack a field of another method
                override(METHODS["pca"].Config(), scoring.settings)


def grid_case(rng: np.random.Generator, folder: Path) -> Case:
    path = folder / choose(rng, ("grid.yaml", f"{choose(rng, FILE_NAMES)}.yaml"))
    kind = choose(rng, ("values",) * 4 + ("text", "text", "bytes"))
    if kind == "text":
        text = choose(rng, YAMLS)
        description = f"text {text[:40]!r}"
        path.write_text(text)
    else:
        text = yaml.safe_dump(random_grid(rng), allow_unicode=True)
        data = text.encode(errors="replace")
        path.write_bytes(corrupt(rng, data) if kind == "bytes" else data)
        description = f"{kind} {text[:200]!r}"
    fields = ("seed", "variant must", "training must", "method must", "dataset must", "resize must")
    keys = (key for key in GRID_TYPES if key != "data")
    words = (path, "setting ", "root", *keys, *fields, "category must")
    return Case(description, partial(plan, path, folder / "out"), words)


def test_grids(tmp_path):
    check_inputs("grids", tmp_path, grid_case)


# ------------------------------------------------------------------------------ arguments

SUBCOMMANDS = {
    "evaluate": ["--method", "pca", "--out", "out"],
    "train": ["--method", "pca", "--out", "out"],
    "score": ["--checkpoint", "c", "--images", "i", "--out", "out"],
    "datasets": ["--dataset", "shapes"],
    "sweep": ["grid.yaml", "--out", "out"],
    "report": ["--results", "r"],
    "notebooks": ["--folder", "lessons"],
    "doctor": [],
}
OPTIONS = (
    *("--method", "--dataset", "--category", "--root", "--image-size", "--resize", "--profile"),
    *("--seed", "--variant", "--out", "--max-minutes", "--set", "--quiet", "--plant", "--maps"),
    *("--checkpoint", "--bundle", "--sheet", "--runs", "--results", "--images", "--rounds", "-p"),
    *("--only", "--folder", "--workers", "--", "-", "-x", "--m", "--se", "--im=3", "--set=", "@x"),
)
VALID_OPTIONS = (
    *(("--seed", "3"), ("--profile", "ci"), ("--image-size", "16"), ("--category", "disc")),
    *(("--quiet",), ("--maps",), ("--set", "n_components=3"), ("--max-minutes", "0.5")),
    *(("--plant", "cells"), ("--resize", "pad"), ("--variant", "é ö"), ("--sheet", "s.png")),
)
ODD_WORDS = (
    *("", " ", "0", "-1", "1e999", "nan", "inf", "-inf", "1_0", "٣", "0x10", "9" * 5000, "1e300"),
    *("pca", "shapes", "digits", "ci", "paper", "pad", "cells", "bundled", "x", ".", "..", "~"),
    *("/dev/null", "/proc/self/mem", "a" * 5000, "a/" * 2000, "\0", "a\nb", "\r", "\t", "\u2028"),
    *("\udcff", "é", "画像", "🔥", "%s", "%(prog)s", "{}", "{0}", "$HOME", "`ls`", "'", '"', "*"),
    *(
        "denoiser.train.steps=1",
        "a=b",
        "=",
        "a.b.c=1",
        "n_components=[",
        "n_components=" + "[" * 9999,
    ),
    *("n_components=" + "9" * 9999, "smooth_sigma=NaN", "smooth_sigma=" + "9" * 400, "\0=\0"),
    *("grid.yaml", "file", "folder", "out/../..", "con", "nul", "--help=", "10" * 9, "1" * 300),
)


class Started(ValueError):
    """The arguments were valid, and work would start."""

    def __init__(self) -> None:
        super().__init__(type(self).__name__)


@pytest.fixture
def no_work(monkeypatch):
    """Raise Started instead of doing work."""

    def stop(*arguments: object, **options: object) -> None:
        raise Started

    def check_only(name: str, category: str | None = None, **options: Any) -> None:
        plant, resize, size = (options.get(k) for k in ("plant", "resize", "image_size"))
        datasets.check_arguments(name, plant, resize or "squash", size or 64)
        raise Started

    monkeypatch.setattr(run, "load_dataset", check_only)
    monkeypatch.setattr(datasets, "load_dataset", check_only)
    for place in ("dask.sweep_on_dask", "grid.sweep", "machine.run_checks"):
        monkeypatch.setattr(f"diffad_lite.experiments.{place}", stop)


def random_arguments(rng: np.random.Generator) -> list[str]:
    """Return a command line with up to three changes, or odd words only."""
    if rng.random() < 0.1:
        return [
            choose(rng, (*ODD_WORDS, *OPTIONS, *SUBCOMMANDS))
            for _ in range(int(rng.integers(0, 6)))
        ]
    name = choose(rng, SUBCOMMANDS)
    words = [name, *SUBCOMMANDS[name]]
    for _ in range(int(rng.integers(0, 4))):
        at = int(rng.integers(1, len(words) + 1))
        match choose(rng, ("valid", "valid", "valid", "option", "word", "swap", "drop")):
            case "valid":
                words += choose(rng, VALID_OPTIONS)
            case "option":
                words += [choose(rng, OPTIONS), choose(rng, ODD_WORDS)]
            case "word":
                words.insert(at, choose(rng, ODD_WORDS))
            case "swap":
                words[at - 1 :] = [choose(rng, ODD_WORDS), *words[at:]] if at > 1 else words
            case "drop":
                del words[at:]
    return words


def call(words: list[str]) -> None:
    """Call ``diffad`` as a shell does; raise ValueError where it ends with exit code 2.

    Exit code 2 needs exactly one line on stderr, 0 is fine, and nothing else is allowed.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", e) for e in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:  # as argparse ends
            code = stop.code
    err.seek(0)
    message = err.read()
    assert code in (0, 2), (code, message[:200])
    assert "Traceback" not in message
    if code == 2:
        assert message.startswith("diffad: "), message[:200]
        assert message.count("\n") == 1, message[:200]
        if message != f"diffad: {Started.__name__}\n":
            raise ValueError(message[:900])  # argparse repeats the words, however long they are


def test_arguments(tmp_path, no_work, monkeypatch):
    def make_case(rng: np.random.Generator, folder: Path) -> Case:
        words = random_arguments(rng)
        monkeypatch.chdir(folder)
        (folder / "grid.yaml").write_text("{methods: [pca], data: [{dataset: shapes}]}")
        (folder / "file").write_text("x")
        (folder / "folder").mkdir()
        return Case(repr(words)[:300], partial(call, words), ("diffad: ",))

    check_inputs("arguments", tmp_path, make_case)
    monkeypatch.undo()


def test_help_exits_with_0(capsys):
    for name in SUBCOMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
    assert "usage: diffad" in capsys.readouterr().out
