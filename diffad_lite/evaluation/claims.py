"""Claims of the papers, our experiment for each, and a verdict by rule.

``data/claims.yaml`` names two settings for each claim, *with* and *without* what it praises. The
effect is their difference in image AUROC, paired over images and seeds, or their ratio of times or
memory in one run of ``make bench TOPICS=speed``. Its interval alone decides the verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffad_lite.core.config import configuration, from_dict, unknown_name
from diffad_lite.core.files import read_yaml
from diffad_lite.evaluation.metrics import verdict
from diffad_lite.evaluation.records import (
    FIELD_TYPES,
    Result,
    difference_of,
    grouped,
    markdown_table,
    method_names,
    read_speeds,
    select,
)

MEASURES = {"auroc": "image AUROC", "time": "time saved", "memory": "memory saved"}
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
        measure: what is compared; None if we cannot test it, and ``remark`` says why.
        better: result fields of the setting with what is praised, ``method`` at least; for times
            and memory the ``name`` that ``tests/bench/speed.py`` gives.
        than: the same without it.
        minimum: the effect must exceed it: a difference of AUROC, or a ratio "times less". A
            ratio needs one, at least 1.
        remark: what a reader of the verdict must know.
    """

    method: str
    claim: str
    source: str
    measure: Literal["auroc", "time", "memory"] | None = None
    better: Mapping[str, Any] = field(default_factory=dict)
    than: Mapping[str, Any] = field(default_factory=dict)
    minimum: float = 0.0
    remark: str = ""


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict and, once the experiment was run, its effect.

    Attributes:
        claim: the claim.
        verdict: "holds", "does not hold", "inconclusive", or why there is none.
        effect: difference of AUROC (above 0: it helps), or ratio (above 1: it saves).
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
        measure = entry.get("measure") if isinstance(entry, dict) else None
        if measure not in (None, *MEASURES):
            raise unknown_name(f"measure in {path}, claim {i}", str(measure), MEASURES)
        try:
            claims.append(from_dict(Claim, entry))
            _check_settings(claims[-1])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, claim {i}: {error}") from None
    return claims


def _check_settings(claim: Claim) -> None:
    """Raise ValueError for settings that no result or time can have."""
    if claim.measure is None:
        return
    is_ratio = claim.measure != "auroc"
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


def judge(claim: Claim, results: Sequence[Result], speeds: Mapping[str, Any]) -> Judged:
    """Measure the effect behind a claim, from records or ``read_speeds``, and give its verdict."""
    if claim.measure is None:
        return Judged(claim, NOT_TESTABLE)
    effect = _difference(claim, results) if claim.measure == "auroc" else _ratio(claim, speeds)
    if effect is None:
        return Judged(claim, NOT_MEASURED)
    return Judged(claim, verdict(*effect[1:3], claim.minimum), *effect)


def _difference(claim: Claim, results: Sequence[Result]) -> Effect | None:
    """Subtract the image AUROC of both settings, paired, on the seeds that both have."""
    pair = []
    for setting in (claim.better, claim.than):
        groups = list(grouped(select(results, **DEFAULT_ROW | dict(setting))).values())
        pair.append(groups[0] if groups else [])
    seeds = sorted(set.intersection(*({r["seed"] for r in group} for group in pair)))
    return (*difference_of(pair[0], pair[1]), seeds) if seeds else None


def _ratio(claim: Claim, speeds: Mapping[str, Any]) -> Effect | None:
    """Return how many times less the praised setting takes: median, least and most of rounds."""
    names = [setting["name"] for setting in (claim.better, claim.than)]
    if not set(names) <= speeds.keys():
        return None
    key = "ms" if claim.measure == "time" else "mb"
    less, more = (np.array(speeds[name][key]) for name in names)
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
    """Return the claims as Markdown, with experiment, effect and verdict."""
    rows = []
    for j in judged:
        claim = j.claim
        remark = f" ({claim.remark})" if claim.remark else ""
        experiment = "-"
        if claim.measure is not None:
            pair = " against ".join(_name(s, claim.measure) for s in (claim.better, claim.than))
            experiment = f"{MEASURES[claim.measure]}: {pair}"
        rows.append([claim.claim, claim.method, experiment, _effect(j), j.verdict + remark])
    return markdown_table(["claim", "paper", "experiment", "effect [95 %]", "verdict"], rows)


def _name(setting: Mapping[str, Any], measure: str) -> str:
    """Return a setting's name in the table."""
    if measure != "auroc":
        return setting["name"]
    details = [str(setting[key]) for key in ("training", "variant", "category") if setting.get(key)]
    return ", ".join([method_names()[setting["method"]], *details])


def _effect(judged: Judged) -> str:
    """Return an effect with its interval, as the table writes it."""
    if judged.effect is None:
        return "-"
    effect, low, high = judged.effect, judged.low, judged.high
    if judged.claim.measure != "auroc":
        return f"{effect:.1f} times [{low:.1f}, {high:.1f}]"
    seeds = f"{len(judged.seeds)} seed" + ("s" if len(judged.seeds) > 1 else "")
    return f"{effect:+.3f} [{low:+.3f}, {high:+.3f}], {seeds}"
