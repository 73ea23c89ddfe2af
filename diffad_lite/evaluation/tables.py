"""Tables rendered from result files; no number in the course is typed by hand."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffad_lite.core.files import write_atomically
from diffad_lite.evaluation.claims import Judged, claims_table, judge_all
from diffad_lite.evaluation.metrics import verdict
from diffad_lite.evaluation.records import (
    Result,
    auroc_over_seeds,
    difference_of,
    grouped,
    is_ablation,
    is_default,
    label_of,
    markdown_table,
    mean,
    method_names,
    read_results,
    read_speeds,
    select,
)

TEST_PLANTS = ("cells", "lesions")  # defects planted in test images
TABLE_START = "<!-- table "
TABLE_NAMED = ": rendered by 'make tables' -->"
TABLE_END = "<!-- end -->"


def auroc_cell(group: Sequence[Result]) -> str:
    """Return the mean image AUROC and its interval, as tables write them."""
    auroc, low, high = auroc_over_seeds(group)
    return f"{auroc:.3f} [{low:.3f}, {high:.3f}]"


def image_table(results: Iterable[Result]) -> str:
    """Return image metrics as Markdown, one row for each method and variant."""
    head = ["method", "seeds", "image AUROC [95 %]", "AP", "F1 at threshold", "false alarms [95 %]"]
    head += ["training", "ms / image", "evaluations"]
    rows = [
        [
            label_of(group),
            _seeds(group),
            auroc_cell(group),
            f"{mean(group, 'image_ap'):.3f}",
            f"{mean(group, 'f1_at_normal_threshold'):.3f}",
            _false_alarms(group),
            f"{mean(group, 'train_seconds') / 60:.1f} min",
            f"{mean(group, 'ms_per_image'):.1f}",
            f"{mean(group, 'network_evaluations_per_image'):.0f}",
        ]
        for group in grouped(results).values()
    ]
    return markdown_table(head, rows)


def _seeds(group: Sequence[Result]) -> str:
    return ", ".join(str(r["seed"]) for r in group)


def _false_alarms(group: Sequence[Result]) -> str:
    """Return the mean rate; its interval, if each record has one, from the lowest to the highest.

    The seeds share their test images, so several seeds do not make the interval narrower.
    """
    rate = f"{100 * mean(group, 'false_alarms_at_normal_threshold'):.0f}"
    intervals = [r["false_alarms_ci"] for r in group]
    if None in intervals:
        return f"{rate} %"
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    return f"{rate} % [{100 * low:.0f}, {100 * high:.0f}]"


def pixel_table(results: Iterable[Result], dice: bool = False) -> str:
    """Return pixel metrics as Markdown: overall, with or without Dice, and AUPRO per defect."""
    results = list(results)
    kinds = _kinds(results)
    columns = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_ap": "pixel AP"}
    columns |= {"aupro": "AUPRO"} | ({"dice_oracle": "Dice, oracle threshold"} if dice else {})
    head = ["method", "seeds", *columns.values(), *(f"AUPRO {kind}" for kind in kinds)]
    rows = [
        [
            label_of(group),
            _seeds(group),
            *(_mean_cell(group, metric) for metric in columns),
            *(_kind_cell(group, kind, "aupro") for kind in kinds),
        ]
        for group in grouped(results).values()
    ]
    return markdown_table(head, rows)


def detail_table(results: Iterable[Result]) -> str:
    """Return AUPRO at 0.05, AUPIMO, pixel F1, and what reconstructions keep, as Markdown.

    PSNR is that on normal images. The remaining contrast is that of planted defects, of all and of
    each kind. Only runs whose records have these metrics are in the table; empty without any.
    """
    results = [r for r in results if r["aupro_05"] is not None]
    if not results:
        return ""
    kinds = _kinds(results) if any(r["remaining_contrast"] is not None for r in results) else []
    head = ["method", "seeds", "AUPRO .05", "AUPIMO", "pixel F1 at threshold"]
    head += ["PSNR, normal images", "remaining contrast", *(f"of {kind}" for kind in kinds)]
    rows = [
        [
            label_of(group),
            _seeds(group),
            _mean_cell(group, "aupro_05"),
            _mean_cell(group, "aupimo"),
            _mean_cell(group, "pixel_f1_at_normal_threshold"),
            _mean_cell(group, "psnr_normal", "{:.1f} dB"),
            _mean_cell(group, "remaining_contrast", "{:.2f}"),
            *(_kind_cell(group, kind, "remaining_contrast", "{:.2f}") for kind in kinds),
        ]
        for group in grouped(results).values()
    ]
    return markdown_table(head, rows)


def _kinds(results: Iterable[Result]) -> list[str]:
    """Return the kinds of defects that results know, sorted."""
    return sorted({kind for r in results for kind in r["per_defect"]})


def _mean_cell(group: Sequence[Mapping[str, Any]], key: str, form: str = "{:.3f}") -> str:
    """Return the mean of a field over runs, "-" if one of them lacks it."""
    return "-" if None in [r.get(key) for r in group] else form.format(mean(group, key))


def _kind_cell(group: Sequence[Result], kind: str, key: str, form: str = "{:.3f}") -> str:
    """Return the mean of a metric of one kind of defect over runs, as :func:`_mean_cell`."""
    return _mean_cell([r["per_defect"].get(kind, {}) for r in group], key, form)


def ablation_table(results: Iterable[Result]) -> str:
    """Return runs of one method as Markdown, each compared with the default on the same images."""
    groups, rows = grouped(results), []
    head = ["what is changed", "seeds", "steps", "image AUROC [95 %]", "lost by it [95 %]"]
    for (method, variant, size, training), group in groups.items():
        name = (training or "full") + ("" if variant == "default" else f", {variant}")
        cells = [name, _seeds(group), f"{mean(group, 'train_steps'):.0f}", auroc_cell(group)]
        full = groups.get((method, "default", size, ""))
        if full and full is not group:
            loss, low, high = difference_of(full, group)
            cells += [f"{loss:+.3f} [{low:+.3f}, {high:+.3f}]", verdict(low, high)]
        else:
            cells += ["-", "-"]
        rows.append(cells)
    return markdown_table([*head, "verdict"], rows)


def planted_ablation_table(results: Iterable[Result]) -> str:
    """Return runs on planted defects as Markdown, of each method with changed settings.

    Quantities of maps and reconstructions, with the default of the same seeds in the table.
    """
    results = list(results)
    ablated = {(r["method"], r["seed"]) for r in results if is_ablation(r)}
    compared = [
        r
        for r in results
        if (r["method"], r["seed"]) in ablated and (is_ablation(r) or r["variant"] == "default")
    ]
    columns = {"pixel_ap": "pixel AP", "aupro": "AUPRO", "dice_oracle": "Dice, oracle threshold"}
    head = ["method", "what is changed", "seeds", "image AUROC", *columns.values()]
    head += ["PSNR on normal images", "remaining contrast"]
    rows = []
    for (method, variant, size, training), group in grouped(compared).items():
        sizes = [] if size == 64 else [f"{size} px"]
        changed = [*sizes, *(name for name in (training, variant) if name not in ("", "default"))]
        rows.append(
            [
                method_names().get(method, method),
                ", ".join(changed) or "-",
                _seeds(group),
                _mean_cell(group, "image_auroc"),
                *(_mean_cell(group, key) for key in columns),
                _mean_cell(group, "psnr_normal", "{:.1f} dB"),
                _mean_cell(group, "remaining_contrast", "{:.2f}"),
            ]
        )
    return markdown_table(head, rows)


def overview_table(results: Iterable[Result]) -> str:
    """Return image AUROC with intervals on every data set as Markdown, default settings only."""
    default = [result for result in results if is_default(result)]
    columns = {
        category or dataset: grouped(select(default, dataset=dataset, category=category))
        for dataset, category in _data_sets(default)
    }
    rows = []
    for key in dict.fromkeys(key for groups in columns.values() for key in groups):
        row = [groups.get(key) for groups in columns.values()]
        cells = [auroc_cell(group) if group else "-" for group in row]
        rows.append([label_of(next(filter(None, row))), *cells])
    return markdown_table(["method", *columns], rows)


def _data_sets(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Return the (data set, category) pairs of results, sorted."""
    return sorted({(r["dataset"], r["category"]) for r in results})


