"""The claims table: effects from records, each in its quantity, verdicts by rule or none."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from speed import SETTINGS

from diffad_lite.evaluation import claims as claims_module
from diffad_lite.evaluation import records as records_module
from diffad_lite.evaluation.claims import (
    DEFAULT_ROW,
    NOT_MEASURED,
    NOT_TESTABLE,
    QUANTITIES,
    Claim,
    claims_table,
    judge,
    judge_all,
    read_claims,
)
from diffad_lite.evaluation.metrics import paired_bootstrap_auroc, remaining_contrast
from diffad_lite.evaluation.records import ScoreTable, read_results
from diffad_lite.evaluation.tables import render
from diffad_lite.experiments.grid import named_scorings, read_grid, sweep

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
    base = {"method": "PCA", "claim": "it helps", "source": "here", "quantity": "image_auroc"}
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
    assert judge(
        claim(quantity="seconds", better={"name": "a"}, than={"name": "b"}), results, {}
    ) == (judge(claim(quantity="seconds", better={"name": "a"}, than={"name": "b"}), [], {"a": {}}))
    assert judge(claim(quantity=None), results, {}).verdict == NOT_TESTABLE


def test_times_are_compared_round_by_round():
    speeds = {"a": {"ms": [1.0, 2.0, 4.0], "mb": 2.0}, "b": {"ms": [3.0, 8.0, 8.0], "mb": 3.0}}
    names = {"better": {"name": "a"}, "than": {"name": "b"}}
    judged = judge(claim(quantity="seconds", minimum=1, **names), [], speeds)
    assert (judged.effect, judged.low, judged.high, judged.verdict) == (3, 2, 4, "holds")
    assert (
        judge(claim(quantity="seconds", minimum=2.5, **names), [], speeds).verdict == "inconclusive"
    )
    judged = judge(claim(quantity="memory", minimum=1, **names), [], speeds)
    assert (judged.effect, judged.low, judged.high) == (1.5, 1.5, 1.5)


def test_the_table_stands_among_the_others(folder, tmp_path):
    entries = [{"method": "PCA", "claim": "it helps", "source": "here", "quantity": "image_auroc"}]
    entries[0] |= {"better": ROW, "than": ROW | {"variant": "one"}, "remark": "of shapes"}
    path = folder.parent / "claims.yaml"
    path.write_text(yaml.safe_dump(entries))
    try:
        (judged,) = judge_all(read_results(folder), folder)
        table = claims_table([judged])
        row = (
            "| it helps | PCA | image AUROC | PCA residual, disc against PCA residual, one, disc |"
        )
        assert f"{row} {judged.effect:+.3f}" in table
        assert "1 seed |" in table
        assert "(of shapes) |" in table
        render(folder, [])
        assert table in (folder / "tables.md").read_text()
        path.write_text("- {method: a, claim: b, source: c, measure: auroc}")
        with pytest.raises(ValueError, match=r"claims\.yaml, claim 1: .*measure"):
            render(folder, [])
        path.write_text("- {method: a, claim: b, source: c, quantity: imag_auroc}")
        with pytest.raises(ValueError, match=r"claim 1: .* did you mean 'image_auroc'"):
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
    assert len(claims) >= 22
    assert len({(c.claim, c.quantity) for c in claims}) == len(claims)
    keys = ("method", "dataset", "category", "plant", "training", "variant")
    scorings = []
    for name in ("grid", "ablations"):
        scorings += [vars(run) for _, _, run in named_scorings(read_grid(DATA / f"{name}.yaml"))]
    planned = {tuple(scoring[key] for key in keys) for scoring in scorings}
    for c in claims:
        for setting in (c.better, c.than) if c.quantity else ():
            if QUANTITIES[c.quantity].speed_field:
                assert setting["name"] in SETTINGS
            else:
                row = DEFAULT_ROW | dict(setting)
                assert tuple(row[key] for key in keys) in planned, f"{c.claim}: no grid has {row}"
    assert json.loads(json.dumps([c.claim for c in claims]))


@pytest.mark.parametrize("quantity", ["seconds", "memory"])
def test_a_ratio_needs_a_minimum_that_means_less(tmp_path, quantity):
    entry = {"method": "PCA", "claim": "c", "source": "s", "quantity": quantity}
    entry |= {"better": {"name": "pca"}, "than": {"name": "glad"}}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([entry]))
    with pytest.raises(ValueError, match=r"claim 1: a ratio's minimum is at least 1, got 0.0"):
        read_claims(tmp_path / "claims.yaml")
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump([entry | {"minimum": 2.0}]))
    assert read_claims(tmp_path / "claims.yaml")[0].minimum == 2.0


PLANTED = {"better": ROW | {"plant": "cells"}, "than": ROW | {"variant": "one", "plant": "cells"}}
DIFFERENCES = [name for name, quantity in QUANTITIES.items() if not quantity.speed_field]


def records_with(quantity: str, better: float | None, than: float | None) -> list[dict]:
    """Return records of two seeds for both settings of ``PLANTED``, with values of a quantity."""
    base = DEFAULT_ROW | PLANTED["better"] | {"profile": "ci", "resize": "squash"}
    return [
        base | {"variant": variant, "seed": seed, quantity: value}
        for seed in (0, 1)
        for variant, value in (("default", better), ("one", than))
    ]


@pytest.fixture
def known_half_width(monkeypatch):
    """Differences of the records' values, each with an interval of +- 0.1."""

    def difference(a, b, quantity):
        effect = float(np.mean([r[quantity] for r in a]) - np.mean([r[quantity] for r in b]))
        return effect, effect - 0.1, effect + 0.1

    monkeypatch.setattr(claims_module, "difference_of", difference)
    monkeypatch.setattr(claims_module, "has_values", lambda r, name: r.get(name) is not None)


