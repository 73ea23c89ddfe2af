"""The fields of a paper profile beside what was published, and where it stands.

A file ``profiles/<name>.yaml`` has, besides the values of the profiles, ``published``: field or
group of fields -> ``value`` and ``source`` (file and line, or an equation), and the ``reason``
where ours differs, or where nothing was published. Files are those of ``repository``,
"owner/name@commit"; ``versions`` names the commit of a file that was read in another version, or in
a copy of the repository.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from diffad_lite.core.config import flatten, to_dict
from diffad_lite.methods.base import get_method, read_profiles

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One field of a paper profile.

    Attributes:
        field: dotted name.
        ours: its value, as JSON.
        published: the published value; None where nothing was published, or nothing could be read.
        source: where it stands, as Markdown; empty if nowhere.
        reason: why ours differs, or what ours is where nothing was published; else empty.
    """

    field: str
    ours: Any
    published: Any
    source: str
    reason: str


def published_settings(method: str) -> Iterator[Setting]:
    """Yield every field of a method's paper profile, for the bottles of MVTec AD.

    Raises:
        ValueError: unknown method; a field with neither source nor reason, a source without a
            value, or another value than the published one without a reason.
    """
    config = get_method(method).Config.for_profile(
        "paper", channels=3, image_size=256, dataset="folder", category="bottle"
    )
    for field, ours in flatten(to_dict(config)).items():
        entry = find_entry(type(config), field)
        source, reason = entry.get("source", ""), entry.get("reason", "")
        published = entry.get("value")
        if not source and not reason:
            raise ValueError(f"{method}: {field} has neither a published source nor a reason")
        if bool(source) != ("value" in entry):
            raise ValueError(f"{method}: {field} needs a published value with its source, or none")
        if source and published != ours and not reason:
            raise ValueError(f"{method}: {field} is {ours}, published is {published}; why?")
        yield Setting(field, ours, published, source, reason)


def find_entry(config: type, field: str) -> Entry:
    """Return the entry of a field, its source as a link; {} for none.

    A class counts before its bases; in its file, the field before its smallest group.
    """
    for base in config.__mro__:
        if file := vars(base).get("profiles"):
            profiles = read_profiles(file)
            entries = profiles.get("published", {})
            groups = [name for name in entries if field.startswith(f"{name}.")]
            patterns = [name for name in entries if fnmatchcase(field, name)]
            for name in [field, *sorted(groups, key=len, reverse=True), *patterns]:
                if name in entries:
                    entry = entries[name]
                    return entry | {"source": linked(entry.get("source", ""), profiles)}
    return {}


def linked(source: str, profiles: Mapping[str, Any]) -> str:
    """Return "file:line" as a link into the repository of a file of profiles; else the text."""
    match = re.fullmatch(r"([\w./-]+?)(?::(\d+))?", source)
    if not match or "repository" not in profiles:
        return source
    path, line = match.groups()
    version = str(profiles.get("versions", {}).get(path, profiles["repository"]))
    home, _, commit = profiles["repository"].partition("@")
    if "@" in version:
        home, _, commit = version.partition("@")
    else:
        commit = version
    anchor = f"#L{line}" if line else ""
    return f"[{source}](https://github.com/{home}/blob/{commit}/{path}{anchor})"


def settings_table(method: str) -> str:
    """Return the settings of a method as a Markdown table."""
    lines = ["| field | published | source | ours | reason |", "| --- | --- | --- | --- | --- |"]
    for s in published_settings(method):
        published = shown(s.published) if s.source else ""
        cells = f"`{s.field}`", published, s.source, shown(s.ours), s.reason
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return a value for a table: text as it is, all else as JSON; "none" for None."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) and value else json.dumps(value)
