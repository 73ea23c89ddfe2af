"""Configurations: frozen dataclasses, validated by pydantic; JSON, overrides, fingerprints.

The range of a field stands in its type, as ``noise_level: Timestep``.
"""

import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
Profile = typing.Literal["ci", "lite", "paper"]

# Types of fields. Bounds that depend on another field are checked in ``__post_init__``.
Count = Annotated[int, Field(ge=1, le=10**9)]
Size = Annotated[int, Field(ge=1, le=10**6)]  # of what is allocated at once
Timestep = Annotated[int, Field(ge=0)]  # 0 .. T-1
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Widths = Annotated[tuple[Size, ...], Field(min_length=1)]  # multiples of the base width, per level
WORDS = {  # pydantic's words -> ours, in error messages
    "Input should": "must",
    "Tuple should have at least 1 item after validation, not 0": "must not be empty",
    "an object": "a mapping",
    "a valid array": "a list",
    "a valid tuple": "a tuple",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
RULES = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 120, 120, 60


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def configuration(cls: type[Config]) -> type[Config]:
    """Make a class a frozen dataclass whose fields are validated, strictly, by their types.

    An invalid value raises ValueError; the message names the field, the expected and the actual
    value.
    """
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=RULES)(cls)
    build: Callable[..., None] = made.__init__

    @functools.wraps(build)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            build(self, *args, **kwargs)
        except ValidationError as error:
            raise _explained(error, cls.__qualname__, cls) from None

    made.__init__ = __init__
    # Signatures with plain types, for help() and the reference: noise_level: int = 25.
    types = typing.get_type_hints(made)
    signature = inspect.signature(build)
    plain = [p.replace(annotation=types.get(p.name, Any)) for p in signature.parameters.values()]
    made.__signature__ = signature.replace(parameters=plain)
    return made


def strict_integer(value: Any) -> Any:
    """Refuse booleans and floats where a ``Literal`` of integers is expected, as 1 == True."""
    if type(value) is not int:
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value