def speed_table(speeds: Mapping[str, Any]) -> str:
    """Return the settings timed in one run as Markdown, fastest first; ms of the median round."""
    head = ["setting", "ms / image [least, most]", "network evaluations", "MB of tensors"]
    rows = []
    for name, setting in sorted(speeds.items(), key=lambda item: np.median(item[1]["ms"])):
        ms = setting["ms"]
        times = f"{np.median(ms):.1f} [{min(ms):.1f}, {max(ms):.1f}]"
        cells = [name, times, f"{setting['evaluations']:.0f}", f"{setting['mb']:.1f}"]
        rows.append([*cells, f"{setting['parameters'] / 1e6:.2f} M"])
    return markdown_table([*head, "parameters"], rows)


def tables(results: Sequence[Result]) -> dict[str, str]:
    """Render every table of these results: name -> Markdown."""
    rendered = {}
    if any(map(is_default, results)):
        rendered["overview"] = overview_table(results)
    for dataset, category in _data_sets(results):
        key = f"{dataset}-{category}"
        runs = select(results, dataset=dataset, category=category)
        real = select(runs, plant=None)
        for method in sorted({r["method"] for r in real if is_ablation(r)}):
            of_method = select(real, method=method)
            seeds = {r["seed"] for r in of_method if is_ablation(r)}
            compared = [r for r in of_method if is_ablation(r) or is_default(r)]
            rendered[f"{key}-{method}-ablation"] = ablation_table(
                r for r in compared if r["seed"] in seeds
            )
        for plant in TEST_PLANTS:
            planted = select(runs, plant=plant)
            if any(map(is_ablation, planted)):
                rendered[f"{key}-{plant}-ablation"] = planted_ablation_table(planted)
        runs = [r for r in runs if r["plant"] not in TEST_PLANTS or not is_ablation(r)]
        runs = select(runs, training="")
        if unchanged := [r for r in select(runs, plant=None) if not is_ablation(r)]:
            rendered[key] = image_table(unchanged)
            if _have_masks(unchanged):
                rendered[f"{key}-pixels"] = pixel_table(unchanged, dice=True)
                if details := detail_table(unchanged):
                    rendered[f"{key}-pixels-details"] = details
        for plant in sorted({r["plant"] for r in runs} - {None}):
            planted = select(runs, plant=plant)
            with_masks = _have_masks(planted)
            rendered[f"{key}-{plant}"] = (
                pixel_table(planted, dice=plant == "lesions")
                if with_masks
                else image_table(planted)
            )
            if details := detail_table(planted):
                rendered[f"{key}-{plant}-details"] = details
    return rendered


