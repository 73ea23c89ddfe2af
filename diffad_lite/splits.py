"""Splits: which normal images train, which calibrate, which are held out for the test.

An image's rank depends on the seed and its name alone, or, where it is known, on the name of its
subject: two slices of one patient are never on both sides. The cuts are made by rank, so images
near one can change sides when others are added.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffad_lite.source import Source

MIN_CALIBRATION = 8  # normal images taken for calibration, at least


def split(source: Source, split_seed: int) -> tuple[dict, dict, dict]:
    """Cut the normals into train, calibration and test, and add what the source fixed.

    Raises:
        ValueError: too few normal images, or a subject of the source's own test set is in training.
    """
    if not source.normals:
        raise ValueError("no normal images to train on")
    names = _rank(list(source.normals), split_seed, source.subjects)
    share_calibration, share_test = source.shares
    n_test = round(len(names) * share_test)
    n_calibration = 0 if source.calibration else round(len(names) * share_calibration)
    if not source.calibration:
        n_calibration = max(n_calibration, MIN_CALIBRATION)
    first = _whole(names, len(names) - n_calibration - n_test, source.subjects)
    second = _whole(names, len(names) - n_test, source.subjects)
    if first < 1:
        raise ValueError(
            f"{len(names)} normal images are too few: {n_calibration} are needed for calibration "
            f"and {n_test} for the test; add normal images (20 or more are advisable)"
        )
    parts = (names[:first], names[first:second], names[second:])
    train, calibration, held_out = ({n: source.normals[n] for n in sorted(p)} for p in parts)
    calibration, test = calibration | source.calibration, held_out | source.test
    subjects = source.subjects
    shared = {subjects[n] for n in [*train, *calibration] if n in subjects}
    if leaked := sorted(shared & {subjects[n] for n in test if n in subjects}):
        raise ValueError(
            f"{len(leaked)} subjects are in training or calibration and in the test as well, e.g. "
            f"{leaked[0]}; move all images of a subject to one side"
        )
    return train, calibration, test


def halves(calibration: Mapping[str, Any], split_seed: int) -> tuple[dict, dict]:
    """Calibration normals cut in two: one half stays, the other carries development defects."""
    names = _rank(list(calibration), split_seed + 1, {})
    half = len(names) // 2
    return {n: calibration[n] for n in names[:half]}, {n: calibration[n] for n in names[half:]}


def _rank(names: Sequence[str], split_seed: int, subjects: Mapping[str, str]) -> list[str]:
    """An order that depends on the seed and each name alone; subjects stay together."""

    def key(name: str) -> tuple[bytes, str]:
        own = f"{split_seed}/{subjects.get(name, name)}"
        return hashlib.sha256(own.encode()).digest(), name

    return sorted(names, key=key)


def _whole(names: Sequence[str], cut: int, subjects: Mapping[str, str]) -> int:
    """The last place at or before ``cut`` that parts no subject."""
    while 0 < cut < len(names) and (a := subjects.get(names[cut])) is not None:
        if a != subjects.get(names[cut - 1]):
            break
        cut -= 1
    return cut
