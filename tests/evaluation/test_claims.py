"""The claims table: effects from records, verdicts by rule, no verdict without a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from speed import SETTINGS

from diffad_lite.evaluation.claims import (
    NOT_MEASURED,
    NOT_TESTABLE,
    Claim,
    claims_table,
    judge,
    judge_all,
    read_claims,
)
from diffad_lite.evaluation.metrics import paired_bootstrap_auroc
from diffad_lite.evaluation.records import method_names, read_results
from diffad_lite.evaluation.tables import render
from diffad_lite.experiments.grid import sweep

DATA = Path(__file__).parents[2] / "data"
ROW = {"dataset": "shapes", "category": "disc", "image_size": 16, "method": "pca"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of two variants of PCA: one with two seeds, one with one."""
    out = tmp_path_factory.mktemp("data") / "results"
    grid = {"profile": "ci", "methods": ["pca"], "data": [{"dataset": "shapes", "image_size": 16}]}
    assert not sweep(grid | {"seeds": [0, 1], "variants": {"default": {}}}, out)
    assert not sweep(grid | {"seeds": [1], "variants": {"one": {"top_fraction": 1.0}}}, out)
    return out


def claim(**changes) -> Claim:
    base = {"method": "PCA", "claim": "it helps", "source": "here", "measure": "auroc"}
    return Claim(**(base | {"better": ROW, "than": ROW | {"variant": "one"}} | changes))


def test_the_effect_is_the_paired_difference_on_common_seeds(folder):
    judged = judge(claim(), read_results(folder), {})
    assert judged.seeds == [1]
    scores = []
    for variant in ("default", "one"):
        (path,) = folder.glob(f"pca/*/s1/{variant}/scores.csv")
        rows = [line.split(",") for line in path.read_text().splitlines()]
        columns = {name: i for i, name in enumerate(rows[0])}
        scores.append([float(row[columns["image_score"]]) for row in rows[1:]])
        labels = np.array([int(row[columns["label"]]) for row in rows[1:]])
    expected = paired_bootstrap_auroc(labels, *(np.array([s]) for s in scores))
    assert (judged.effect, judged.low, judged.high) == pytest.approx(expected)


@pytest.mark.parametrize(("minimum", "expected"), [(-1.0, "holds"), (1.0, "does not hold")])
def test_the_verdict_follows_from_interval_and_minimum(folder, minimum, expected):
    assert judge(claim(minimum=minimum), read_results(folder), {}).verdict == expected


def test_a_setting_against_itself_has_no_effect(folder):
    judged = judge(claim(than=ROW), read_results(folder), {})
    assert (judged.effect, judged.low, judged.high) == (0, 0, 0)
    assert judged.verdict == "does not hold"
    assert judged.seeds == [0, 1]


def test_what_was_not_run_is_not_judged(folder):
    results = read_results(folder)
    gone = claim(than=ROW | {"variant": "gone"})
    assert judge(gone, results, {}).verdict == NOT_MEASURED
    assert judge(claim(measure="time", better={"name": "a"}, than={"name": "b"}), results, {}) == (
        judge(claim(measure="time", better={"name": "a"}, than={"name": "b"}), [], {"a": {}})
    )
    assert judge(claim(measure=None), results, {}).verdict == NOT_TESTABLE


def test_times_are_compared_round_by_round():
    speeds = {"a": {"ms": [1.0, 2.0, 4.0], "mb": 2.0}, "b": {"ms": [3.0, 8.0, 8.0], "mb": 3.0}}
    names = {"better": {"name": "a"}, "than": {"name": "b"}}
    judged = judge(claim(measure="time", minimum=1, **names), [], speeds)
    assert (judged.effect, judged.low, judged.high, judged.verdict) == (3, 2, 4, "holds")
    assert judge(claim(measure="time", minimum=2.5, **names), [], speeds).verdict == "inconclusive"
    judged = judge(claim(measure="memory", minimum=1, **names), [], speeds)
    assert (judged.effect, judged.low, judged.high) == (1.5, 1.5, 1.5)


def test_the_table_stands_among_the_others(folder, tmp_path):
    entries = [{"method": "PCA", "claim": "it helps", "source": "here", "measure": "auroc"}]
    entries[0] |= {"better": ROW, "than": ROW | {"variant": "one"}, "remark": "of shapes"}
    path = folder.parent / "claims.yaml"
    path.write_text(yaml.safe_dump(entries))
    try:
        (judged,) = judge_all(read_results(folder), folder)
        table = claims_table([judged])
        row = "| it helps | PCA | image AUROC: PCA residual, disc against PCA residual, one, disc |"
        assert f"{row} {judged.effect:+.3f}" in table
        assert "1 seed |" in table
        assert "(of shapes) |" in table
        render(folder, [])
        assert table in (folder / "tables.md").read_text()
        path.write_text("- {method: a, claim: b, source: c, measured: auroc}")
        with pytest.raises(ValueError, match=r"claims\.yaml, claim 1: .*measured"):
            render(folder, [])
        path.write_text("- {method: a, claim: b, source: c, measure: auc}")
        with pytest.raises(ValueError, match=r"did you mean 'auroc'"):
            read_claims(path)
        path.write_text("method: a")
        with pytest.raises(ValueError, match="must be a list of claims"):
            read_claims(path)
    finally:
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no table of claims"):
        read_claims(path)


def test_the_committed_claims_name_what_there_is():
    claims = read_claims(DATA / "claims.yaml")
    assert len(claims) >= 15
    assert len({c.claim for c in claims}) == len(claims)
    for c in claims:
        for setting in (c.better, c.than) if c.measure else ():
            if c.measure == "auroc":
                assert setting["method"] in method_names()
            else:
                assert setting["name"] in SETTINGS
    assert json.loads(json.dumps([c.claim for c in claims]))


@pytest.mark.parametrize("measure", ["time", "memory"])
def test_a_ratio_needs_a_minimum_that_means_less(tmp_path, measure):
    entry = {"method": "PCA", "claim": "c", "source": "s", "measure": measure}
    entry |= {"better": {"name": "pca"}, "than": {"name": "glad"}}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([entry]))
    with pytest.raises(ValueError, match=r"claim 1: a ratio's minimum is at least 1, got 0.0"):
        read_claims(tmp_path / "claims.yaml")
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([entry | {"minimum": 2.0}]))
    assert read_claims(tmp_path / "claims.yaml")[0].minimum == 2.0
