"""Numbers of a run: what a record says equals the metrics of its maps and reconstructions."""

import json

import numpy as np
import pytest
import torch

from diffad_lite.core.files import read_json
from diffad_lite.data import load_dataset
from diffad_lite.evaluation import metrics, records
from diffad_lite.experiments.evaluate import evaluate
from diffad_lite.experiments.quality import map_at_original_size, measure_quality
from diffad_lite.experiments.run import Run
from diffad_lite.methods.base import Prediction

SIZE = 32


@pytest.fixture(scope="module")
def data():
    return load_dataset("shapes", image_size=SIZE, plant="cells").subset(40)


def predict(data, weight):
    """A detector of our own: reconstructs a mixture of the clean image and its input."""
    rng = torch.Generator().manual_seed(0)
    reconstruction = data.clean_images + weight * (data.test_images - data.clean_images)
    reconstruction = reconstruction + 0.02 * torch.randn(reconstruction.shape, generator=rng)
    maps = (data.test_images - reconstruction).abs().mean(1)
    return Prediction(maps.amax((1, 2)), maps, reconstruction)


def test_a_record_has_the_metrics_of_its_maps(data):
    prediction = predict(data, 0.3)
    quality, measures = measure_quality(data, prediction, 0.2, 0.05)
    n = len(data.test_labels)
    maps = [map_at_original_size(data, prediction.anomaly_map, i) for i in range(n)]
    masks, anomalous = data.test_masks, data.test_labels == 1
    assert quality["aupro_05"] == metrics.aupro(masks, maps, 0.05)
    assert quality["pixel_f1_at_normal_threshold"] == metrics.pixel_f1_at_threshold(
        masks, maps, 0.05
    )
    normal_scores = prediction.image_score[~anomalous].numpy()
    rate, *interval = metrics.false_alarm_rate(normal_scores, 0.2)
    assert quality["false_alarms_at_normal_threshold"] == rate
    assert quality["false_alarms_ci"] == interval
    errors = (data.test_images - prediction.reconstruction).square().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(measures["squared_error"], errors, rtol=1e-5)
    assert quality["psnr_normal"] == pytest.approx(
        10 * np.log10(4 / errors[~anomalous].mean()), abs=1e-4
    )
    assert np.isnan(measures["remaining_contrast"][~anomalous]).all()
    assert quality["remaining_contrast"] == pytest.approx(0.3, abs=0.05)
    assert json.loads(json.dumps(quality, allow_nan=False)) == quality


def test_values_of_kinds_average_to_those_of_all(data):
    quality, measures = measure_quality(data, predict(data, 0.6), 0.2, 0.05)
    kinds = quality["per_defect"].values()
    with_defect = ~np.isnan(measures["remaining_contrast"])
    total = sum(kind["remaining_contrast"] * kind["n"] for kind in kinds)
    assert total / with_defect.sum() == pytest.approx(quality["remaining_contrast"])
    assert quality["aupimo"] is None, "20 images of 64 x 64 pixels do not resolve a rate of 1e-5"
    assert "aupimo" not in measures


def test_aupimo_is_that_of_enough_pixels(data):
    maps = predict(data, 0.3)
    quality, measures = measure_quality(
        data.__class__(**{**vars(data), **enlarged(data)}), maps, 0.2, 0.05
    )
    assert 0 < quality["aupimo"] <= 1
    anomalous = data.test_labels == 1
    assert measures["aupimo"][anomalous].mean() == pytest.approx(quality["aupimo"])
    assert np.isnan(measures["aupimo"][~anomalous]).all()


def enlarged(data, factor=4):
    masks = [np.kron(mask, np.ones((factor, factor), bool)) for mask in data.test_masks]
    return {"test_masks": masks, "original_sizes": [mask.shape for mask in masks]}


def test_without_reconstruction_or_masks_there_is_none(data):
    prediction = predict(data, 0.3)
    prediction.reconstruction = None
    quality, measures = measure_quality(data, prediction, 0.2, None)
    assert quality["psnr_normal"] is quality["remaining_contrast"] is None
    assert quality["pixel_f1_at_normal_threshold"] is quality["pixel_threshold"] is None
    assert not {"squared_error", "remaining_contrast"} & measures.keys()
    plain = load_dataset("elpv", image_size=16).subset(8)
    maps = plain.test_images.abs().mean(1)
    quality, measures = measure_quality(
        plain, Prediction(maps.amax((1, 2)), maps, plain.test_images), 0.5, 0.5
    )
    assert [quality[name] for name in records.PIXEL_METRICS] == [None] * 4
    assert quality["aupro_05"] is quality["aupimo"] is None
    assert quality["psnr_normal"] is None, "exact copies have no finite PSNR"
    assert measures.keys() == {"squared_error"}


