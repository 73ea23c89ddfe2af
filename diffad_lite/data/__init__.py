"""Images and their labels: data sets, readers, splits, planted and synthetic anomalies."""

from diffad_lite.core.files import data_dir
from diffad_lite.data.datasets import AnomalyData, load_dataset, split
from diffad_lite.data.images import (
    STANDARD_DEVIATION,
    image_keys,
    list_images,
    read_image,
    resize_image,
    to_float,
)
from diffad_lite.data.planting import plant_defect, plant_defects
from diffad_lite.data.readers import READERS, read_elpv, read_folder
from diffad_lite.data.source import DEFAULT_CATEGORIES
from diffad_lite.data.synthetic_anomalies import Synthesis, SynthesisConfig

__all__ = [
    "DEFAULT_CATEGORIES",
    "READERS",
    "STANDARD_DEVIATION",
    "AnomalyData",
    "Synthesis",
    "SynthesisConfig",
    "data_dir",
    "image_keys",
    "list_images",
    "load_dataset",
    "plant_defect",
    "plant_defects",
    "read_elpv",
    "read_folder",
    "read_image",
    "resize_image",
    "split",
    "to_float",
]