def _have_masks(results: Iterable[Result]) -> bool:
    return all(r["aupro"] is not None for r in results)


def every_table(
    records: Sequence[Result], judged: Sequence[Judged], results: str | Path
) -> dict[str, str]:
    """Render :func:`tables`, and those of times and claims: name -> Markdown."""
    rendered = tables(records)
    if speeds := read_speeds(results):
        rendered["speed"] = speed_table(speeds)
    if judged:
        rendered["claims"] = claims_table(judged)
    return rendered


def render(results: str | Path, documents: Iterable[Path]) -> list[Path]:
    """Write ``tables.md`` into ``results`` and refresh the marked tables of documents.

    Claims are judged if ``claims.yaml`` stands beside that folder. :func:`replace_tables` describes
    marked tables. Returns the files that changed. Raises ValueError for an unknown table in a
    document, or a broken ``claims.yaml``.
    """
    records = read_results(results)
    rendered = every_table(records, judge_all(records, results), results)
    parts = [f"## {name}\n\n{table}\n" for name, table in rendered.items()]
    head = "# Results\n\nRendered from the result files of this folder by `make tables`.\n"
    texts = {Path(results) / "tables.md": "\n".join([head, *parts])}
    texts |= {path: replace_tables(path, rendered) for path in documents}
    return write_changed(texts)


def write_changed(texts: Mapping[Path, str]) -> list[Path]:
    """Write the files whose text differs from the given one; return those files."""
    changed = []
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
            changed.append(path)
    return changed


def replace_tables(path: Path, rendered: Mapping[str, str]) -> str:
    """Return the document's text with its marked tables replaced by ``rendered``, name -> Markdown.

    A marked table stands between ``<!-- table NAME: rendered by 'make tables' -->`` and
    ``<!-- end -->``. Raises ValueError for an unknown table, or one without an end.
    """
    pieces = path.read_text(encoding="utf-8").split(TABLE_START)
    for i, piece in enumerate(pieces[1:], 1):
        name, mark, content = piece.partition(TABLE_NAMED)
        if not mark:  # another comment
            continue
        if name not in rendered:
            raise ValueError(f"{path} asks for the table {name!r}; there are: {list(rendered)}")
        if TABLE_END not in content:
            raise ValueError(f"{path}: the table {name!r} has no closing {TABLE_END}")
        after = content.split(TABLE_END, 1)[1]
        pieces[i] = f"{name}{TABLE_NAMED}\n{rendered[name]}\n{TABLE_END}{after}"
    return TABLE_START.join(pieces)
