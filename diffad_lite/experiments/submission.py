"""Anomaly maps of MVTec AD 2's private sets, as the benchmark server takes them.

Names and formats are those that MVTec's ``check_and_prepare_data_for_upload.py`` demands.
"""

import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from diffad_lite.core.config import unknown_name
from diffad_lite.core.files import staged, write_atomically
from diffad_lite.data.images import Resize, list_images, read_image
from diffad_lite.experiments.evaluate import check_replaceable
from diffad_lite.experiments.quality import at_original_size
from diffad_lite.experiments.unlabelled import read_images
from diffad_lite.methods.base import Method

N_IMAGES = {  # of each private set, by object; the checker refuses another number
    "can": 321,
    "fabric": 314,
    "fruit_jelly": 255,
    "rice": 277,
    "sheet_metal": 142,
    "vial": 276,
    "wallplugs": 232,
    "walnuts": 228,
}
ENDINGS = {"test_private": "regular", "test_private_mixed": "mixed"}  # of the file names, by set
SAMPLE_FORMAT = 339  # TIFF tag
IEEE_FLOAT = 3  # a value of it


def export_submission(
    method: Method,
    folder: str | Path,
    out: str | Path,
    *,
    resize: Resize = "squash",
    bits: int | None = None,
) -> dict[str, float]:
    """Score the private sets of one object of MVTec AD 2; write both kinds of anomaly images.

    ``<out>/anomaly_images/<object>/<set>/<stem>.tiff`` is the map, float16 (H, W), and
    ``<out>/anomaly_images_thresholded/<object>/<set>/<stem>.png`` is 255 where it is above
    ``method.pixel_threshold_``, else 0. Both have the size of the image. They replace those of an
    earlier call for this object. If the largest value is below 1, or does not fit into
    float16, all maps of the object are divided by one constant. Near values may become equal, as
    float16 keeps 11 bits.

    Args:
        method: fitted to this object and calibrated.
        folder: of the object, as unpacked; its name is that of the object.
        out: folder of the submission; each of the eight objects adds its files.
        resize: as in training.
        bits: as in training, ``AnomalyData.info["bits"]``.

    Returns:
        for each set, the fraction of pixels above the threshold.

    Raises:
        FileNotFoundError: a private set does not exist.
        ValueError: the method has no pixel threshold; the folder is not named like an object; a set
            is empty; a file is misnamed or unreadable; ``out`` holds other files.
    """
    folder, out = Path(folder), Path(out)
    threshold = method.pixel_threshold_
    if threshold is None:
        raise ValueError(
            "the model has no pixel threshold; call calibrate() with normal images, or train again"
        )
    name = folder.resolve().name
    if name not in N_IMAGES:
        raise unknown_name("object of MVTec AD 2, the name of the folder", name, N_IMAGES)
    targets = out / "anomaly_images" / name, out / "anomaly_images_thresholded" / name
    check_replaceable(targets[0], lambda path: path.suffix == ".tiff")
    check_replaceable(targets[1], lambda path: path.suffix == ".png")
    sets = {part: _list_set(folder / part, ending, name) for part, ending in ENDINGS.items()}
    c = method.config
    maps = {
        part: method.predict(
            read_images(paths, c.channels, c.image_size, resize, bits or 16)
        ).anomaly_map
        for part, paths in sets.items()
    }
    largest = max(float(values.abs().max()) for values in maps.values())
    divisor = max(min(1.0, largest), largest / float(np.finfo(np.float16).max)) or 1.0
    fractions = {}
    with staged(targets[0]) as continuous, staged(targets[1]) as thresholded:
        for part, paths in sets.items():
            areas = []
            for path, anomaly_map in zip(paths, maps[part], strict=True):
                size = read_image(path).shape[1:]
                pixels = at_original_size(anomaly_map, size, resize, c.image_size)
                _write_half(continuous / part / f"{path.stem}.tiff", pixels / divisor)
                above = pixels > threshold
                image = Image.fromarray(above.astype(np.uint8) * 255)
                write_atomically(thresholded / part / f"{path.stem}.png", image.save)
                areas.append(above.mean())
            fractions[part] = float(np.mean(areas))
    return fractions


def _list_set(folder: Path, ending: str, name: str) -> list[Path]:
    """Return the images of a private set; a warning says if some are missing."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder}; give the folder of one object of MVTec AD 2, as it is unpacked"
        )
    paths = list_images(folder)
    pattern = re.compile(rf"\d{{3}}_{ending}\.png")
    if misnamed := [path for path in paths if not pattern.fullmatch(path.name)]:
        raise ValueError(
            f"{misnamed[0]} is not named like 000_{ending}.png, and the server would refuse its "
            "map; unpack the whole archive again"
        )
    if not paths:
        raise ValueError(f"{folder} holds no images; unpack the whole archive again")
    if len(paths) != N_IMAGES[name]:
        warnings.warn(
            f"{folder} holds {len(paths)} images, and the server expects {N_IMAGES[name]}; unpack "
            "the whole archive again",
            stacklevel=3,
        )
    return paths


def _write_half(path: Path, values: np.ndarray) -> None:
    """Write a map (H, W) as a float16 TIFF.

    Pillow has no such mode: it writes the bits as integers, under a tag that calls them floats.
    """
    image = Image.fromarray(values.astype("<f2").view("<u2"))
    write_atomically(path, lambda p: image.save(p, tiffinfo={SAMPLE_FORMAT: IEEE_FLOAT}))
