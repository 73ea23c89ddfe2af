"""Configurations are frozen dataclasses; here is their JSON form, overrides and fingerprints."""

import dataclasses
import difflib
import hashlib
import json
import math
import reprlib
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Profile = typing.Literal["ci", "lite", "paper"]
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 120, 120, 60


def short_repr(value: Any) -> str:
    """``repr`` for messages: short, whatever the value is."""
    try:
        text = _short.repr(value)
    except ValueError:  # numbers of thousands of digits have no decimal form
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {what} {short_repr(name)}; {hint}known: {', '.join(known)}")


def check_profile(profile: str) -> None:
    """Raise ValueError for a profile that does not exist."""
    if profile not in typing.get_args(Profile):
        raise unknown_name("profile", str(profile), typing.get_args(Profile))


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries of JSON types (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The inverse of :func:`to_dict`.

    Raises:
        ValueError: a key that ``cls`` does not have, or a value that does not fit its field.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__qualname__} must be a mapping, got {short_repr(values)}")
    types = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"{cls.__qualname__} field", key, known)
        kwargs[key] = convert(value, types[key], f"{cls.__qualname__}.{key}")
    return cls(**kwargs)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Fit a JSON value to a type: dataclass, tuple, mapping, literal, optional, scalar, any.

    Raises:
        ValueError: it does not fit; the message begins with ``where``.
    """
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} has fields of its own, got {short_repr(value)}")
        return from_dict(kind, value)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {short_repr(value)}")
        return tuple(convert(v, args[0], where) for v in value)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {short_repr(value)}")
        for name, inner in value.items():
            convert(name, args[0], f"a name in {where}")
            convert(inner, args[1], f"{where}.{name:.100}")
        return value
    if origin is typing.Literal:
        if value in args:
            return value
        known = ", ".join(map(repr, args))
        raise ValueError(f"{where} must be one of {known}, got {short_repr(value)}")
    if type(None) in args:
        if value is None:
            return None
        kind = next(a for a in args if a is not type(None))
        return convert(value, kind, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if isinstance(kind, type) and type(value) is not kind:
        raise ValueError(f"{where} must be of type {kind.__name__}, got {short_repr(value)}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    return value


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """Check that the named fields of a dataclass lie in their ranges, both ends included.

    Raises:
        ValueError: one does not.
    """
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:
            wanted = f"at least {low}" if high == math.inf else f"in {low}..{high}"
            where = f"{type(config).__qualname__}.{name}"
            raise ValueError(f"{where} must be {wanted}, got {short_repr(value)}")


def override(config: Config, assignments: Mapping[str, str]) -> Config:
    """A copy with some fields replaced, as by ``--set train.steps=100``.

    Args:
        config: any dataclass.
        assignments: dotted field name -> value as JSON; a bare word is taken as a string.

    Raises:
        ValueError: an unknown field, or a value that does not fit it.
    """
    values = to_dict(config)
    for dotted, text in assignments.items():
        *path, last = dotted.split(".")
        node = values
        for name in path:
            if not isinstance(node.get(name), dict):
                raise unknown_name("field", dotted, _dotted_names(values))
            node = node[name]
        if last not in node or isinstance(node[last], dict):
            raise unknown_name("field", dotted, _dotted_names(values))
        try:
            node[last] = json.loads(text)
        except (ValueError, RecursionError):
            node[last] = text
    return from_dict(type(config), values)


def changed_fields(a: Any, b: Any) -> set[str]:
    """Dotted names of the fields in which two configurations differ."""
    flat_a, flat_b = _flatten(to_dict(a)), _flatten(to_dict(b))
    return {name for name in flat_a.keys() | flat_b.keys() if flat_a.get(name) != flat_b.get(name)}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat.update(_flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def _dotted_names(values: Mapping[str, Any]) -> list[str]:
    return list(_flatten(values))


def config_hash(values: Mapping[str, Any]) -> str:
    """Twelve hex digits that identify nested JSON values, whatever their order."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
