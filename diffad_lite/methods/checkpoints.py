"""Checkpoint folders of methods: ``config.json`` and ``model.safetensors``, never a pickle.

:class:`Checkpointed` is what a method inherits to be saved, loaded, and shared under other
settings; the functions below it do the work.
"""

import math
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffad_lite.core.config import convert, from_dict, short_repr, to_dict, unknown_name
from diffad_lite.core.files import read_json, write_json, writing
from diffad_lite.methods.calibration import MapCalibration, conformal_threshold
from diffad_lite.training import processes

M = TypeVar("M", bound="Checkpointed")
BESIDE_WEIGHTS = 2 * 10**8  # elements that a network may make beside those that its file holds
EACH_CALL = 2000  # elements that one operation counts for at least
MISFITS = (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Checkpointed:
    """Networks, statistics and a configuration that can be saved, loaded and reconfigured."""

    name: ClassVar[str]
    Config: ClassVar[Any]
    config: Any
    network: nn.Module
    map_calibration_: MapCalibration | None
    calibration_scores_: np.ndarray | None
    threshold_: float | None
    reports_: dict[str, dict[str, float]]

    def __init__(self, config: Any) -> None:
        self.config = config
        self.map_calibration_ = self.calibration_scores_ = self.threshold_ = None
        self.reports_ = {}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(iter(self.network.state_dict().values())).device

    def with_settings(self, **changes: Any) -> Self:
        """The same trained networks under other settings, to see what a mechanism is worth.

        Weights are shared, statistics copied; maps are raw, without threshold, until calibrated.

        Raises:
            ValueError: no setting of ``Config.inference_fields()``, or a value it cannot have.
        """
        return with_settings(self, changes)

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype = torch.float32, **record: Any
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``; see :func:`save`.

        Args:
            folder: replaced if it exists.
            dtype: of the stored weights; float16 halves the bundled files.
            record: JSON values stored beside the configuration, e.g. ``fingerprint=``.
        """
        save(self, Path(folder), dtype, record)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load what :meth:`save_pretrained` wrote; :meth:`with_settings` changes settings.

        Raises:
            FileNotFoundError: no checkpoint there.
            ValueError: another method's, or broken.
        """
        return load(cls, Path(folder))


@contextmanager
def claimed(
    folder: Path | None, method: "Checkpointed", seed: int, budget: float | None
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


def claim(folder: Path, method: "Checkpointed", seed: int, budget: float | None) -> None:
    """Write down what is trained in ``folder``; refuse one that holds another training.

    Raises:
        ValueError: the folder belongs to another method, configuration, seed or time budget.
    """
    path, fix = folder / "training.json", f"delete {folder} to start anew"
    record = training_record(method, method.config, seed, budget)
    if not path.exists():
        write_json(path, record)
        return
    stored = read_json(path, "record of a training", fix)
    try:  # fields that an older record lacks are defaults
        config = from_dict(method.Config, stored["config"])
        same = training_record(method, config, stored["seed"], stored["budget"]) == record
        same = same and stored["method"] == method.name
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(
            f"{folder} holds a training of another method, configuration or seed, or with another "
            "time budget; choose another output folder, or delete that one to start anew"
        )


def training_record(
    method: "Checkpointed", config: Any, seed: int, budget: float | None
) -> dict[str, Any]:
    """Return what identifies a training; inference settings do not count."""
    inference = method.Config.inference_fields()
    fixed = {name: value for name, value in to_dict(config).items() if name not in inference}
    return {"method": method.name, "seed": seed, "budget": budget, "config": fixed}


def save(
    method: "Checkpointed", folder: Path, dtype: torch.dtype, record: Mapping[str, Any]
) -> None:
    """Write a checkpoint beside ``folder``, then move it there: complete, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        # Single numbers are statistics, not weights; they stay as they are, as do indices.
        f"network.{name}": value.detach()
        .cpu()
        .to(dtype if value.is_floating_point() and value.numel() > 1 else value.dtype)
        for name, value in method.network.state_dict().items()
    }
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    if method.map_calibration_ is not None:
        tensors["map_mean"] = torch.from_numpy(method.map_calibration_.mean)
        tensors["map_std"] = torch.from_numpy(method.map_calibration_.std)
    if method.calibration_scores_ is not None:
        tensors["calibration_scores"] = torch.from_numpy(method.calibration_scores_)
    values = {"method": method.name, "config": to_dict(method.config), "reports": method.reports_}
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    aside = Path(f"{temporary}.old")
    try:
        temporary.chmod(0o755)
        with writing(folder / "model.safetensors"):
            save_file(tensors, temporary / "model.safetensors")
        (temporary / "model.safetensors").chmod(0o644)  # safetensors makes it private
        write_json(temporary / "config.json", {**values, **record})
        if folder.exists():  # a folder cannot replace another: move the old one aside
            folder.replace(aside)
        temporary.replace(folder)
    finally:
        if aside.exists() and not folder.exists():  # interrupted between the two
            aside.replace(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint, of which ``method`` and ``config`` are there.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: it is broken, or something else.
    """
    path, what, fix = folder / "config.json", "checkpoint's config.json", _fix(folder)
    if not path.exists():  # also where the folder is a file
        raise FileNotFoundError(f"no {what} at {path}; give the folder 'checkpoint' of a run")
    values = read_json(path, what, fix)
    whole = isinstance(values, dict) and isinstance(values.get("method"), str)
    if not whole or not isinstance(values.get("config"), dict):
        raise ValueError(f"{path} lacks 'method' or 'config', or has them wrong; {fix}")
    try:
        reports = convert(values.get("reports", {}), dict[str, dict[str, float]], "reports")
        for stage, report in reports.items():
            if not {"steps", "seconds"} <= report.keys():
                raise ValueError(f"reports.{short_repr(stage)} lacks steps or seconds")
    except ValueError as error:
        raise ValueError(f"{path} has them wrong: {str(error)[:300]}; {fix}") from None
    return values


def load(cls: type[M], folder: Path) -> M:
    """Rebuild a method from its folder; see :meth:`Checkpointed.from_pretrained`."""
    values = read_record(folder)
    if values["method"] != cls.name:
        raise ValueError(
            f"{folder} is a checkpoint of {short_repr(values['method'])}, not of {cls.name!r}; "
            f"choose another one, or --method {values['method'][:100]}"
        )
    try:
        config: Any = from_dict(cls.Config, values["config"])
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; {_fix(folder)}") from None
    tensors = _read(folder / "model.safetensors")
    method = _build(cls, config, folder, sum(value.numel() for value in tensors.values()))
    weights = {k[8:]: v.float() for k, v in tensors.items() if k.startswith("network.")}
    try:
        method.network.load_state_dict(weights)
    except RuntimeError as error:
        summary = " ".join(str(error).split("\n", 1)[-1].split())[:200]
        fault = f"{folder} does not fit its configuration: {summary} ..."
        raise ValueError(f"{fault}; {_fix(folder)}") from None
    if ("map_mean" in tensors) != ("map_std" in tensors):
        raise ValueError(f"{folder} holds one half of the map statistics; {_fix(folder)}")
    if "map_mean" in tensors:
        mean, std = (tensors[name].double().numpy() for name in ("map_mean", "map_std"))
        if mean.ndim != 2 or mean.shape != std.shape or not (std > 0).all():
            raise ValueError(f"{folder} has map statistics that cannot be; {_fix(folder)}")
        method.map_calibration_ = MapCalibration(mean, std)
    if "calibration_scores" in tensors:
        method.calibration_scores_ = scores = tensors["calibration_scores"].float().numpy()
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"{folder} has calibration scores {scores.shape}; {_fix(folder)}")
        method.threshold_ = conformal_threshold(scores, config.quantile)
    method.reports_ = values.get("reports", {})
    method.network.to(processes.device()).eval()
    return method


def with_settings(method: M, changes: Mapping[str, Any]) -> M:
    """See :meth:`Checkpointed.with_settings`."""
    for name in changes.keys() - to_dict(method.config).keys():
        raise unknown_name("setting", name, method.Config.inference_fields())
    check_changeable(type(method), changes.keys())
    other = type(method)(replace(method.config, **changes))
    other.network.to(method.device)
    weights = dict(method.network.named_parameters())
    state = {k: v if k in weights else v.clone() for k, v in method.network.state_dict().items()}
    other.network.load_state_dict(state, assign=True)
    other.network.eval()
    other.reports_ = method.reports_
    return other


def check_changeable(cls: type["Checkpointed"], names: Collection[str]) -> None:
    """Raise ValueError for fields, dotted where nested, that cannot change after training."""
    if fixed := sorted(set(names) - cls.Config.inference_fields()):
        raise ValueError(
            f"{', '.join(fixed)} cannot be changed on a trained model; train anew, or change "
            f"only: {', '.join(sorted(cls.Config.inference_fields()))}"
        )


def _build(cls: type[M], config: Any, folder: Path, held: int) -> M:
    """The method, untrained; ``held`` elements are in its file of weights."""
    try:
        with _Modest(4 * held + BESIDE_WEIGHTS):
            return cls(config)
    except MISFITS as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{folder / 'config.json'}: {why}; {_fix(folder)}") from None


class _Modest(TorchDispatchMode):
    """Refuses to make more than ``left`` elements: a configuration of its weights asks for less."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the sizes that an operation is called with, before it makes anything."""
        self.left -= EACH_CALL
        for size in () if func is torch.ops.aten.slice.Tensor else args:  # its end may be far off
            sizes = size if isinstance(size, (list, tuple)) else [size]
            if sizes and all(isinstance(n, int) for n in sizes):
                self.left -= abs(math.prod(sizes))
        if self.left < 0:
            raise ValueError("it asks for a network much larger than the weights")
        return func(*args, **(kwargs or {}))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights at {path}; {_fix(path.parent)}") from None
    except (SafetensorError, OSError) as error:
        fault = f"{path} is broken or truncated ({str(error)[:200]})"
        raise ValueError(f"{fault}; {_fix(path.parent)}") from None
    for name, value in tensors.items():
        known = not name.startswith("network.statistics.")  # set by calibration only
        if value.is_complex() or (known and not value.double().isfinite().all()):
            raise ValueError(
                f"{path} has no finite numbers in {short_repr(name)}; {_fix(path.parent)}"
            )
    return tensors


def _fix(folder: Path) -> str:
    return f"delete {folder} and train anew"
