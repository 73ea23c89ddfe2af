"""Paper profiles beside what was published: every field has a source or a reason."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import published
import pytest
from published import find_entry, linked, published_settings, settings_table

from diffad_lite.core.config import field_names
from diffad_lite.methods import base
from diffad_lite.methods.base import METHODS

PROFILES = Path(base.__file__).parent / "profiles"
PAGES = Path(__file__).parents[1] / "docs" / "methods"


@pytest.mark.parametrize("name", METHODS)
def test_every_field_of_a_paper_profile_has_a_source_or_a_reason(name):
    settings = list(published_settings(name))
    config = METHODS[name].Config.for_profile("paper", channels=3, image_size=256)
    assert [s.field for s in settings] == field_names(config)
    for s in settings:
        assert s.source or s.reason, s.field
        assert s.published == s.ours or s.reason, s.field
        assert len(s.reason.split()) <= 25, s.field


def test_no_entry_is_left_over():
    """An entry names a field, a group, or a pattern of the fields of some method."""
    every = {
        field
        for method in METHODS.values()
        for field in field_names(method.Config.for_profile("paper", channels=3, image_size=256))
    }
    for path in PROFILES.glob("*.yaml"):
        for name, entry in base.read_profiles(path.stem).get("published", {}).items():
            known = name in every or any(f.startswith(f"{name}.") for f in every)
            known = known or any(fnmatchcase(f, name) for f in every)
            assert known, (path.name, name)
            assert entry and entry.keys() <= {"value", "source", "reason"}, (path.name, name)


@pytest.mark.parametrize("name", ["diffusionad", "glad", "mdps", "bernoulli", "anoddpm"])
def test_most_fields_have_a_source(name):
    settings = list(published_settings(name))
    assert sum(bool(s.source) for s in settings) > len(settings) / 2


def changed(monkeypatch, entries):
    """Replace what was published for PCA, whose configuration is short."""
    monkeypatch.setattr(published, "read_profiles", lambda _: {"published": entries})


def test_a_field_without_source_and_reason_is_an_error(monkeypatch):
    first, *others = field_names(METHODS["pca"].Config())
    changed(monkeypatch, {name: {"reason": "ours"} for name in others})
    with pytest.raises(ValueError, match=f"pca: {first} has neither a published source nor"):
        list(published_settings("pca"))


def test_another_value_than_the_published_needs_a_reason(monkeypatch):
    first, *others = field_names(METHODS["pca"].Config())
    known = {name: {"reason": "ours"} for name in others}
    changed(monkeypatch, known | {first: {"source": "a.py:1"}})
    with pytest.raises(ValueError, match=f"pca: {first} needs a published value with its source"):
        list(published_settings("pca"))
    changed(monkeypatch, known | {first: {"source": "a.py:1", "value": "other"}})
    with pytest.raises(ValueError, match=rf"pca: {first} is .*, published is other; why\?"):
        list(published_settings("pca"))
    reasoned = {"source": "a.py:1", "value": "other", "reason": "because"}
    changed(monkeypatch, known | {first: reasoned})
    assert next(published_settings("pca")).published == "other"


def test_the_nearest_entry_counts(monkeypatch):
    entries = {"a": {"reason": "1"}, "a.b": {"reason": "2"}, "*.d": {"reason": "3"}}
    changed(monkeypatch, entries)
    config = METHODS["pca"].Config
    reasons = [find_entry(config, name).get("reason") for name in ("a.b.c", "a.x", "z.d", "z")]
    assert reasons == ["2", "1", "3", None]
    changed(monkeypatch, entries | {"a.b.c": {"reason": "4"}})
    assert find_entry(config, "a.b.c")["reason"] == "4"


def test_a_class_counts_before_its_bases():
    """GLAD's denoiser is not that of AnoDDPM's paper, though its fields are."""
    assert (
        "Stable Diffusion" in find_entry(METHODS["glad"].Config, "denoiser.base_channels")["value"]
    )
    assert "args28" in find_entry(METHODS["anoddpm"].Config, "denoiser.base_channels")["source"]


def test_sources_lead_to_lines():
    profiles = {"repository": "owner/name@abc", "versions": {"c.py": "def", "d.py": "a/b@123"}}
    home = "https://github.com"
    assert linked("a/b.py:3", profiles) == f"[a/b.py:3]({home}/owner/name/blob/abc/a/b.py#L3)"
    assert linked("c.py:3", profiles) == f"[c.py:3]({home}/owner/name/blob/def/c.py#L3)"
    assert linked("d.py", profiles) == f"[d.py]({home}/a/b/blob/123/d.py)"
    assert linked("section 3.2, eq. 7", profiles) == "section 3.2, eq. 7"
    assert linked("a/b.py:3", {}) == "a/b.py:3"


@pytest.mark.parametrize("name", METHODS)
def test_a_table_has_a_row_for_each_field(name):
    lines = settings_table(name).splitlines()
    assert len(lines) == 2 + len(list(published_settings(name)))
    assert {line.count("|") for line in lines} == {6}


def test_every_method_has_its_table_on_a_page():
    shown = set()
    for page in PAGES.glob("*.md"):
        shown |= set(re.findall(r"```{paper-profile}\n(\w+)\n```", page.read_text()))
    assert shown == set(METHODS)


def test_sources_in_files_name_their_repository():
    for path in PROFILES.glob("*.yaml"):
        profiles = base.read_profiles(path.stem)
        sources = [e["source"] for e in profiles.get("published", {}).values() if "source" in e]
        assert "repository" in profiles or not sources, path.name
        files = {source.partition(":")[0] for source in sources}
        assert set(profiles.get("versions", {})) <= files, path.name
