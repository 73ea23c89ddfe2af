"""Claims of the papers, our experiment for each, and a verdict by rule.

``data/claims.yaml`` names two settings for each claim, *with* and *without* what it praises, and
the quantity that the claim is about. The effect is their difference of that quantity, paired over
images and seeds, or their ratio of times or memory in one run of ``make bench TOPICS=speed``. Its
interval alone decides the verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from diffad_lite.core.config import configuration, from_dict, unknown_name
from diffad_lite.core.files import read_yaml
from diffad_lite.evaluation.metrics import verdict
from diffad_lite.evaluation.records import (
    FIELD_TYPES,
    Result,
    difference_of,
    grouped,
    has_values,
    markdown_table,
    method_names,
    read_speeds,
    select,
)


class Quantity(NamedTuple):
    """A quantity that claims are judged by.

    Attributes:
        words: its name in the table.
        unit: unit of an effect in the table.
        decimals: digits of an effect after the point.
        better: which direction helps; for "less", the effect is the reduction.
        needs: "masks", or "planting" (the images before defects were planted); "" for neither.
        speed_field: field of ``speed.json``, for a ratio of times or memory; "" for a difference
            of the field of the same name in two records.
    """

    words: str
    unit: str = ""
    decimals: int = 3
    better: Literal["more", "less"] = "more"
    needs: Literal["", "masks", "planting"] = ""
    speed_field: str = ""


QUANTITIES = {
    "image_auroc": Quantity("image AUROC"),
    "pixel_ap": Quantity("pixel AP", needs="masks"),
    "dice_oracle": Quantity("Dice, oracle threshold", needs="masks"),
    "aupro": Quantity("AUPRO", needs="masks"),
    "psnr_normal": Quantity("PSNR on normal images", " dB", decimals=2),
    "remaining_contrast": Quantity(
        "reduction of remaining contrast", better="less", needs="planting"
    ),
    "seconds": Quantity("time per image", " times less", 1, "less", speed_field="ms"),
    "memory": Quantity("memory", " times less", 1, "less", speed_field="mb"),
}
WITHOUT_MASKS = ("elpv", "medmnist", "digits")  # data sets whose real defects have no masks
NOT_TESTABLE = "not testable at this scale"
NOT_MEASURED = "not measured yet"
# Fields of a setting that the claim does not name.
DEFAULT_ROW = {"dataset": "elpv", "category": "mono", "plant": None, "image_size": 64}
DEFAULT_ROW |= {"training": "", "variant": "default"}
Effect = tuple[float, float, float, list[int]]  # effect, ends of its interval, seeds


@configuration
class Claim:
    """One claim, and the experiment that tests it.

    Attributes:
        method: whose paper it is from.
        claim: in our words.
        source: where it was read.
        quantity: a name in ``QUANTITIES``; None if we cannot test the claim, and ``remark`` says
            why.
        better: result fields of the setting with what is praised, ``method`` at least; for times
            and memory the ``name`` that ``tests/bench/speed.py`` gives.
        than: the same without it.
        minimum: the effect must exceed it: a difference, or a ratio "times less". A ratio needs
            one, at least 1.
        remark: what a reader of the verdict must know.
    """

    method: str
    claim: str
    source: str
    quantity: str | None = None
    better: Mapping[str, Any] = field(default_factory=dict)
    than: Mapping[str, Any] = field(default_factory=dict)
    minimum: float = 0.0
    remark: str = ""


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict and, once the experiment was run, its effect.

    Attributes:
        claim: the claim.
        verdict: "holds", "reversed", "does not hold", "inconclusive", or why there is none.
        effect: difference in the quantity's unit (above 0: it helps), or ratio (above 1: it
            saves).
        low: lower end of its 95 % interval.
        high: upper end.
        seeds: training seeds behind it.
    """

    claim: Claim
    verdict: str
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: list[int] = field(default_factory=list)


