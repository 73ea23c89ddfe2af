"""Tables of results: from records to Markdown."""

from diffad_lite.evaluation.tables import pixel_table


def test_a_kind_of_defect_without_masks_has_a_dash():
    numbers = dict.fromkeys(("image_auroc", "pixel_auroc", "pixel_ap", "aupro"), 0.5)
    words = {"method": "pca", "variant": "default", "image_size": 64, "training": "", "seed": 0}
    words |= {"profile": "ci", "resize": "squash", "config": {"calibrate": True}}
    kinds = {"crack": {"aupro": 0.25}, "spot": {"aupro": None}}
    table = pixel_table([words | numbers | {"per_defect": kinds}])
    assert table.endswith("| 0.500 | 0.250 | - |")
