"""Tables of results: from records to Markdown."""

import pytest

from diffad_lite.evaluation.tables import detail_table, image_table, pixel_table, tables

BASE = {"method": "pca", "variant": "default", "image_size": 64, "training": "", "seed": 0}
BASE |= {"profile": "ci", "resize": "squash", "config": {"calibrate": True}, "per_defect": {}}
BASE |= {"dataset": "elpv", "category": "mono", "plant": "cells", "image_auroc": 0.5}
NEWER = ("aupro_05", "aupimo", "pixel_f1_at_normal_threshold", "psnr_normal", "remaining_contrast")
PIXELS = dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro", "dice_oracle"), 0.5)


def test_a_kind_of_defect_without_masks_has_a_dash():
    numbers = dict.fromkeys(("image_auroc", "pixel_auroc", "pixel_ap", "aupro"), 0.5)
    words = {"method": "pca", "variant": "default", "image_size": 64, "training": "", "seed": 0}
    words |= {"profile": "ci", "resize": "squash", "config": {"calibrate": True}}
    kinds = {"crack": {"aupro": 0.25}, "spot": {"aupro": None}}
    table = pixel_table([words | numbers | {"per_defect": kinds}])
    assert table.endswith("| 0.500 | 0.250 | - |")


def test_details_are_those_of_the_runs_that_have_them():
    older = BASE | PIXELS | dict.fromkeys(NEWER)
    assert detail_table([older]) == ""
    newer = older | {"seed": 1, "aupro_05": 0.625, "psnr_normal": 31.26}
    head, _, row = detail_table([older, newer]).splitlines()
    assert head.endswith("| PSNR, normal images | remaining contrast |")
    assert row == "| PCA residual, calibrated | 1 | 0.625 | - | - | 31.3 dB | - |"
    planted = newer | {"aupimo": 0.5, "remaining_contrast": 0.254}
    planted["per_defect"] = {"crack": {"remaining_contrast": 0.1}, "spot": {}}
    head, _, row = detail_table([planted]).splitlines()
    assert head.endswith("| remaining contrast | of crack | of spot |")
    assert row.endswith("| 0.500 | - | 31.3 dB | 0.25 | 0.10 | - |")


def test_false_alarms_have_their_interval_where_every_record_has_one():
    numbers = ("image_ap", "f1_at_normal_threshold", "false_alarms_at_normal_threshold")
    numbers += ("train_seconds", "ms_per_image", "network_evaluations_per_image")
    record = BASE | dict.fromkeys(numbers, 0.04)

    def cell(*intervals):
        runs = [record | {"seed": i, "false_alarms_ci": ci} for i, ci in enumerate(intervals)]
        return image_table(runs).splitlines()[-1].split(" | ")[5]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffad_lite.evaluation.tables.auroc_over_seeds", lambda g: (0.5, 0.4, 0.6))
        assert cell([0.01, 0.1]) == "4 % [1, 10]"
        assert cell([0.01, 0.1], [0.0, 0.08]) == "4 % [0, 10]"
        assert cell([0.01, 0.1], None) == "4 %"


def test_ablations_on_planted_defects_have_a_table_of_their_own():
    default = BASE | PIXELS | dict.fromkeys(NEWER, 0.25)
    ablated = default | {"variant": "few", "remaining_contrast": 0.75}
    trained = default | {"training": "short", "psnr_normal": None}
    rendered = tables([default, ablated, trained, default | {"method": "bank"}])
    assert len(rendered["elpv-mono-cells"].splitlines()) == 4, "PCA and the bank"
    assert len(rendered["elpv-mono-cells-details"].splitlines()) == 4
    rows = rendered["elpv-mono-cells-ablation"].splitlines()[2:]
    end = "| 0 | 0.500 | 0.500 | 0.500 | 0.500 |"
    assert rows == [
        f"| PCA residual | - {end} 0.2 dB | 0.25 |",
        f"| PCA residual | short {end} - | 0.25 |",
        f"| PCA residual | few {end} 0.2 dB | 0.75 |",
    ]