def test_the_clean_image_of_a_planted_one_is_among_the_normal_ones(data):
    index = {name.split("/")[1]: i for i, name in enumerate(data.test_ids) if "good/" in name}
    for i, name in enumerate(data.test_ids):
        twin = index.get(name.split("/")[1])
        if twin is not None:
            assert torch.equal(data.clean_images[i], data.test_images[twin])
    changed = (data.clean_images != data.test_images).flatten(1).any(1).numpy()
    assert changed.tolist() == (data.test_labels == 1).tolist()
    assert load_dataset("shapes", image_size=16).clean_images is None


def loop_over_resampled_images(a, b, quantity, label):
    """The interval of a difference over the images of one class, with the draws of the package."""
    name = records.MEASURE_OF[quantity]
    labels = records.read_scores(a)[0]
    values = [records.read_measures(r)[name][labels == label].astype(float) for r in (a, b)]
    n, rng, differences = len(values[0]), np.random.default_rng(0), []
    for counts in rng.multinomial(n, np.full(n, 1 / n), size=1000):
        means = [np.repeat(v, counts).mean() for v in values]
        if quantity == "psnr_normal":
            means = [10 * np.log10(4 / mean) for mean in means]
        else:
            means = [abs(mean) for mean in means]
        differences.append(means[0] - means[1])
    return np.quantile(differences, [0.025, 0.975])


def test_differences_of_every_quantity_are_paired(tmp_path):
    """The values per image give the recorded difference, and an interval around it."""
    groups = {}
    for name, settings in {"few": {"n_components": "4"}, "many": {"n_components": "60"}}.items():
        run = Run("pca", "shapes", image_size=SIZE, plant="cells", variant=name, settings=settings)
        evaluate(run, tmp_path / "runs" / name, progress=False)
    for folder in (tmp_path / "runs", tmp_path / "collected"):
        if folder.name == "collected":
            assert records.collect(tmp_path / "runs", folder, "grid") == 2
        for result in records.read_results(folder):
            groups[result["variant"]] = [result]
        for quantity in ("image_auroc", *records.MEASURE_OF):
            few, many = groups["few"], groups["many"]
            effect, low, high = records.difference_of(many, few, quantity)
            assert effect == pytest.approx(many[0][quantity] - few[0][quantity])
            assert low <= effect <= high
            assert low < high
            assert records.difference_of(few, few, quantity) == (0, 0, 0)
            back = records.difference_of(few, many, quantity)
            np.testing.assert_allclose(back, (-effect, -high, -low), atol=1e-9)
        for quantity, label in (("psnr_normal", 0), ("remaining_contrast", 1)):
            ends = records.difference_of(many, few, quantity)[1:]
            expected = loop_over_resampled_images(many[0], few[0], quantity, label)
            np.testing.assert_allclose(ends, expected, atol=1e-6)
        effect, low, high = records.difference_of(few, many, "remaining_contrast")
        assert high < 0, "four components rebuild less of a defect than sixty"


def test_differences_need_the_same_images(tmp_path):
    for plant in ("cells", "lesions"):
        evaluate(Run("pca", "shapes", image_size=16, plant=plant), tmp_path / plant, progress=False)
    a, b = ([r] for r in records.read_results(tmp_path))
    for quantity in ("image_auroc", "psnr_normal"):
        with pytest.raises(ValueError, match="did not score the same test images"):
            records.difference_of(a, b, quantity)


def test_a_record_of_an_older_run_has_no_values_per_image(tmp_path):
    run = Run("pca", "shapes", image_size=16, plant="cells")
    evaluate(run, tmp_path / "run", progress=False)
    rows = [line.split(",")[:4] for line in (tmp_path / "run" / "scores.csv").read_text().split()]
    (tmp_path / "run" / "scores.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    path = tmp_path / "run" / "result.json"
    kept = {k: v for k, v in read_json(path, "result").items() if k not in records.NEWER_TYPES}
    path.write_text(json.dumps(kept))
    for folder in (tmp_path, tmp_path / "collected"):
        if folder != tmp_path:
            records.collect(tmp_path, folder, "grid")
            assert records.read_results(folder)[0]["measures"] is None
        (record,) = [r for r in records.read_results(folder) if r["name"] == "run"]
        assert record["psnr_normal"] is record["aupro_05"] is record["false_alarms_ci"] is None
        assert records.read_measures(record) == {}
        with pytest.raises(ValueError, match="run has no values per image of pixel_ap"):
            records.difference_of([record], [record], "pixel_ap")
    (tmp_path / "run" / "scores.csv").write_text(
        "id,label,defect_type,image_score,aupro\na,0,good,0.5,inf\n"
    )
    (record,) = [r for r in records.read_results(tmp_path) if r["file"].name == "result.json"]
    with pytest.raises(ValueError, match="a measure is infinite"):
        records.read_measures(record)