def read_claims(path: str | Path) -> list[Claim]:
    """Read the claims of a YAML file.

    Raises FileNotFoundError if there is none, ValueError (which names the broken claim) if it is
    not a list of claims.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no table of claims at {path}")
    entries = read_yaml(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} must be a list of claims")
    claims = []
    for i, entry in enumerate(entries, 1):
        try:
            claims.append(from_dict(Claim, entry))
            _check_settings(claims[-1])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, claim {i}: {error}") from None
    return claims


def _check_settings(claim: Claim) -> None:
    """Raise ValueError for a quantity or settings that no result or time can have."""
    if claim.quantity is None:
        return
    if claim.quantity not in QUANTITIES:
        raise unknown_name("quantity", claim.quantity, QUANTITIES)
    is_ratio = bool(QUANTITIES[claim.quantity].speed_field)
    if is_ratio and claim.minimum < 1:
        raise ValueError(f"a ratio's minimum is at least 1, got {claim.minimum}")
    known = ("name",) if is_ratio else tuple(FIELD_TYPES)
    for setting in (claim.better, claim.than):
        for key in setting:
            if key not in known:
                raise unknown_name("key of a setting", key, known)
        if is_ratio and not isinstance(setting.get("name"), str):
            raise ValueError("a setting has no name")
        if not is_ratio and setting.get("method") not in method_names():
            raise unknown_name("method", str(setting.get("method")), method_names())
    if not is_ratio:
        _check_test_sets(claim, claim.quantity)


def _check_test_sets(claim: Claim, quantity: str) -> None:
    """Raise ValueError for test sets that differ, or on which the quantity cannot be measured."""
    better, than = (DEFAULT_ROW | dict(setting) for setting in (claim.better, claim.than))
    for key in ("dataset", "category", "plant"):
        if better[key] != than[key]:
            pair = f"{better[key]!r} and {than[key]!r}"
            raise ValueError(f"'better' and 'than' need the same {key}, got {pair}")
    needs, dataset = QUANTITIES[quantity].needs, better["dataset"]
    if better["plant"] not in (None, "uncertain") or not needs:
        return
    fix = "add 'plant: cells' to 'better' and 'than'"
    if needs == "planting":
        raise ValueError(f"{quantity} needs planted defects, got settings without plant; {fix}")
    if dataset in WITHOUT_MASKS:
        raise ValueError(f"{quantity} needs masks, and {dataset} has none; {fix}")


def judge(claim: Claim, results: Sequence[Result], speeds: Mapping[str, Any]) -> Judged:
    """Measure the effect behind a claim, from records or ``read_speeds``, and give its verdict."""
    if claim.quantity is None:
        return Judged(claim, NOT_TESTABLE)
    quantity = QUANTITIES[claim.quantity]
    if quantity.speed_field:
        effect, no_effect = _ratio(claim, speeds, quantity.speed_field), 1.0
    else:
        effect, no_effect = _difference(claim, results, claim.quantity), 0.0
    if effect is None:
        return Judged(claim, NOT_MEASURED)
    return Judged(claim, verdict(*effect[1:3], claim.minimum, no_effect=no_effect), *effect)


def _difference(claim: Claim, results: Sequence[Result], quantity: str) -> Effect | None:
    """Subtract the quantity of both settings, paired, on the seeds with which both measured it.

    Above 0 means that it helps. Return None if there is no such seed: not run yet, or records of
    older versions, which lack the quantity or its values per image.
    """
    pair = []
    for setting in (claim.better, claim.than):
        runs = select(results, **DEFAULT_ROW | dict(setting))
        groups = list(grouped(r for r in runs if has_values(r, quantity)).values())
        pair.append(groups[0] if groups else [])
    seeds = sorted(set.intersection(*({r["seed"] for r in group} for group in pair)))
    if not seeds:
        return None
    effect, low, high = difference_of(pair[0], pair[1], quantity)
    if QUANTITIES[quantity].better == "less":
        effect, low, high = -effect, -high, -low
    return effect, low, high, seeds


def _ratio(claim: Claim, speeds: Mapping[str, Any], field_name: str) -> Effect | None:
    """Return the ratio of both settings, above 1 if the praised one takes less: median, ends."""
    names = [setting["name"] for setting in (claim.better, claim.than)]
    if not set(names) <= speeds.keys():
        return None
    less, more = (np.array(speeds[name][field_name]) for name in names)
    ratios = np.atleast_1d(more / less)  # of each round
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max()), []


def judge_all(results: Sequence[Result], folder: str | Path) -> list[Judged]:
    """Judge every claim of ``claims.yaml`` beside the folder of results; none without that file.

    Raises ValueError if the file is broken.
    """
    path = Path(folder).parent / "claims.yaml"
    if not path.exists():
        return []
    speeds = read_speeds(folder)
    return [judge(claim, results, speeds) for claim in read_claims(path)]


def claims_table(judged: Sequence[Judged]) -> str:
    """Return the claims as Markdown, with quantity, experiment, effect and verdict."""
    rows = []
    for j in judged:
        claim = j.claim
        remark = f" ({claim.remark})" if claim.remark else ""
        words = QUANTITIES[claim.quantity].words if claim.quantity else "-"
        cells = [claim.claim, claim.method, words, _experiment(claim), _effect(j)]
        rows.append([*cells, j.verdict + remark])
    head = ["claim", "paper", "quantity", "experiment", "effect [95 %]", "verdict"]
    return markdown_table(head, rows)


def _experiment(claim: Claim) -> str:
    """Return the two settings of a claim, as the table names them."""
    if claim.quantity is None:
        return "-"
    pair = " against ".join(_name(setting) for setting in (claim.better, claim.than))
    plant = claim.better.get("plant")
    return f"{pair}, on planted defects ({plant})" if plant else pair


def _name(setting: Mapping[str, Any]) -> str:
    """Return a setting's name in the table."""
    if "name" in setting:  # of times and memory
        return str(setting["name"])
    details = [str(setting[key]) for key in ("training", "variant", "category") if setting.get(key)]
    return ", ".join([method_names()[setting["method"]], *details])


def _effect(judged: Judged) -> str:
    """Return an effect with its unit, interval and seeds, as the table writes it."""
    if judged.effect is None or judged.claim.quantity is None:
        return "-"
    quantity = QUANTITIES[judged.claim.quantity]
    style = f".{quantity.decimals}f" if quantity.speed_field else f"+.{quantity.decimals}f"
    effect, low, high = (format(x, style) for x in (judged.effect, judged.low, judged.high))
    text = f"{effect}{quantity.unit} [{low}, {high}]"
    if quantity.speed_field:
        return text
    return f"{text}, {len(judged.seeds)} seed" + ("s" if len(judged.seeds) > 1 else "")
