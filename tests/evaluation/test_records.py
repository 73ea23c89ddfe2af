"""Records in few files: one per line, with their scores, looked up by content, beside them."""

import json
import shutil
import warnings

import numpy as np
import pytest

from diffad_lite.evaluation import records
from diffad_lite.evaluation.records import collect, read_results, read_score_table, read_scores

SCORES = "id,label,defect_type,image_score\ngood/a,0,good,{}\nhole/b,1,hole,0.75\n"


def record(**changes):
    words = {"method": "pca", "dataset": "shapes", "category": "disc", "resize": "squash"}
    words |= {"profile": "ci", "variant": "default", "training": "", "plant": None, "seed": 0}
    words |= dict.fromkeys(records.NUMBERS, 0.5) | dict.fromkeys(records.PIXEL_METRICS)
    more = {"image_size": 64, "config": {"calibrate": True}, "per_defect": {}}
    return words | more | changes


def write_run(folder, score=0.25, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(record(**changes)))
    (folder / "scores.csv").write_text(SCORES.format(score))


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1, 10):
        write_run(tmp_path / "runs" / "pca" / f"s{seed}" / "default", 0.1 * seed, seed=seed)
    return tmp_path / "runs"


def test_what_is_collected_is_what_was_recorded(runs, tmp_path):
    results = tmp_path / "results"
    assert collect(runs, results, "grid") == 3
    assert sorted(p.name for p in results.iterdir()) == ["grid-scores.npz", "grid.jsonl"]
    ours, theirs = read_results(runs), read_results(results)
    assert [r["name"] for r in theirs] == [f"pca/s{seed}/default" for seed in (0, 1, 10)]
    for a, b in zip(ours, theirs, strict=True):
        assert all(b[key] == value for key, value in a.items() if key != "file")
        for expected, collected in zip(read_scores(a), read_scores(b), strict=True):
            np.testing.assert_array_equal(expected, collected)
        assert read_score_table(b).id.tolist() == ["good/a", "hole/b"]
        assert read_score_table(b).defect_type.tolist() == ["good", "hole"]


def test_collecting_again_changes_no_byte(runs, tmp_path):
    results = tmp_path / "results"
    collect(runs, results, "grid")
    before = {p.name: p.read_bytes() for p in results.iterdir()}
    collect(runs, results, "grid")
    assert {p.name: p.read_bytes() for p in results.iterdir()} == before


def test_a_run_made_again_takes_its_old_place(runs, tmp_path):
    results, again = tmp_path / "results", tmp_path / "again"
    collect(runs, results, "grid")
    write_run(again / "pca" / "s1" / "default", 0.9, seed=1, image_auroc=0.125)
    write_run(again / "pca" / "s2" / "default", 0.8, seed=2)
    assert collect(again, results, "more") == 2
    by_name = {r["name"]: r for r in read_results(results)}
    assert by_name["pca/s1/default"]["file"].name == "grid.jsonl"
    assert by_name["pca/s1/default"]["image_auroc"] == 0.125
    assert by_name["pca/s2/default"]["file"].name == "more.jsonl"
    assert read_scores(by_name["pca/s1/default"])[1][0] == 0.9
    assert read_scores(by_name["pca/s0/default"])[1][0] == 0.0
    kept = np.load(results / "grid-scores.npz").files
    assert sum(key.startswith("image_score/") for key in kept) == 3  # the replaced ones are gone
    assert sum(key.startswith("id/") for key in kept) == 1  # shared by all


def test_a_line_may_be_appended_and_the_last_counts(runs, tmp_path):
    results = tmp_path / "results"
    collect(runs, results, "grid")
    path = results / "grid.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps(first | {"image_auroc": 0.75}) + "\n")
    assert [r["image_auroc"] for r in read_results(results)] == [0.75, 0.5, 0.5]


def test_a_last_line_that_is_cut_short_is_left_out_and_said(runs, tmp_path):
    results = tmp_path / "results"
    collect(runs, results, "grid")
    path = results / "grid.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    with pytest.warns(UserWarning, match=r"line 3 of .*grid\.jsonl is truncated and skipped"):
        assert len(read_results(results)) == 2
    path.write_text("{" + text)
    with pytest.raises(ValueError, match=r"line 1 of .*grid\.jsonl is not JSON .*; delete it"):
        read_results(results)


def test_scores_never_belong_to_another_record(runs, tmp_path):
    """As after an interruption between the two files: either the right scores, or an error."""
    results, old = tmp_path / "results", tmp_path / "old"
    collect(runs, results, "grid")
    shutil.copytree(results, old)
    write_run(runs / "pca" / "s1" / "default", 0.9, seed=1)
    collect(runs, results, "grid")
    shutil.copy(results / "grid-scores.npz", old)  # scores are written first, then records
    by_seed = {r["seed"]: r for r in read_results(old)}
    assert read_scores(by_seed[0])[1][0] == 0.0
    with pytest.raises(ValueError, match="lacks the scores of pca/s1/default; collect that run"):
        read_scores(by_seed[1])


def test_one_name_in_two_files_is_refused(runs, tmp_path):
    results = tmp_path / "results"
    collect(runs, results, "grid")
    shutil.copy(results / "grid.jsonl", results / "other.jsonl")
    with pytest.raises(ValueError, match=r"both hold pca/s0/default; remove one of them"):
        read_results(results)


@pytest.mark.parametrize(
    "content", [None, b"", b"PK\x03\x04 no archive"], ids=["gone", "empty", "odd"]
)
def test_an_archive_that_is_missing_or_broken_is_named(runs, tmp_path, content):
    results = tmp_path / "results"
    collect(runs, results, "grid")
    path = results / "grid-scores.npz"
    path.unlink() if content is None else path.write_bytes(content)
    error = FileNotFoundError if content is None else ValueError
    with pytest.raises(error, match=r"grid-scores\.npz"):
        read_scores(read_results(results)[0])


def test_a_run_in_a_folder_of_records_is_refused_where_both_have_it(runs, tmp_path):
    results = tmp_path / "results"
    collect(runs, results, "grid")
    write_run(results / "pca" / "s0" / "default", 0.5)
    with pytest.raises(
        ValueError, match=r"result\.json and .*grid\.jsonl both hold pca/s0/default"
    ):
        read_results(results)
    assert collect(runs, results, "grid") == 3  # they are taken from the runs alone


def test_a_line_that_lacks_something_is_named(tmp_path):
    (tmp_path / "grid.jsonl").write_text(json.dumps({"name": "a", "image_auroc": 0.5}) + "\n")
    with pytest.raises(
        ValueError, match=r"line 1 of .*grid\.jsonl is incomplete; collect .* lacks"
    ):
        read_results(tmp_path)
    (tmp_path / "grid.jsonl").write_text(json.dumps({"name": "a"} | record()) + "\n")
    with pytest.raises(
        ValueError, match=r"line 1 of .*grid\.jsonl is incomplete.* lacks 'test_set'"
    ):
        read_results(tmp_path)
    (tmp_path / "grid.jsonl").write_text(json.dumps(record()) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .* has no name"):
        read_results(tmp_path)


def test_the_committed_records_are_few_files_without_warnings():
    from diffad_lite.core.files import data_dir

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = read_results(data_dir() / "results")
    assert len(results) > 300
    for result in results:
        labels, scores = read_scores(result)
        assert len(labels) == len(scores) == result["n_test"]
