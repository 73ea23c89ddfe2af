"""Checkpoint folders of methods: ``config.json`` and ``model.safetensors``, never a pickle.

:class:`Checkpointed` is what a method inherits to be saved, loaded, and used with other settings.
"""

import math
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffad_lite.core.config import convert, from_dict, short_repr, to_dict, unknown_name
from diffad_lite.core.files import read_json, staged, write_atomically, write_json
from diffad_lite.methods.calibration import MapCalibration, conformal_threshold
from diffad_lite.training import processes

EXTRA_ELEMENTS = 2 * 10**8  # that a network may create beyond four times those of its file
ELEMENTS_PER_CALL = 2000  # that one operation counts for at least
BUILD_ERRORS = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Checkpointed:
    """Networks, statistics and a configuration that can be saved, loaded and reconfigured."""

    name: ClassVar[str]
    Config: ClassVar[Any]
    config: Any
    network: nn.Module
    map_calibration_: MapCalibration | None
    calibration_scores_: np.ndarray | None
    threshold_: float | None
    pixel_threshold_: float | None
    reports_: dict[str, dict[str, float]]

    def __init__(self, config: Any) -> None:
        self.config = config
        self.map_calibration_ = self.calibration_scores_ = None
        self.threshold_ = self.pixel_threshold_ = None
        self.reports_ = {}

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(iter(self.network.state_dict().values())).device

    def with_settings(self, **changes: Any) -> Self:
        """Return the same trained networks with other settings, to measure one mechanism.

        Weights are shared, statistics copied; maps are raw, without threshold, until calibrated.

        Raises:
            ValueError: no setting of ``Config.inference_fields()``, or an impossible value.
        """
        for name in changes.keys() - to_dict(self.config).keys():
            raise unknown_name("setting", name, self.Config.inference_fields())
        check_changeable(type(self), changes.keys())
        other = type(self)(replace(self.config, **changes))
        other.network.to(self.device)
        weights = dict(self.network.named_parameters())
        state = self.network.state_dict().items()
        copied = {k: v if k in weights else v.clone() for k, v in state}
        other.network.load_state_dict(copied, assign=True)
        other.network.eval()
        other.reports_ = self.reports_
        return other

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype = torch.float32, **record: Any
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``: complete, or not at all.

        Args:
            folder: replaced if it exists.
            dtype: of the stored weights; float16 halves the bundled files.
            record: JSON values stored beside the configuration, e.g. ``fingerprint=``.
        """
        folder = Path(folder)
        values = {"method": self.name, "config": to_dict(self.config), "reports": self.reports_}
        with staged(folder.parent) as stage:
            new, tensors = stage / folder.name, self._tensors(dtype)
            write_atomically(new / "model.safetensors", lambda path: save_file(tensors, path))
            write_json(new / "config.json", {**values, **record})

    def _tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return weights in ``dtype``, statistics and calibration as they are, by name."""
        tensors = {}
        for name, value in self.network.state_dict().items():
            is_weight = value.is_floating_point() and value.numel() > 1
            value = value.detach().cpu().to(dtype if is_weight else value.dtype)
            tensors[f"network.{name}"] = value.contiguous().clone()
        if self.map_calibration_ is not None:
            tensors["map_mean"] = torch.from_numpy(self.map_calibration_.mean)
            tensors["map_std"] = torch.from_numpy(self.map_calibration_.std)
        if self.calibration_scores_ is not None:
            tensors["calibration_scores"] = torch.from_numpy(self.calibration_scores_)
        if self.pixel_threshold_ is not None:
            tensors["pixel_threshold"] = torch.tensor([self.pixel_threshold_], dtype=torch.float64)
        return tensors

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what :meth:`save_pretrained` wrote; :meth:`with_settings` changes settings.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: another method's, or broken.
        """
        folder = Path(folder)
        values = read_record(folder)
        if values["method"] != cls.name:
            raise ValueError(
                f"{folder} is a checkpoint of {short_repr(values['method'])}, not of "
                f"{cls.name!r}; choose another one, or --method {values['method'][:100]}"
            )
        try:
            config = from_dict(cls.Config, values["config"])
        except ValueError as error:
            older = "if an older version wrote it, CHANGELOG.md says how to convert it, else"
            raise ValueError(f"{folder / 'config.json'}: {error}; {older} {_fix(folder)}") from None
        tensors = _read_tensors(folder / "model.safetensors")
        method = cls._build_limited(config, folder, sum(v.numel() for v in tensors.values()))
        weights = {k[8:]: v.float() for k, v in tensors.items() if k.startswith("network.")}
        try:
            method.network.load_state_dict(weights)
        except RuntimeError as error:
            summary = " ".join(str(error).split("\n", 1)[-1].split())[:200]
            fault = f"{folder} does not fit its configuration: {summary} ..."
            raise ValueError(f"{fault}; {_fix(folder)}") from None
        method._load_calibration(tensors, folder)
        method.reports_ = values.get("reports", {})
        method.network.to(processes.device()).eval()
        return method

    @classmethod
    def _build_limited(cls, config: Any, folder: Path, n_elements: int) -> Self:
        """Build the untrained method; refuse networks much larger than their file's elements."""
        try:
            with _ElementLimit(4 * n_elements + EXTRA_ELEMENTS):
                return cls(config)
        except BUILD_ERRORS as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"{folder / 'config.json'}: {reason}; {_fix(folder)}") from None

    def _load_calibration(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Set map statistics, calibration scores and thresholds, where the file has them."""
        if ("map_mean" in tensors) != ("map_std" in tensors):
            raise ValueError(f"{folder} has only one of map_mean and map_std; {_fix(folder)}")
        if "map_mean" in tensors:
            mean, std = (tensors[name].double().numpy() for name in ("map_mean", "map_std"))
            if mean.ndim != 2 or mean.shape != std.shape or not (std > 0).all():
                raise ValueError(f"{folder} has impossible map statistics; {_fix(folder)}")
            self.map_calibration_ = MapCalibration(mean, std)
        if "calibration_scores" in tensors:
            self.calibration_scores_ = scores = tensors["calibration_scores"].float().numpy()
            if scores.ndim != 1 or not len(scores):
                raise ValueError(f"{folder} has calibration scores {scores.shape}; {_fix(folder)}")
            self.threshold_ = conformal_threshold(scores, self.config.quantile)
        if "pixel_threshold" in tensors:  # files of older versions have none
            value = tensors["pixel_threshold"].double()
            if value.shape != (1,):
                shape = tuple(value.shape)
                raise ValueError(f"{folder} has pixel thresholds {shape}, not (1,); {_fix(folder)}")
            self.pixel_threshold_ = float(value)


def check_changeable(cls: type[Checkpointed], names: Collection[str]) -> None:
    """Raise ValueError for fields, dotted where nested, that cannot change after training."""
    if fixed := sorted(set(names) - cls.Config.inference_fields()):
        raise ValueError(
            f"{', '.join(fixed)} cannot be changed on a trained model; train anew, or change "
            f"only: {', '.join(sorted(cls.Config.inference_fields()))}"
        )


@contextmanager
def claimed(
    folder: Path | None, method: Checkpointed, seed: int, budget: float | None
) -> Iterator[None]:
    """Claim ``folder`` for the training in the block; delete it if an error leaves no state there.

    Raises:
        ValueError: as :func:`claim`.
    """
    if folder is None:
        yield
        return
    claim(folder, method, seed, budget)
    try:
        yield
    except Exception:
        if [path.name for path in folder.glob("*")] == ["training.json"]:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def claim(folder: Path, method: Checkpointed, seed: int, budget: float | None) -> None:
    """Record what is trained in ``folder``; refuse one that holds another training.

    Raises:
        ValueError: the folder belongs to another method, configuration, seed or time budget.
    """
    path, fix = folder / "training.json", f"delete {folder} to start anew"
    record = _training_record(method, method.config, seed, budget)
    if not path.exists():
        write_json(path, record)
        return
    stored = read_json(path, "record of a training", fix)
    try:  # fields that an older record lacks are defaults
        config = from_dict(method.Config, stored["config"])
        same = _training_record(method, config, stored["seed"], stored["budget"]) == record
        same = same and stored["method"] == method.name
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(
            f"{folder} holds a training of another method, configuration or seed, or with another "
            "time budget; choose another output folder, or delete that one to start anew"
        )


def _training_record(
    method: Checkpointed, config: Any, seed: int, budget: float | None
) -> dict[str, Any]:
    """Return what identifies a training; inference settings do not count."""
    inference = method.Config.inference_fields()
    fixed = {name: value for name, value in to_dict(config).items() if name not in inference}
    return {"method": method.name, "seed": seed, "budget": budget, "config": fixed}


def read_record(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a checkpoint, which has at least ``method`` and ``config``.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it is broken, or something else.
    """
    path, content, fix = folder / "config.json", "checkpoint's config.json", _fix(folder)
    if not path.exists():  # also where the folder is a file
        raise FileNotFoundError(f"no {content} at {path}; give the folder 'checkpoint' of a run")
    values = read_json(path, content, fix)
    complete = isinstance(values, dict) and isinstance(values.get("method"), str)
    if not complete or not isinstance(values.get("config"), dict):
        raise ValueError(f"{path} lacks 'method' or 'config', or has them wrong; {fix}")
    try:
        reports = convert(values.get("reports", {}), dict[str, dict[str, float]], "reports")
        for stage, report in reports.items():
            if not {"steps", "seconds"} <= report.keys():
                raise ValueError(f"reports.{short_repr(stage)} lacks steps or seconds")
    except ValueError as error:
        raise ValueError(f"{path} has them wrong: {str(error)[:300]}; {fix}") from None
    return values


class _ElementLimit(TorchDispatchMode):
    """Refuse to create more than ``remaining`` elements."""

    def __init__(self, remaining: int) -> None:
        super().__init__()
        self.remaining = remaining

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the sizes in the arguments of an operation before it creates anything."""
        self.remaining -= ELEMENTS_PER_CALL
        is_slice = func is torch.ops.aten.slice.Tensor  # whose end may be a huge number
        for size in () if is_slice else args:
            sizes = size if isinstance(size, (list, tuple)) else [size]
            if sizes and all(isinstance(n, int) for n in sizes):
                self.remaining -= abs(math.prod(sizes))
        if self.remaining < 0:
            raise ValueError("it asks for a network much larger than the weights")
        return func(*args, **(kwargs or {}))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {path}; {_fix(path.parent)}") from None
    except (SafetensorError, OSError) as error:
        fault = f"{path} is broken or truncated ({str(error)[:200]})"
        raise ValueError(f"{fault}; {_fix(path.parent)}") from None
    for name, value in tensors.items():
        may_be_infinite = name.startswith("network.statistics.")  # until calibration
        if value.is_complex() or not (may_be_infinite or value.double().isfinite().all()):
            raise ValueError(
                f"{path} has values in {short_repr(name)} that are not finite; {_fix(path.parent)}"
            )
    return tensors


def _fix(folder: Path) -> str:
    return f"delete {folder} and train anew"