def short_repr(value: Any) -> str:
    """``repr`` for messages: short, whatever the value is."""
    try:
        text = _short.repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def unknown_name(what: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that does not exist, with the nearest one that does.

    Capital and small letters count as equal in the search for the nearest.
    """
    known = sorted(known)
    small = {text.lower(): text for text in known}
    near = difflib.get_close_matches(name.lower(), small, n=1)
    hint = f"did you mean {small[near[0]]!r}? " if near else ""
    return ValueError(f"unknown {what} {short_repr(name)}; {hint}known: {', '.join(known)}")


def check_profile(profile: str) -> None:
    """Raise ValueError for a profile that does not exist."""
    if profile not in typing.get_args(Profile):
        raise unknown_name("profile", str(profile), typing.get_args(Profile))


def check_at_most(config: Any, **limits: float) -> None:
    """Check fields against limits that depend on other fields.

    Raises:
        ValueError: a field exceeds its limit.
    """
    for name, limit in limits.items():
        if (value := getattr(config, name)) > limit:
            where = f"{type(config).__qualname__}.{name}"
            raise ValueError(f"{where} must be at most {limit}, got {short_repr(value)}")


def check_exactly_one(config: Any) -> None:
    """Check that one of the class's ``alternatives``, fields that say the same, is not None.

    :func:`override` and :func:`with_values` set the others to None where they set one.

    Raises:
        ValueError: none of them is set, or more than one.
    """
    names = type(config).alternatives
    values = {name: value for name in names if (value := getattr(config, name)) is not None}
    if len(values) != 1:
        where, fields = type(config).__qualname__, " or ".join(names)
        got = short_repr(values) if values else "none"
        raise ValueError(f"{where} must have {fields}, got {got}; set one, and the rest to None")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested dictionaries of JSON types.

    Tuples become lists. JSON has no infinity; a field that may be infinite is the text "Infinity".
    """
    return json.loads(json.dumps(dataclasses.asdict(config)), parse_constant=str)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from nested dictionaries: the inverse of :func:`to_dict`.

    Raises:
        ValueError: a key that ``cls`` does not have, or a value that does not fit its field.
    """
    return convert(values, cls, cls.__qualname__)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Fit a JSON value to a type: a configuration, or anything that pydantic knows.

    Raises:
        ValueError: the value does not match the type; the message begins with ``where``.
    """
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # for example a date or a huge integer
        raise ValueError(f"{where} must be a JSON value, got {short_repr(value)}") from None
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise _explained(error, where, kind) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    is_configuration = dataclasses.is_dataclass(kind)  # which carries its rules
    return TypeAdapter(kind, config=None if is_configuration else RULES)


def _explained(error: ValidationError, where: str, kind: Any) -> ValueError:
    """Return the first validation error as "<where> must be <expected>, got <actual>"."""
    fault = error.errors(include_url=False)[0]
    *path, name = ["", *fault["loc"]]
    if fault["type"] == "value_error":
        return fault["ctx"]["error"]  # raised by a ``__post_init__``
    if fault["type"] == "json_invalid":
        return ValueError(f"{where} has values that are nested too deeply, or not text")
    if fault["type"] == "unexpected_keyword_argument":
        for part in path[1:]:
            kind = typing.get_type_hints(kind).get(part)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            known = [field.name for field in dataclasses.fields(kind)]
            return unknown_name(f"{kind.__qualname__} field", str(name), known)
    place = ".".join([where, *(short_repr(part).strip("'") for part in fault["loc"])])
    message = fault["msg"]
    for theirs, ours in WORDS.items():
        message = message.replace(theirs, ours)
    return ValueError(f"{place} {message}, got {short_repr(fault['input'])}")


def override(config: Config, assignments: Mapping[str, str]) -> Config:
    """Return a copy with some fields replaced, e.g. by ``--set denoiser.train.steps=100``.

    Args:
        config: any configuration.
        assignments: dotted field name -> value as JSON; a bare word is taken as a string.

    Raises:
        ValueError: an unknown field, or a value that does not fit it.
    """
    values: dict[str, Any] = {}
    for dotted, text in assignments.items():
        try:
            values[dotted] = json.loads(text)
        except (ValueError, RecursionError):
            values[dotted] = text
    return with_values(config, values)


def with_values(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a copy with some fields replaced: dotted field name -> JSON value.

    Of fields that say the same in different ways, such as ``steps`` and ``epochs``, the one that is
    set takes the place of the others.

    Raises:
        ValueError: an unknown field, or a value that does not fit it.
    """
    values = to_dict(config)
    for dotted, value in changes.items():
        *groups, name = dotted.split(".")
        node = values
        for group in groups:
            if not isinstance(node.get(group), dict):
                raise unknown_name("field", dotted, flatten(values))
            node = node[group]
        if isinstance(node.get(name), dict):
            fields = ", ".join(f"{dotted}.{field}" for field in flatten(node[name]))
            raise ValueError(f"{dotted} is a group of fields; set one of them: {fields}")
        if name not in node:
            raise unknown_name("field", dotted, flatten(values))
        node[name] = value
        owner = functools.reduce(getattr, groups, config)
        alternatives = getattr(type(owner), "alternatives", ())
        if value is not None and name in alternatives:
            prefix = dotted.removesuffix(name)
            for other in set(alternatives) - {name}:
                if changes.get(prefix + other) is None:
                    node[other] = None
    return from_dict(type(config), values)


def field_names(config: Any) -> list[str]:
    """Return the dotted names of all fields."""
    return list(flatten(to_dict(config)))


def changed_fields(a: Any, b: Any) -> set[str]:
    """Return the dotted names of the fields in which two configurations differ."""
    return changed_values(to_dict(a), to_dict(b))


def changed_values(a: Mapping[str, Any], b: Mapping[str, Any]) -> set[str]:
    """Return the dotted names of the values in which two nested dictionaries differ."""
    flat_a, flat_b = flatten(a), flatten(b)
    return {name for name in flat_a.keys() | flat_b.keys() if flat_a.get(name) != flat_b.get(name)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one: dotted name -> value."""
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def config_hash(values: Mapping[str, Any]) -> str:
    """Return twelve hex digits that identify nested JSON values, whatever the order of keys."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
