"""Fuzzing of what runs leave and what users write: records, tables, grids, claims, arguments."""

import contextlib
import copy
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_fuzz import NAMES, Case, damaged, pick, spoilt_table, survive, watched
from test_fuzz_checkpoints import TEXTS, hostile, replace_one

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

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(os.name == "nt", reason="signals and links are those of POSIX"),
]


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
        "measure": "auroc",
        "better": {"method": "pca", "dataset": "shapes", "category": "disc"},
        "than": {"method": "mean_image", "dataset": "shapes", "category": "disc"},
    },
    {
        "method": "PCA",
        "claim": "it is fast",
        "source": "here",
        "measure": "time",
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


def records_below(folder: Path) -> Path:
    """Results of two methods with two seeds, times, and claims beside them."""
    results = folder / "results"
    for method in ("pca", "mean_image"):
        for seed in (0, 1):
            run = results / method / f"s{seed}"
            run.mkdir(parents=True)
            (run / "result.json").write_text(json.dumps(record(method, seed), indent=1))
            (run / "scores.csv").write_text(SCORES)
    setting = {"ms": [1.0, 1.5], "mb": 2.0, "evaluations": 1, "parameters": 5}
    speed = {"settings": {"pca": setting, "padim": setting | {"ms": [9.0, 8.0]}}}
    (results / "speed.json").write_text(json.dumps(speed))
    (folder / "claims.yaml").write_text(yaml.safe_dump(CLAIMS, sort_keys=False))
    return results


def read_all(results: Path) -> None:
    found = read_results(results)
    groups = list(grouped(found).values())
    for group in groups:
        label_of(group)
        assert all(np.isfinite(auroc_over_seeds(group)))
    difference_of(groups[0], groups[-1])
    read_speeds(results)
    claims_table(judge_all(found, results))
    assert collect(results, results.with_name("copies"), "grid") == len(found)


def collected(results: Path) -> Path:
    """The same records in the files of a grid."""
    copies = results.with_name("copies")
    collect(results, copies, "grid")
    return copies


def read_collected(copies: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a last line that is cut short is left out, which is said
        found = read_results(copies)
    for result in found:
        labels, scores = read_scores(result)
        assert len(labels) == len(scores)


def unfinished(folder: Path) -> None:
    runner._finished_before(folder / UNFINISHED, "the key")


def spoilt_json(rng: np.random.Generator, path: Path) -> str:
    text = path.read_text()
    what = pick(rng, ("value",) * 6 + ("text", "text", "bytes"))
    if what == "value":
        values = json.loads(text)
        what = replace_one(rng, values)
        path.write_text(json.dumps(values))
    elif what == "text":
        what = pick(rng, TEXTS)
        path.write_bytes(TEXTS[what](text))
    else:
        path.write_bytes(damaged(rng, text.encode()))
    return what


def record_case(rng: np.random.Generator, folder: Path) -> Case:
    results = records_below(folder)
    run = results / pick(rng, ("pca", "mean_image")) / "s1"
    named: tuple[object, ...] = (folder,)
    others = ("speed", "speed", "claims", "done", "series", "lines", "lines", "archive")
    match pick(rng, ("record",) * 4 + ("scores",) * 3 + others):
        case "record":
            what = "record: " + spoilt_json(rng, run / "result.json")
        case "scores":
            what = "scores"
            (run / "scores.csv").write_bytes(spoilt_table(rng, SCORES))
        case "speed":
            what = "speed: " + spoilt_json(rng, results / "speed.json")
        case "claims":
            claims = copy.deepcopy(CLAIMS)
            what = "claims: " + replace_one(rng, pick(rng, claims))
            text = yaml.safe_dump(claims, sort_keys=False)
            (folder / "claims.yaml").write_text(pick(rng, (text, text, text, pick(rng, YAMLS))))
        case "lines":
            path = collected(results) / "grid.jsonl"
            lines = path.read_bytes().splitlines()
            at, name = int(rng.integers(len(lines))), pick(rng, TEXTS)
            lines[at] = TEXTS[name](lines[at].decode())
            path.write_bytes(b"\n".join(lines) + pick(rng, (b"", b"\n")))
            return Case(f"line: {name}", lambda: read_collected(path.parent), named)
        case "archive":
            path = collected(results) / "grid-scores.npz"
            path.write_bytes(damaged(rng, path.read_bytes()))
            return Case("archive", lambda: read_collected(path.parent), named)
        case "done":
            what = "done: " + spoilt_json(rng, run / "result.json")
            config = METHODS["pca"].Config()
            done = Run("pca", "shapes", "disc", image_size=16, seed=1)
            return Case(what, lambda: is_done(done, run / "result.json", config), named)
        case "series":
            path = folder / UNFINISHED
            path.write_text(json.dumps({"key": "the key", "done": ["01_a.ipynb"], "more": 1.0}))
            what = "series: " + spoilt_json(rng, path)
            return Case(what, lambda: unfinished(folder), named)
    return Case(what, lambda: read_all(results), named)


def test_records(tmp_path):
    survive("records", tmp_path, record_case)


@pytest.mark.parametrize("text", ["[]", "3", '{"a": 1}', "{", '{"../../x": {"file": "../../y"}}'])
def test_an_odd_index_of_bundled_weights(text, tmp_path, monkeypatch):
    """Names in ``index.json`` are never used as paths; what is no index is refused and kept."""
    index = tmp_path / "data" / "checkpoints" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text(text)
    monkeypatch.setenv("DIFFAD_DATA", str(tmp_path / "data"))
    run = Run("pca", "shapes", image_size=16, profile="ci", settings={"n_components": "3"})
    data = run.load_data()
    method = METHODS["pca"](run.configure(data)).fit(data.train, data.calibration, seed=0)
    with watched(tmp_path):
        if text.startswith('{"'):
            bundle(run, data, method, command="diffad train")
            assert json.loads(index.read_text()).keys() == {*json.loads(text), "shapes-disc-pca"}
        else:
            with pytest.raises(ValueError, match=r"index\.json"):
                bundle(run, data, method, command="diffad train")
            assert index.read_text() == text


# ---------------------------------------------------------------------------------- grids

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 10)}]\n" for i in range(9)
)
YAMLS = (
    BOMB,
    BOMB + "methods: *j\ndata: *j\n",
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


def odd_grid(rng: np.random.Generator) -> dict[str, Any]:
    """A grid with values of many kinds under its keys, most of them right."""
    words = ("pca", "anoddpm", "shapes", "disc", "..", "../x", "/x", "a\0b", "", *NAMES[:8])
    right: dict[str, Any] = {
        "profile": "ci",
        "methods": ["pca", "anoddpm"],
        "seeds": [0, 1],
        "plants": [None, "cells"],
        "variants": {"raw": {"calibrate": False}, "default": None},
        "trainings": {"few": {"denoiser.train.steps": 3}},
        "settings": {"smooth_sigma": 0.5},
    }
    grid = {k: v for k, v in right.items() if k == "methods" or rng.random() < 0.5}
    entry: dict[str, Any] = {"dataset": "shapes", "image_size": 16, "resize": "pad"}
    entry |= {"category": "disc", "root": pick(rng, ("$NOT_THERE", "~", "x", "${", "é ö"))}
    entry = {k: v for k, v in entry.items() if k == "dataset" or rng.random() < 0.4}
    entry |= {k: v for k, v in right.items() if k in SHARED_TYPES and rng.random() < 0.15}
    grid["data"] = [entry] * int(rng.integers(1, 3))
    for _ in range(int(pick(rng, (0, 1, 1, 2)))):
        node = pick(rng, (grid, entry))
        key = pick(rng, (*node, "more"))
        word = pick(rng, words)
        node[key] = pick(rng, (hostile(rng), word, [word], {word: {}}))
    return grid


def plan(path: Path, out: Path) -> None:
    grid = read_grid(path)
    for training, own in trainings(grid):
        assert folder_of(training, out).resolve().is_relative_to(out.resolve())
        for scoring in scorings(own, training):
            assert (
                (folder_of(training, out) / scoring.variant).resolve().is_relative_to(out.resolve())
            )
            with contextlib.suppress(ValueError):  # which method has which field is its own matter
                override(METHODS["pca"].Config(), scoring.settings)


def grid_case(rng: np.random.Generator, folder: Path) -> Case:
    path = folder / pick(rng, ("grid.yaml", f"{pick(rng, NAMES)}.yaml"))
    what = pick(rng, ("values",) * 4 + ("text", "text", "bytes"))
    if what == "text":
        text = pick(rng, YAMLS)
        what = f"text {text[:40]!r}"
        path.write_text(text)
    else:
        text = yaml.safe_dump(odd_grid(rng), allow_unicode=True)
        data = text.encode(errors="replace")
        path.write_bytes(damaged(rng, data) if what == "bytes" else data)
        what = f"{what} {text[:200]!r}"
    fields = ("seed", "variant must", "training must", "method must", "dataset must", "resize must")
    named = (
        path,
        "setting ",
        "root",
        *(k for k in GRID_TYPES if k != "data"),
        *fields,
        "category must",
    )
    return Case(what, lambda: plan(path, folder / "out"), named)


def test_grids(tmp_path):
    survive("grids", tmp_path, grid_case)


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
RIGHT = (
    *(("--seed", "3"), ("--profile", "ci"), ("--image-size", "16"), ("--category", "disc")),
    *(("--quiet",), ("--maps",), ("--set", "n_components=3"), ("--max-minutes", "0.5")),
    *(("--plant", "cells"), ("--resize", "pad"), ("--variant", "é ö"), ("--sheet", "s.png")),
)
WORDS = (
    *("", " ", "0", "-1", "1e999", "nan", "inf", "-inf", "1_0", "٣", "0x10", "9" * 5000, "1e300"),
    *("pca", "shapes", "digits", "ci", "paper", "pad", "cells", "bundled", "x", ".", "..", "~"),
    *("/dev/null", "/proc/self/mem", "a" * 5000, "a/" * 2000, "\0", "a\nb", "\r", "\t", "\u2028"),
    *("\udcff", "é", "画像", "🔥", "%s", "%(prog)s", "{}", "{0}", "$HOME", "`ls`", "'", '"', "*"),
    *("train.steps=1", "a=b", "=", "a.b.c=1", "n_components=[", "n_components=" + "[" * 9999),
    *("n_components=" + "9" * 9999, "smooth_sigma=NaN", "smooth_sigma=" + "9" * 400, "\0=\0"),
    *("grid.yaml", "file", "folder", "out/../..", "con", "nul", "--help=", "10" * 9, "1" * 300),
)


class Begun(ValueError):
    """The arguments were in order, and work would begin."""

    def __init__(self) -> None:
        super().__init__(type(self).__name__)


@pytest.fixture
def idle(monkeypatch):
    """Whatever would take time says that it has begun."""

    def stop(*arguments: object, **options: object) -> None:
        raise Begun

    def checked(name: str, category: str | None = None, **options: Any) -> None:
        plant, resize, size = (options.get(k) for k in ("plant", "resize", "image_size"))
        datasets.check_arguments(name, plant, resize or "squash", size or 64)
        raise Begun

    monkeypatch.setattr(run, "load_dataset", checked)
    monkeypatch.setattr(datasets, "load_dataset", checked)
    for place in ("dask.sweep_on_dask", "grid.sweep", "machine.run_checks"):
        monkeypatch.setattr(f"diffad_lite.experiments.{place}", stop)


def words_of(rng: np.random.Generator) -> list[str]:
    """A command line that is right but for something, or nothing but odd words."""
    if rng.random() < 0.1:
        return [pick(rng, (*WORDS, *OPTIONS, *SUBCOMMANDS)) for _ in range(int(rng.integers(0, 6)))]
    name = pick(rng, SUBCOMMANDS)
    words = [name, *SUBCOMMANDS[name]]
    for _ in range(int(rng.integers(0, 4))):
        at = int(rng.integers(1, len(words) + 1))
        match pick(rng, ("right", "right", "right", "option", "word", "swap", "drop")):
            case "right":
                words += pick(rng, RIGHT)
            case "option":
                words += [pick(rng, OPTIONS), pick(rng, WORDS)]
            case "word":
                words.insert(at, pick(rng, WORDS))
            case "swap":
                words[at - 1 :] = [pick(rng, WORDS), *words[at:]] if at > 1 else words
            case "drop":
                del words[at:]
    return words


def call(words: list[str]) -> None:
    """As a shell calls it: one line on stderr and exit code 2, or nothing to complain of."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", e) for e in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:  # argparse's way
            code = stop.code
    err.seek(0)
    said = err.read()
    assert code in (0, 2), (code, said[:200])
    assert "Traceback" not in said
    if code == 2:
        assert said.startswith("diffad: "), said[:200]
        assert said.count("\n") == 1, said[:200]
        if said == f"diffad: {Begun.__name__}\n":
            return
        raise ValueError(said[:900])  # argparse says words back as they came, all of them


def test_arguments(tmp_path, idle, monkeypatch):
    def make(rng: np.random.Generator, folder: Path) -> Case:
        words = words_of(rng)
        monkeypatch.chdir(folder)
        (folder / "grid.yaml").write_text("{methods: [pca], data: [{dataset: shapes}]}")
        (folder / "file").write_text("x")
        (folder / "folder").mkdir()
        return Case(repr(words)[:300], lambda: call(words), ("diffad: ",))

    survive("arguments", tmp_path, make)
    monkeypatch.undo()


def test_help_is_no_error(capsys):
    for name in SUBCOMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
    assert "usage: diffad" in capsys.readouterr().out
