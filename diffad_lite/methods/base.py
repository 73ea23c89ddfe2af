"""The contract of a method: fit on normal images, predict a map and a score, explain, save.

A method implements ``_build`` (its networks), ``_fit`` (their training) and ``_infer`` (one batch
of images to raw maps). Seeds, batching, calibration by position, scores and thresholds are the same
for all methods and stand here; files stand in ``checkpoints.py``. To add a method, follow
CONTRIBUTING.md; read ``anoddpm.py`` first, and import the new file in ``methods/__init__.py``,
where the order of imports is the order in tables.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Unpack

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from diffad_lite.core.config import (
    Count,
    NonNegative,
    Profile,
    check_profile,
    configuration,
    field_names,
    strict_integer,
    unknown_name,
    with_values,
)
from diffad_lite.core.files import read_yaml
from diffad_lite.data.images import check_values, image_keys, standardise, undo_standardise
from diffad_lite.data.synthetic_anomalies import Synthesis
from diffad_lite.diffusion.gaussian import noise_generators
from diffad_lite.methods.calibration import (
    FOLDS,
    MapCalibration,
    conformal_threshold,
    fold_numbers,
    pixel_threshold,
    top_k_mean,
)
from diffad_lite.methods.checkpoints import Checkpointed, claimed, read_record
from diffad_lite.spaces.features import DENOISER, LITE0, missing_weights
from diffad_lite.training import processes
from diffad_lite.training.loop import FitOptions, TrainReport


@cache
def read_profiles(name: str) -> dict[str, Any]:
    """Read ``profiles/<name>.yaml``; callers must not change it, as it is read once.

    Keys ``ci`` and ``paper``: dotted field name -> value. Some files also have ``default`` and
    ``categories``: official settings per category.
    """
    return read_yaml(Path(__file__).parent / "profiles" / f"{name}.yaml")


def category_settings(name: str, category: str | None) -> dict[str, Any]:
    """Return the official settings of a category, or the default where it is unknown."""
    table = read_profiles(name)
    return table["default"] | table["categories"].get(category, {})


def inference(default: Any) -> Any:
    """Declare a field that may change after training, as by --set together with --checkpoint."""
    return field(default=default, metadata={"inference": True})


Channels = Annotated[Literal[1, 3, 4], BeforeValidator(strict_integer)]
TopFraction = Annotated[float, Field(ge=1e-6, le=1)]
Quantile = Annotated[float, Field(ge=0.001, le=0.999)]
InputSize = Annotated[int, Field(ge=32)]  # side in pixels of an ImageNet network's input


@configuration
class MethodConfig:
    """What every method is configured by.

    Attributes:
        channels: of the images, 1, 3 or 4.
        image_size: side in pixels that the networks were designed for; other sizes also run.
        standardise: bring each image to mean 0 and a common standard deviation first; the
            image's brightness and contrast are then no longer visible.
        smooth_sigma: standard deviation, in pixels, of the Gaussian blur of the raw map; 0 = none.
        calibrate: whether maps are standardised by position (mean and standard deviation over
            normal images).
        top_fraction: the image score is the mean of this fraction of the largest map values.
        quantile: of the calibration scores, at which the threshold is set.
    """

    profiles: ClassVar[str] = "common"  # file with what a class changes in its base's profiles

    channels: Channels = 1
    image_size: Count = 64
    standardise: bool = False
    smooth_sigma: NonNegative = inference(1.0)
    calibrate: bool = inference(True)
    top_fraction: TopFraction = inference(0.01)
    quantile: Quantile = inference(0.95)

    @classmethod
    def inference_fields(cls) -> frozenset[str]:
        """Return the names of the fields that may change after training.

        A class that gives a field of its base another default leaves it one of them.
        """
        known = [f for base in cls.__mro__ if is_dataclass(base) for f in fields(base)]
        return frozenset(f.name for f in known if f.metadata.get("inference"))

    @classmethod
    def for_profile(
        cls,
        profile: Profile,
        *,
        channels: Channels,
        image_size: int,
        dataset: str | None = None,
        category: str | None = None,
        flip_axes: tuple[int, ...] = (),
    ) -> Self:
        """Return the configuration of a profile.

        ``lite`` is the defaults. ``ci``, a smoke test, and ``paper`` change what the files
        ``profiles/*.yaml`` say, which name their sources.

        Args:
            profile: ``ci``, ``lite`` or ``paper``.
            channels: of the images.
            image_size: side in pixels.
            dataset: whose settings to take, where a method has any.
            category: likewise.
            flip_axes: along which training may flip images, as ``AnomalyData.info`` has them.

        Raises:
            ValueError: unknown profile.
        """
        check_profile(profile)
        config = cls(channels=channels, image_size=image_size)
        changes: dict[str, Any] = {}
        for name in field_names(config):
            if name.endswith("flip_axes"):  # of each training
                changes[name] = flip_axes
        for base in reversed(cls.__mro__):
            if file := vars(base).get("profiles"):
                changes |= read_profiles(file).get(profile, {})
        return with_values(config, changes)


@dataclass
class Prediction:
    """Output of a method for B images, on the CPU in float32.

    Attributes:
        image_score: (B,), larger = more anomalous; comparable between images of one model only.
        anomaly_map: (B, H, W), larger = more anomalous.
        reconstruction: (B, C, H, W), the image without its defects, or None.
        extras: further tensors, first axis B, as each method documents.
    """

    image_score: Tensor
    anomaly_map: Tensor
    reconstruction: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def cat(parts: Sequence["Prediction"]) -> "Prediction":
        """Concatenate batches along the first axis."""
        first = parts[0]
        reconstructions = [p.reconstruction for p in parts if p.reconstruction is not None]
        return Prediction(
            torch.cat([p.image_score for p in parts]),
            torch.cat([p.anomaly_map for p in parts]),
            torch.cat(reconstructions) if reconstructions else None,
            {name: torch.cat([p.extras[name] for p in parts]) for name in first.extras},
        )


Inferred = tuple[Tensor, Tensor | None, dict[str, Tensor]]  # map, reconstruction, extras
Trace = dict[str, Any]


def on_cpu(value: Any) -> Any:
    """Move the tensors of nested lists, dictionaries and named tuples to the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(part) for key, part in value.items()}
    if isinstance(value, list):
        return [on_cpu(part) for part in value]
    if isinstance(value, tuple):
        parts = [on_cpu(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class Buffers(nn.Module):
    """Named tensors that are saved with the model and are not trained."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...


class Networks(nn.ModuleDict):
    """The networks of a method by name; callers annotate the type of each."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Any: ...


@contextmanager
def exact() -> Iterator[None]:
    """Convolve in full float32; recent GPUs otherwise keep ten bits of mantissa (TF32)."""
    cudnn = torch.backends.cudnn
    options = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    with cudnn.flags(enabled=cudnn.enabled, allow_tf32=False, **options):
        yield


def blur(maps: Tensor, sigma: float) -> Tensor:
    """Blur maps (B, H, W) by a Gaussian, reflected at the border; sigma in pixels."""
    side = min(maps.shape[-2:])
    width = min(2 * int(3 * sigma + 0.5) + 1, 2 * side - 1)
    return gaussian_blur(maps[:, None], [width, width], [sigma, sigma])[:, 0]


def choose_images(images: Tensor, n: int, seed: int = 0) -> Tensor:
    """Return ``n`` of the images (N, C, H, W), a random choice that the seed fixes, in order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:n].sort().values]


FEWEST_CALIBRATION = 5  # normal images, so that statistics can be cross-fitted
BATCH_SIZE = 32  # images scored at once; no result depends on it
NETWORK_FIELDS = ("backbone", "drift_features", "map_features")  # which may name ImageNet networks
LAYER_FIELDS = ("layers", "drift_layers")
METHODS: dict[str, type["Method"]] = {}


class Method(Checkpointed, ABC):
    """Base class of all methods; ``Method(config).fit(...).predict(...)``.

    After ``fit``: ``threshold_`` (scores above it are called anomalous), ``pixel_threshold_`` (the
    same for pixels, see :func:`~diffad_lite.methods.calibration.pixel_threshold`),
    ``calibration_scores_`` (cross-fitted), ``reports_`` (stage -> steps, seconds of training).
    """

    name: ClassVar[str]
    title: ClassVar[str]  # name in tables
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    trained: ClassVar[bool] = True  # False: statistics are fitted, no network learns
    any_size: ClassVar[bool] = True  # False: images must have the side Config.image_size

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):  # a base class of several methods has none
            if not hasattr(cls, "title"):
                raise TypeError(f"{cls.__name__} has no title, its name in tables")
            METHODS[cls.name] = cls

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # fit() draws the initial weights anew from its own seed
            self.network = self._build()

    # ------------------------------------------------------------- what a method implements

    @abstractmethod
    def _build(self) -> nn.Module:
        """Return the untrained networks; a :class:`Networks` where there are several."""

    @abstractmethod
    def _fit(self, train: Tensor, **options: Unpack[FitOptions]) -> dict[str, TrainReport]:
        """Train ``self.network`` on normal images; return one report per stage."""

    @abstractmethod
    def _infer(
        self, images: Tensor, generators: list[torch.Generator], trace: Trace | None = None
    ) -> Inferred:
        """Return raw map (B, H, W), reconstruction or None, and extras of one batch.

        Args:
            images: as the networks see them, on ``self.device``.
            generators: one for each image.
            trace: where to put intermediates for figures; the class documents them.
        """

    # -------------------------- what a method implements whose maps need statistics of images

    def _measure(self, images: Tensor) -> dict[str, Tensor]:
        """Return what :meth:`_set_statistics` needs to know of a batch (B, C, H, W).

        Each tensor has first axis B; {} for a method without such statistics.
        """
        return {}

    def _set_statistics(self, measured: dict[str, Tensor]) -> None:
        """Set the statistics that raw maps depend on, from what was measured on normal images."""

    # ----------------------------------------------------------------- what users call

    def fit(
        self,
        train: Tensor,
        calibration: Tensor,
        *,
        seed: int,
        budget: float | None = None,
        workdir: str | Path | None = None,
        progress: bool = True,
    ) -> Self:
        """Train on normal images, then set map statistics and threshold on other normal images.

        Args:
            train: normal images (N, C, H, W), float32 in [-1, 1].
            calibration: normal images that ``train`` does not contain, same form.
            seed: of everything random in training.
            budget: seconds of training, and as many again for :meth:`calibrate`; None takes the
                configured number of steps and all calibration images.
            workdir: folder for training states, from which the same call continues.
            progress: show progress bars.

        Raises:
            ValueError: images that :meth:`calibrate` refuses; ``workdir`` has another training.
            FileNotFoundError: a file that training needs is missing and cannot be downloaded.
            FloatingPointError: the loss is not finite.

        Warns:
            UserWarning: the training images are all equal, or only one; ``budget`` is too short
                for all calibration images.
        """
        self.check_files(self.config)
        self._check(train, "train")
        self._check_calibration(calibration)
        prepared = self.prepare(train)
        self._warn_if_equal(prepared, "train", "every difference from it counts as an anomaly")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = self._build().to(processes.device())
        folder = Path(workdir) if workdir is not None else None
        options = FitOptions(seed=seed, budget=budget, workdir=folder, progress=progress)
        with claimed(folder, self, seed, budget):
            reports = self._fit(prepared, **options)
            self.network.eval()
            self.reports_ = {
                stage: {"steps": report.steps, "seconds": report.seconds}
                for stage, report in reports.items()
            }
            if budget is None:
                return self.calibrate(calibration)
            return self._calibrate_within(budget, calibration)

    @classmethod
    def find_missing(cls, config: MethodConfig, *, download: bool = False) -> Iterator[str]:
        """Yield a sentence, with the fix, for each file that training needs and that is missing.

        ``download`` tries to download weights of ImageNet networks first.
        """
        synthesis = getattr(config, "synthesis", None)
        if synthesis and getattr(config, "anomaly_oriented", True):
            try:
                _ = Synthesis(synthesis).files
            except FileNotFoundError as error:
                yield str(error)
        networks = {f: str(getattr(config, f)) for f in NETWORK_FIELDS if hasattr(config, f)}
        torchvision = {f: name for f, name in networks.items() if name not in (LITE0, DENOISER)}
        layers, lite = [f for f in LAYER_FIELDS if hasattr(config, f)], cls.Config()
        alternative = {f: getattr(lite, f) for f in [*torchvision, *layers]}
        for name in sorted(set(torchvision.values())):
            if message := missing_weights(name, alternative, download=download):
                yield message

    @classmethod
    def check_files(cls, config: MethodConfig) -> None:
        """Raise FileNotFoundError if training needs files that are missing, after a download."""
        if missing := list(cls.find_missing(config, download=True)):
            raise FileNotFoundError("\n".join(missing))

    def _calibrate_within(self, budget: float, calibration: Tensor) -> Self:
        """Calibrate on as many images as ``budget`` seconds allow, at least the fewest needed.

        The time that a few images took tells how many are affordable. Those are a fixed random
        choice, see :func:`choose_images`.
        """
        started, n, N = time.monotonic(), 0, len(calibration)
        affordable = min(FEWEST_CALIBRATION if self.config.calibrate else 1, N)
        while n < affordable < N:
            n, begun = affordable, time.monotonic()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a fault of these few images alone
                    self.calibrate(choose_images(calibration, n))
            except ValueError:  # for example, these few images are equal, but not all of them
                affordable = min(N, 2 * n)
                continue
            now = time.monotonic()
            image_time = max((now - begun) / n, 1e-9)
            remaining = max(0.0, budget - (now - started))
            affordable = processes.gather(min(N, int(remaining / image_time)))[0]
        if affordable == N:
            return self.calibrate(calibration)
        warnings.warn(
            f"the time budget (--max-minutes) allowed {n} of {N} calibration images; the threshold "
            "is from these; allow more time for a more reliable one",
            stacklevel=3,
        )
        return self

    def calibrate(self, calibration: Tensor) -> Self:
        """Set statistics and thresholds from normal images that training did not see.

        The scores behind the threshold are cross-fitted in 5 folds: each image is compared with
        statistics of the other folds, as a new image will be compared with those of all images. An
        indirect influence remains: where raw maps themselves need statistics, as in GLAD and MDPS,
        the other folds' maps, which give an image's map statistics, used statistics that include
        this image.

        Args:
            calibration: normal images (N, C, H, W) that training did not see, float32 in [-1, 1].

        Raises:
            ValueError: images that :meth:`predict` refuses; where maps are calibrated, fewer than
                5 images, or nearly all of them equal.

        Warns:
            UserWarning: too few images for the quantile, or all of them equal.
        """
        self._check_calibration(calibration)
        self._warn_if_equal(self.prepare(calibration), "calibration", "its score is the threshold")
        self.map_calibration_ = None
        measured = self._measure_all(calibration)
        maps = self._cross_fitted_maps(calibration, measured)
        if self.config.calibrate:
            final = self.predict(calibration).anomaly_map.numpy() if measured else maps
            maps, self.map_calibration_ = MapCalibration.cross_fit(maps), MapCalibration.fit(final)
        self.pixel_threshold_ = pixel_threshold(maps)
        self.calibration_scores_ = self._score(calibration, torch.from_numpy(maps)).numpy()
        self.threshold_ = conformal_threshold(self.calibration_scores_, self.config.quantile)
        return self

    @exact()
    def _measure_all(self, images: Tensor) -> dict[str, Tensor]:
        """Return what :meth:`_measure` returns, for any number of images."""
        parts = [self._measure(batch) for batch in images.split(BATCH_SIZE)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _cross_fitted_maps(self, images: Tensor, measured: dict[str, Tensor]) -> np.ndarray:
        """Return raw maps (N, H, W), cross-fitted; then set the statistics of all images.

        The maps of a fold use statistics of the other folds. Without such statistics, or with a
        single image, nothing is separated.
        """
        n = len(images)
        folds = min(FOLDS, n) if measured else 1
        if folds == 1:
            self._set_statistics(measured)
            return self.predict(images).anomaly_map.numpy()
        fold, maps = torch.from_numpy(fold_numbers(n, folds)), torch.empty(n, *images.shape[-2:])
        for f in range(folds):
            others = {
                name: values[fold.to(values.device) != f] for name, values in measured.items()
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the statistics of all images warn, once
                self._set_statistics(others)
            maps[fold == f] = self.predict(images[fold == f]).anomaly_map
        self._set_statistics(measured)
        return maps.numpy()

    def predict(
        self, images: Tensor, *, seed: int = 0, keys: Sequence[str] | None = None
    ) -> Prediction:
        """Score images in float32; each result depends on image, model and seed alone.

        Args:
            images: (B, C, H, W), float32 in [-1, 1].
            seed: of the noise.
            keys: seed each image's noise together with ``seed``; default, a hash of its pixels.
                Pass the clean image's key to keep the noise when a defect is planted.

        Raises:
            ValueError: images of wrong shape, channels or range, NaN; wrong number of keys.
        """
        keys = self._check_keys(images, keys)
        starts = range(0, len(images), BATCH_SIZE)
        batches = [slice(start, start + BATCH_SIZE) for start in starts]
        return Prediction.cat([self._predict(images[b], seed, keys[b]) for b in batches])

    def explain(
        self, images: Tensor, *, seed: int = 0, keys: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Score a few images and return what was computed on the way, on the CPU, for figures.

        Arguments are those of :meth:`predict`, for at most 32 images.

        Returns:
            ``anomaly_map`` and ``reconstruction`` as :meth:`predict` returns them, and the
            intermediates that the class documents, in the range of the networks.

        Raises:
            ValueError: as :meth:`predict`; more than 32 images.
        """
        if len(images) > BATCH_SIZE:
            raise ValueError(f"explain takes at most {BATCH_SIZE} images, got {len(images)}")
        trace: Trace = {}
        prediction = self._predict(images, seed, self._check_keys(images, keys), trace)
        shown = {"anomaly_map": prediction.anomaly_map, "reconstruction": prediction.reconstruction}
        return shown | {name: on_cpu(value) for name, value in trace.items()}

    @exact()
    def _predict(
        self, images: Tensor, seed: int, keys: Sequence[str], trace: Trace | None = None
    ) -> Prediction:
        """Predict one batch; ``trace`` collects intermediates."""
        inputs = self.network_inputs(images, seed, keys)
        maps, reconstruction, extras = self._infer(*inputs, trace)
        maps = self._postprocess(inputs[0], maps).cpu()
        if self.map_calibration_ is not None:
            maps = torch.from_numpy(self.map_calibration_.apply(maps.numpy()))
        if reconstruction is not None:
            reconstruction = reconstruction.cpu()
            if self.config.standardise:
                reconstruction = undo_standardise(reconstruction, images)
        return Prediction(self._score(images, maps), maps, reconstruction, on_cpu(extras))

    def network_inputs(
        self, images: Tensor, seed: int, keys: Sequence[str] | None = None
    ) -> tuple[Tensor, list[torch.Generator]]:
        """Return images (B, C, H, W) as the networks see them, and a noise generator for each."""
        keys = image_keys(images) if keys is None else keys
        return self.prepare(images).to(self.device), noise_generators(keys, seed)

    def prepare(self, images: Tensor, like: Tensor | None = None) -> Tensor:
        """Standardise images (B, C, H, W) if configured, with the statistics of ``like``."""
        return standardise(images, like) if self.config.standardise else images

    def _postprocess(self, images: Tensor, maps: Tensor) -> Tensor:
        """Return the maps (B, H, W) of images as the networks see them, after the blur."""
        sigma = self.config.smooth_sigma
        return blur(maps, sigma) if sigma > 0 else maps

    def _score(self, images: Tensor, maps: Tensor) -> Tensor:
        """Return image scores (B,): the mean of the largest values of the final maps."""
        return torch.from_numpy(top_k_mean(maps.numpy(), self.config.top_fraction)).float()

    @property
    def sides(self) -> tuple[int, int]:
        """Return the smallest side of an image in pixels, and the number that divides all sides."""
        return 2, 1  # one pixel has no spread

    def _check(self, images: Tensor, what: str) -> None:
        C = self.config.channels
        if not isinstance(images, Tensor):
            raise ValueError(
                f"{what}: expected a tensor, got {type(images).__name__}; convert it, e.g. by "
                "torch.from_numpy(images).float()"
            )
        if images.ndim != 4 or images.shape[1] != C:
            raise ValueError(
                f"{what}: expected (N, {C}, H, W), got {tuple(images.shape)}; this model is for "
                f"{C}-channel images (Config.channels)"
            )
        side = self.config.image_size
        if not self.any_size and images.shape[-2:] != (side, side):
            raise ValueError(
                f"{what}: images are {tuple(images.shape[-2:])} (height, width), but {self.name} "
                f"is for {(side, side)} (Config.image_size); resize the images"
            )
        smallest, divisor = self.sides
        H, W = images.shape[-2:]
        if min(H, W) < smallest or H % divisor or W % divisor:
            near = tuple(max(smallest, round(n / divisor) * divisor) for n in (H, W))
            raise ValueError(
                f"{what}: images are {(H, W)} (height, width), but {self.name} needs sides of at "
                f"least {smallest} pixels that are divisible by {divisor}; resize the images, e.g. "
                f"to {near}"
            )
        check_values(images, what)

    def _check_keys(self, images: Tensor, keys: Sequence[str] | None) -> Sequence[str]:
        """Check images to score and return their keys, by default hashes of their pixels."""
        self._check(images, "images")
        keys = image_keys(images) if keys is None else keys
        if len(keys) != len(images):
            raise ValueError(f"{len(keys)} keys for {len(images)} images; give one for each")
        return keys

    def _check_calibration(self, images: Tensor) -> None:
        self._check(images, "calibration")
        if not self.config.calibrate:
            return
        if len(images) < FEWEST_CALIBRATION:
            raise ValueError(
                f"calibration: {len(images)} images are too few for map statistics, "
                f"{FEWEST_CALIBRATION} are needed; add normal images, or set calibrate=false"
            )
        pixels = np.array([hash(image.tobytes()) for image in images.cpu().numpy()])
        fold = fold_numbers(len(images))
        if any(len(set(pixels[fold != f])) == 1 for f in set(fold)):
            n = max(Counter(pixels).values())
            raise ValueError(
                f"calibration: {n} of {len(images)} images are equal, so that their maps have no "
                "spread; give different normal images, or set calibrate=false"
            )

    def _warn_if_equal(self, images: Tensor, what: str, consequence: str) -> None:
        """Warn where prepared images (N, C, H, W) are a single one, perhaps repeated."""
        n, kind = len(images), "standardised images" if self.config.standardise else "images"
        if torch.allclose(images, images[:1], rtol=0, atol=1e-3):  # below one of 256 grey levels
            fault = f"all {n} {kind} are equal" if n > 1 else "there is only one image"
            warnings.warn(f"{what}: {fault}; {consequence}; add other normal images", stacklevel=3)

    @contextmanager
    def count_evaluations(self) -> Iterator[list[int]]:
        """Count images passed through the networks, in the only entry of the yielded list."""
        network, count = self.network, [0]

        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            count[0] += len(inputs[0])

        parts = network.values() if isinstance(network, nn.ModuleDict) else [network]
        handles = [part.register_forward_hook(hook) for part in parts]
        try:
            yield count
        finally:
            for handle in handles:
                handle.remove()


def get_method(name: str) -> type[Method]:
    """Return the method class of that name.

    Raises:
        ValueError: unknown name, with the nearest known one.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def load_pretrained(folder: str | Path) -> Method:
    """Load a checkpoint of any method; see :meth:`Checkpointed.from_pretrained`."""
    name = read_record(Path(folder))["method"]
    return get_method(name).from_pretrained(folder)