@pytest.mark.parametrize("quantity", DIFFERENCES)
@pytest.mark.parametrize(
    ("gain", "minimum", "expected"),
    [
        (0.3, 0.0, "holds"),
        (0.05, 0.0, "inconclusive"),
        (0.2, 0.4, "does not hold"),
        (-0.3, 0.0, "reversed"),
        (-0.05, 0.0, "inconclusive"),
        (-0.1, -0.3, "holds"),
    ],
)
def test_each_quantity_gives_each_verdict(known_half_width, quantity, gain, minimum, expected):
    """A gain is more of a good quantity, or less of the contrast that remains of a defect."""
    sign = -1 if quantity == "remaining_contrast" else 1
    records = records_with(quantity, 0.5 + sign * gain, 0.5)
    judged = judge(claim(quantity=quantity, minimum=minimum, **PLANTED), records, {})
    assert judged.verdict == expected
    assert (judged.effect, judged.low, judged.high) == pytest.approx((gain, gain - 0.1, gain + 0.1))
    assert judged.seeds == [0, 1]


@pytest.mark.parametrize(("remains", "expected"), [(0.2, 0.5), (-0.2, 0.5), (-1.0, -0.3)])
def test_less_remaining_contrast_is_a_positive_effect(remains, expected):
    """With the metric itself: less of a defect is better, and an inverted defect is no less."""
    rng = np.random.default_rng(0)
    clean = rng.uniform(-1, 1, (6, 1, 4, 4))
    masks = np.zeros((6, 4, 4), bool)
    masks[:, 1:3, 1:3] = True
    planted = clean + 0.5 * masks[:, None]
    values = {}
    for variant, fraction in (("default", remains), ("one", 0.7)):
        reconstructions = clean + fraction * (planted - clean)
        values[variant] = remaining_contrast(planted, clean, reconstructions, masks)
    records = records_with("remaining_contrast", values["default"].mean(), values["one"].mean())
    table = ScoreTable(np.arange(6).astype(str), np.arange(6) % 2, np.full(6, "spot"), np.ones(6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records_module, "read_score_table", lambda record: table)
        patch.setattr(
            records_module,
            "read_measures",
            lambda record: {"remaining_contrast": values[record["variant"]]},
        )
        judged = judge(claim(quantity="remaining_contrast", **PLANTED), records, {})
    assert (judged.effect, judged.low, judged.high) == pytest.approx((expected,) * 3)
    assert judged.verdict == ("holds" if expected > 0 else "reversed")


@pytest.mark.parametrize("quantity", DIFFERENCES)
def test_records_of_older_versions_are_not_measured_yet(known_half_width, quantity):
    for values in ((None, 0.5), (0.5, None)):
        records = records_with(quantity, *values)
        assert judge(claim(quantity=quantity, **PLANTED), records, {}).verdict == NOT_MEASURED


def test_only_seeds_with_the_quantity_count(known_half_width):
    records = records_with("psnr_normal", 30.0, 29.0)
    records[-1]["psnr_normal"] = None
    judged = judge(claim(quantity="psnr_normal", **PLANTED), records, {})
    assert judged.seeds == [0]
    assert "| +1.00 dB [+0.90, +1.10], 1 seed |" in claims_table([judged])


def test_a_mean_without_values_per_image_is_not_measured_yet(monkeypatch):
    records = records_with("pixel_ap", 0.5, 0.4)
    monkeypatch.setattr(records_module, "read_measures", lambda record: {})
    assert judge(claim(quantity="pixel_ap", **PLANTED), records, {}).verdict == NOT_MEASURED
    values = {"pixel_ap": np.array([0.5])}
    monkeypatch.setattr(records_module, "read_measures", lambda record: values)
    monkeypatch.setattr(claims_module, "difference_of", lambda a, b, quantity: (0.1, 0.05, 0.2))
    assert judge(claim(quantity="pixel_ap", **PLANTED), records, {}).verdict == "holds"


@pytest.mark.parametrize(
    ("times", "expected"),
    [([1.0, 2.0], "reversed"), ([4.0, 3.0], "inconclusive"), ([8.0, 9.0], "holds")],
)
def test_a_ratio_below_one_is_reversed(times, expected):
    speeds = {"a": {"ms": [3.5, 3.5], "mb": 2.0}, "b": {"ms": times, "mb": 2.0}}
    names = {"better": {"name": "a"}, "than": {"name": "b"}}
    assert judge(claim(quantity="seconds", minimum=1, **names), [], speeds).verdict == expected
    judged = judge(claim(quantity="memory", minimum=1, **names), [], speeds)
    assert judged.verdict == "does not hold"  # a ratio of exactly 1 is no effect


EFFECTS = {
    "image_auroc": "| image AUROC | {} | +0.250 [+0.150, +0.350], 2 seeds | holds |",
    "pixel_ap": "| pixel AP | {} | +0.250 [+0.150, +0.350], 2 seeds | holds |",
    "dice_oracle": "| Dice, oracle threshold | {} | +0.250 [+0.150, +0.350], 2 seeds | holds |",
    "aupro": "| AUPRO | {} | +0.250 [+0.150, +0.350], 2 seeds | holds |",
    "psnr_normal": "| PSNR on normal images | {} | +0.25 dB [+0.15, +0.35], 2 seeds | holds |",
    "remaining_contrast": "| reduction of remaining contrast | {} "
    "| +0.250 [+0.150, +0.350], 2 seeds | holds |",
}


@pytest.mark.parametrize("quantity", DIFFERENCES)
def test_the_table_gives_each_difference_with_its_unit(known_half_width, quantity):
    values = (0.25, 0.5) if quantity == "remaining_contrast" else (0.5, 0.25)
    judged = judge(claim(quantity=quantity, **PLANTED), records_with(quantity, *values), {})
    pair = "PCA residual, disc against PCA residual, one, disc, on planted defects (cells)"
    (_, _, row) = claims_table([judged]).splitlines()
    assert row == "| it helps | PCA " + EFFECTS[quantity].format(pair)


def test_the_table_gives_ratios_and_claims_without_an_experiment():
    speeds = {"a": {"ms": [1.0, 1.0], "mb": 2.0}, "b": {"ms": [3.0, 4.0], "mb": 3.0}}
    names = {"better": {"name": "a"}, "than": {"name": "b"}, "minimum": 1}
    entries = [claim(quantity=quantity, **names) for quantity in ("seconds", "memory")]
    entries.append(claim(quantity=None, remark="a matter of taste"))
    head, _, *rows = claims_table([judge(c, [], speeds) for c in entries]).splitlines()
    assert head == "| claim | paper | quantity | experiment | effect [95 %] | verdict |"
    assert rows == [
        "| it helps | PCA | time per image | a against b | 3.5 times less [3.0, 4.0] | holds |",
        "| it helps | PCA | memory | a against b | 1.5 times less [1.5, 1.5] | holds |",
        "| it helps | PCA | - | - | - | not testable at this scale (a matter of taste) |",
    ]


@pytest.mark.parametrize(
    ("quantity", "changes", "message"),
    [
        ("remaining_contrast", {}, r"needs planted defects, .*; add 'plant: cells' to 'better'"),
        ("pixel_ap", {}, r"pixel_ap needs masks, and elpv has none; add 'plant: cells'"),
        ("dice_oracle", {}, "dice_oracle needs masks"),
        ("aupro", {}, "aupro needs masks"),
        ("remaining_contrast", {"dataset": "folder"}, "needs planted defects"),
        ("pixel_ap", {"dataset": "folder"}, None),
        ("pixel_ap", {"plant": "cells"}, None),
        ("remaining_contrast", {"plant": "cells"}, None),
        ("psnr_normal", {}, None),
        ("image_auroc", {}, None),
    ],
)
def test_quantities_on_defects_need_masks_or_planting(tmp_path, quantity, changes, message):
    path = tmp_path / "claims.yaml"
    setting = {"method": "pca"} | changes
    entry = {"method": "PCA", "claim": "c", "source": "s", "quantity": quantity}
    path.write_text(yaml.safe_dump([entry | {"better": setting, "than": setting}]))
    if message is None:
        assert read_claims(path)[0].quantity == quantity
    else:
        with pytest.raises(ValueError, match=rf"claims\.yaml, claim 1: .*{message}"):
            read_claims(path)


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [("plant", "cells", None), ("category", "poly", "mono"), ("dataset", "shapes", "elpv")],
)
def test_both_settings_need_the_same_test_set(tmp_path, key, value, other):
    path = tmp_path / "claims.yaml"
    entry = {"method": "PCA", "claim": "c", "source": "s", "quantity": "psnr_normal"}
    entry |= {"better": {"method": "pca", key: value}, "than": {"method": "pca"}}
    path.write_text(yaml.safe_dump([entry]))
    with pytest.raises(ValueError, match=f"need the same {key}, got {value!r} and {other!r}"):
        read_claims(path)


def test_uncertain_labels_have_no_planted_defects(tmp_path):
    entry = {"method": "PCA", "claim": "c", "source": "s", "quantity": "remaining_contrast"}
    setting = {"method": "pca", "plant": "uncertain"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump([entry | {"better": setting, "than": setting}]))
    with pytest.raises(ValueError, match="remaining_contrast needs planted defects"):
        read_claims(tmp_path / "c.yaml")
