"""What the papers claim, what an experiment of ours says of it, and a verdict made by rule.

``data/claims.yaml`` names for each claim two settings, *with* and *without* what it praises. The
effect is their difference in image AUROC, paired over images and seeds, or their ratio of times or
memory in one run of ``make bench TOPICS=speed``; the verdict follows from its interval alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffad_lite.core.config import from_dict, unknown_name
from diffad_lite.core.files import read_yaml
from diffad_lite.evaluation.metrics import verdict
from diffad_lite.evaluation.records import (
    FORMS,
    METHOD_NAMES,
    Result,
    difference_of,
    grouped,
    markdown_table,
    read_speeds,
    select,
)

MEASURES = {"auroc": "image AUROC", "time": "time saved", "memory": "memory saved"}
NOT_TESTABLE = "not testable at this scale"
NOT_MEASURED = "not measured yet"
# What a setting is where the claim does not say otherwise.
DEFAULT_ROW = {"dataset": "elpv", "category": "mono", "plant": None, "image_size": 64}
DEFAULT_ROW |= {"training": "", "variant": "default"}


@dataclass(frozen=True)
class Claim:
    """One claim, and the experiment that stands for it.

    Attributes:
        method: whose paper it is from.
        claim: in our words.
        source: where it was read.
        measure: what is compared; None where nothing of ours can, and ``remark`` says why.
        better: fields of the results that have what is praised, ``method`` at least; of times
            and memory the ``name`` that ``tests/bench/speed.py`` gives.
        than: likewise without it.
        minimum: what the effect must exceed: a difference of AUROC, or a ratio "times less",
            which must be named.
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
    """A claim with its effect; None where the experiment has not been made.

    Attributes:
        claim: the claim.
        effect: difference of AUROC (above 0: it helps), or ratio (above 1: it saves).
        low: lower end of its 95 % interval.
        high: upper end.
        seeds: training seeds behind it.
        verdict: "holds", "does not hold", "inconclusive", or why there is none.
    """

    claim: Claim
    effect: float | None
    low: float | None
    high: float | None
    seeds: list[int]
    verdict: str


def read_claims(path: str | Path) -> list[Claim]:
    """The claims of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no list of claims; the broken one is named.
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
    """Raise ValueError for settings that results or times cannot have."""
    for own in (claim.better, claim.than) if claim.measure else ():
        known = FORMS if claim.measure == "auroc" else ("name",)
        for key in own:
            if key not in known:
                raise unknown_name("key of a setting", key, known)
        if claim.measure != "auroc" and claim.minimum < 1:
            raise ValueError(f"a ratio's minimum is at least 1, got {claim.minimum}")
        if claim.measure != "auroc" and not isinstance(own.get("name"), str):
            raise ValueError("a setting has no name")
        if claim.measure == "auroc" and own.get("method") not in list(METHOD_NAMES):
            raise unknown_name("method", str(own.get("method")), METHOD_NAMES)


def judge(claim: Claim, results: Sequence[Result], speeds: Mapping[str, Any]) -> Judged:
    """The effect behind a claim, and its verdict.

    Args:
        claim: see :class:`Claim`.
        results: records of runs.
        speeds: settings that ``make bench TOPICS=speed`` measured in one run, by name.
    """
    if claim.measure is None:
        return Judged(claim, None, None, None, [], NOT_TESTABLE)
    found = _difference(claim, results) if claim.measure == "auroc" else _ratio(claim, speeds)
    if found is None:
        return Judged(claim, None, None, None, [], NOT_MEASURED)
    effect, low, high, seeds = found
    return Judged(claim, effect, low, high, seeds, verdict(low, high, claim.minimum))


def _difference(
    claim: Claim, results: Sequence[Result]
) -> tuple[float, float, float, list[int]] | None:
    """Image AUROC of both settings, subtracted, with its paired interval, on common seeds."""
    both = []
    for own in (claim.better, claim.than):
        groups = list(grouped(select(results, **DEFAULT_ROW | dict(own))).values())
        both.append(groups[0] if groups else [])
    seeds = sorted(set.intersection(*({r["seed"] for r in group} for group in both)))
    return (*difference_of(*both), seeds) if seeds else None


def _ratio(claim: Claim, speeds: Mapping[str, Any]) -> tuple[float, float, float, list[int]] | None:
    """How many times less the praised setting takes: median, least and most of the rounds."""
    if not {claim.better["name"], claim.than["name"]} <= speeds.keys():
        return None
    key = {"time": "ms", "memory": "mb"}[claim.measure or ""]
    less, more = (np.array(speeds[own["name"]][key]) for own in (claim.better, claim.than))
    ratios = np.atleast_1d(more / less)  # of each round
    return float(np.median(ratios)), float(ratios.min()), float(ratios.max()), []


def judge_all(results: Sequence[Result], folder: str | Path) -> list[Judged]:
    """Every claim of ``claims.yaml`` beside the folder of results, judged; none without that file.

    Raises:
        ValueError: the file is broken.
    """
    path = Path(folder).parent / "claims.yaml"
    if not path.exists():
        return []
    speeds = read_speeds(folder)
    return [judge(claim, results, speeds) for claim in read_claims(path)]


def claims_table(judged: Sequence[Judged]) -> str:
    """The claims as Markdown, with experiment, effect and verdict."""
    rows = []
    for one in judged:
        claim = one.claim
        verdict_ = one.verdict + (f" ({claim.remark})" if claim.remark else "")
        cells = [claim.claim, claim.method, _experiment(claim), _effect(one), verdict_]
        rows.append(cells)
    return markdown_table(["claim", "paper", "experiment", "effect [95 %]", "verdict"], rows)


def _experiment(claim: Claim) -> str:
    if claim.measure is None:
        return "-"
    a, b = (_words(own, claim.measure) for own in (claim.better, claim.than))
    return f"{MEASURES[claim.measure]}: {a} against {b}"


def _words(own: Mapping[str, Any], measure: str) -> str:
    """How the table names a setting."""
    if measure != "auroc":
        return own["name"]
    more = [str(own[key]) for key in ("training", "variant", "category") if own.get(key)]
    return ", ".join([METHOD_NAMES[own["method"]], *more])


def _effect(one: Judged) -> str:
    if one.effect is None:
        return "-"
    if one.claim.measure == "auroc":
        seeds = f"{len(one.seeds)} seed" + ("s" if len(one.seeds) > 1 else "")
        return f"{one.effect:+.3f} [{one.low:+.3f}, {one.high:+.3f}], {seeds}"
    return f"{one.effect:.1f} times [{one.low:.1f}, {one.high:.1f}]"
