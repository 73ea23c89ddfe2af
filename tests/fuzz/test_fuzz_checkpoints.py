"""Fuzzing of checkpoints: weights, configuration, and the state of an unfinished training."""

import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import FILE_NAMES, PICKLE, Case, check_inputs, choose, corrupt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffad_lite.methods.base import METHODS, load_pretrained
from diffad_lite.methods.denoiser import DenoiserConfig
from diffad_lite.training.loop import train_network
from diffad_lite.training.state import TrainConfig, TrainingState

IMAGE_SIZE = 16
TINY = {
    "denoiser": DenoiserConfig(base_channels=4, channel_mults=(1, 2), attention_levels=()),
}
CHANGES: dict[str, dict[str, Any]] = {
    "brightness": {},
    "mean_image": {},
    "pca": {"n_components": 5},
    "anoddpm": TINY,
    "anoddpm_simplex": TINY,
    "bernoulli": {"base_channels": 4, "n_chains": 1},
    "diffusionad": {},
    "padim": {},
    "bank": {},
    "grad": {},
}
SLOW = ("diffusionad", "padim", "bank", "grad")  # drawn less often
CHEAP_FIELDS = {"smooth_sigma", "calibrate", "top_fraction", "quantile"}

pytestmark = pytest.mark.filterwarnings("ignore")  # few calibration scores, casts


def random_images(n: int, seed: int = 0) -> Tensor:
    """Return noise (n, 1, 16, 16) in [-1, 1]."""
    noise = torch.rand(n, 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    return noise * 2 - 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """One folder per method: a minimal network, untrained, with calibration statistics."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, changes in CHANGES.items():
        cls = METHODS[name]
        config = cls.Config.for_profile("ci", channels=1, image_size=IMAGE_SIZE)
        method = cls(replace(config, **changes)).calibrate(random_images(6))
        method.reports_ = {"train": {"steps": 3, "seconds": 0.5}}
        method.save_pretrained(folder / name, seed=0, resize="squash", fingerprint="0")
    return folder


def copy_checkpoint(rng: np.random.Generator, checkpoints: Path, folder: Path) -> Path:
    """Copy one of the checkpoints to an odd name below ``folder``."""
    names = [name for name in CHANGES if name not in SLOW or rng.random() < 0.2]
    return Path(shutil.copytree(checkpoints / choose(rng, names), folder / choose(rng, FILE_NAMES)))


def use_checkpoint(folder: Path) -> None:
    """Load a checkpoint and save it again; score images unless costly settings have changed."""
    method = load_pretrained(folder)
    method.save_pretrained(folder.with_name("again"))
    assert load_pretrained(folder.with_name("again")).config == method.config
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    expected = METHODS[method.name].Config.for_profile("ci", channels=1, image_size=IMAGE_SIZE)
    expected = replace(expected, **CHANGES[method.name])
    cheap = {name: values[name] for name in CHEAP_FIELDS & values.keys()}
    if replace(expected, **cheap) == method.config and method.threshold_ is not None:
        prediction = method.predict(random_images(2, seed=1))
        assert prediction.image_score.isfinite().all()
        assert math.isfinite(method.threshold_)
    assert method.pixel_threshold_ is None or math.isfinite(method.pixel_threshold_)


# -------------------------------------------------------------------------------- weights

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", 3)


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """Return the JSON header and the tensors' bytes of a safetensors file."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def join_safetensors(header: dict, tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def corrupt_header(rng: np.random.Generator, header: dict) -> None:
    """Change one entry of the header of a safetensors file."""
    name = choose(rng, header)
    entry = header[name]
    match choose(rng, ("dtype", "shape", "offsets", "name", "gone", "metadata", "value", "swap")):
        case "dtype":
            entry["dtype"] = choose(rng, DTYPES)
        case "shape":
            shapes = ([], [0], [2**63], [-1], [2**40, 2**40], [1] * 999, "x", None, [1.5])
            entry["shape"] = choose(rng, shapes)
        case "offsets":
            offsets = ([0, 0], [4, 0], [0, 2**63], [-4, 4], [1, 5], [], [0], "x", [0, 1e300])
            entry["data_offsets"] = choose(rng, offsets)
        case "name":
            names = ("../../x", "network.", "", "a" * 9999, "map_mean", "pixel_threshold")
            header[choose(rng, names)] = header.pop(name)
        case "gone":
            header.pop(name)
        case "metadata":
            header["__metadata__"] = choose(rng, (1, [], {"a": 1}, {"a": "b" * 9999}, None))
        case "value":
            header[name] = hostile_value(rng)
        case "swap":  # the two may have the same shape
            partner = choose(rng, header)
            header[name], header[partner] = header[partner], header[name]


def corrupt_tensors(rng: np.random.Generator, tensors: dict[str, Tensor]) -> None:
    """Replace or remove one tensor, and sometimes add another."""
    name = choose(rng, tensors)
    value = tensors[name]
    replacements = {
        "missing": None,
        "half": value.flatten()[: value.numel() // 2].clone(),
        "number": torch.zeros(()),
        "nothing": torch.zeros(0),
        "more axes": value[None].clone(),
        "nan": torch.full_like(value.float(), torch.nan),
        "infinity": torch.full_like(value.float(), -torch.inf),
        "large": torch.full_like(value.float(), 3e38),
        "zeros": torch.zeros_like(value),
        "negative": -value.float(),
        "complex": value.to(torch.complex64),
        "half precision": value.half(),
        "bfloat16": value.bfloat16(),
        "double": value.double(),
        "integers": value.long(),
        "eight bits": value.float().to(torch.float8_e4m3fn),
        "truth": value.bool(),
    }
    del tensors[name]
    if (replacement := replacements[choose(rng, replacements)]) is not None:
        tensors[name] = replacement
    if rng.random() < 0.2:
        names = ("network.more", "../up", "calibration_scores", "map_std", "pixel_threshold")
        tensors[choose(rng, names)] = value.clone()


class CallWhenUnpickled:
    """Calls os.system when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("false",)


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "torch.save": lambda p: torch.save({"network.mean": torch.zeros(3)}, p),
    "pickle": lambda p: p.write_bytes(PICKLE),
    "another pickle": lambda p: p.write_bytes(pickle.dumps(CallWhenUnpickled())),
    "nothing": lambda p: p.write_bytes(b""),
    "huge header": lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "nested header": lambda p: p.write_bytes(struct.pack("<Q", 99_999) + b"[" * 99_999),
    "folder": lambda p: p.mkdir(),
    "itself": lambda p: p.symlink_to(p.name),
    "zeros": lambda p: p.symlink_to("/dev/zero"),
    "null": lambda p: p.symlink_to(os.devnull),
}


def weights_case(checkpoints: Path, rng: np.random.Generator, folder: Path) -> Case:
    checkpoint = copy_checkpoint(rng, checkpoints, folder)
    path = checkpoint / "model.safetensors"
    kinds = ("bytes", "bytes", "header", "header", "tensors", "tensors", "file", "good")
    kind = choose(rng, kinds)
    if kind == "bytes":
        path.write_bytes(corrupt(rng, path.read_bytes()))
    elif kind == "header":
        header, tensors = split_safetensors(path.read_bytes())
        corrupt_header(rng, header)
        path.write_bytes(join_safetensors(header, tensors))
    elif kind == "tensors":
        tensors = load_file(path)
        corrupt_tensors(rng, tensors)
        save_file(tensors, path)
    elif kind == "file":
        kind = choose(rng, ODD_FILES)
        path.unlink()
        ODD_FILES[kind](path)
    words = (checkpoint, "maps has")  # finite weights may still make a map overflow
    return Case(f"{kind} of {checkpoint.name}", partial(use_checkpoint, checkpoint), words)


def test_weights(tmp_path, checkpoints):
    check_inputs("weights", tmp_path, partial(weights_case, checkpoints))


# --------------------------------------------------------------------------- configurations


def hostile_value(rng: np.random.Generator) -> Any:
    """Draw a JSON value of an unexpected type or size."""
    nested = json.loads("[" * 50 + "1" + "]" * 50)
    return choose(
        rng,
        (
            *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63),
            *(10**18, 10**400, -(10**400), 2**20, 999, "", "x", "../../../etc/passwd", "/", "\0"),
            *("é\u202e", "a" * 20_000, "1", "nan", "pca", [], {}, [[]], [1], [0], [-1], [1] * 3000),
            *([10**9], [1, 2, 10**6], {"a": {"b": {}}}, {"steps": 1}, [None], ["x"], nested),
            *({"": 1}, {"x": [1, {"y": 2}]}, "line\nbreak", "resnet18", "denoiser", "efficientnet"),
        ),
    )


JSON_FAULTS: dict[str, Callable[[str], bytes]] = {
    "deep": lambda t: (t.rstrip()[:-1] + ', "x": ' + "[" * 99_999 + "}").encode(),
    "deep and valid": lambda t: (
        t.rstrip()[:-1] + ', "x": ' + '{"a":' * 5000 + "1" + "}" * 5001
    ).encode(),
    "digits": lambda t: (t.rstrip()[:-1] + ', "x": ' + "9" * 50_000 + "}").encode(),
    "huge": lambda t: t.replace("16", "1" + "0" * 4000).encode(),
    "exponent": lambda t: t.replace("16", "1e999").encode(),
    "nan": lambda t: t.replace("1.0", "NaN").encode(),
    "infinity": lambda t: t.replace("1.0", "-Infinity").encode(),
    "twice": lambda t: t.replace('"channels": 1', '"channels": 3, "channels": 1').encode(),
    "twice and wrong": lambda t: t.replace(
        '"channels": 1', '"channels": 1, "channels": 9'
    ).encode(),
    "mark": lambda t: b"\xef\xbb\xbf" + t.encode(),
    "utf-16": lambda t: t.encode("utf-16"),
    "latin": lambda t: t.replace('"seed"', '"é"').encode("latin1"),
    "surrogate": lambda t: t.replace('"seed"', '"\\ud800"').encode(),
    "comment": lambda t: b"// x\n" + t.encode(),
    "quotes": lambda t: t.replace('"', "'").encode(),
    "list": lambda t: f"[{t}]".encode(),
    "word": lambda t: b'"pca"',
    "nothing": lambda t: b"",
    "spaces": lambda t: b" " * 10_000,
    "zero": lambda t: t.encode() + b"\0",
}


def key_paths(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path to every value of nested mappings."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from key_paths(value, (*path, key))


def corrupt_values(rng: np.random.Generator, values: dict) -> str:
    """Replace a value, or remove, add or rename a key; return its path."""
    *path, key = choose(rng, key_paths(values))
    node = values
    for name in path:
        node = node[name]
    match choose(rng, ("value",) * 5 + ("gone", "more", "renamed")):
        case "value":
            node[key] = hostile_value(rng)
        case "gone":
            del node[key]
        case "more":
            node[choose(rng, ("x", "", "../x", "a" * 9999, "config"))] = hostile_value(rng)
        case "renamed":
            node[choose(rng, ("x", str(key).upper(), f"{key} "))] = node.pop(key)
    return ".".join(map(str, (*path, key)))


def corrupt_json(rng: np.random.Generator, path: Path, *more_kinds: str) -> str:
    """Change one value of a JSON file, its text, or its bytes; return what was changed."""
    text = path.read_text()
    kind = choose(rng, ("value",) * 6 + ("text", "text", "bytes", *more_kinds))
    if kind == "value":
        values = json.loads(text)
        kind = corrupt_values(rng, values)
        path.write_text(json.dumps(values))
    elif kind == "text":
        kind = choose(rng, JSON_FAULTS)
        path.write_bytes(JSON_FAULTS[kind](text))
    elif kind == "bytes":
        path.write_bytes(corrupt(rng, text.encode()))
    return kind


def configuration_case(checkpoints: Path, rng: np.random.Generator, folder: Path) -> Case:
    checkpoint = copy_checkpoint(rng, checkpoints, folder)
    path = checkpoint / "config.json"
    method = json.loads(path.read_text())["method"]
    kind = corrupt_json(rng, path, "good")
    words = (checkpoint, "unknown method", "maps has")
    return Case(f"{kind} of {method}", partial(use_checkpoint, checkpoint), words)


def test_configurations(tmp_path, checkpoints):
    check_inputs("configurations", tmp_path, partial(configuration_case, checkpoints))


# ----------------------------------------------------------------------- state of a training

TRAINING = TrainConfig(steps=6, batch_size=2, warmup_steps=1)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3))


def loss(network: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator)
    return network(images + noise).square().mean()


def train(workdir: Path) -> nn.Module:
    network = small_network()
    options: dict[str, Any] = {"seed": 3, "progress": False, "workdir": workdir}
    report = train_network(network, loss, random_images(4), TRAINING, **options)
    assert len(report.losses) == report.steps == TRAINING.steps
    return network


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory) -> Path:
    """The state of a training after half of its steps."""
    folder = tmp_path_factory.mktemp("half")
    network = small_network()
    state = TrainingState(network, random_images(4), TRAINING, 3, "train", folder, {})
    for _ in range(3):
        state.take_step(loss(network, random_images(2), state.generator))
    state.save()
    return folder / "train.state.safetensors"


def corrupt_numbers(rng: np.random.Generator, header: dict) -> None:
    """Change the numbers of a training state: its step and the like."""
    metadata = header["__metadata__"]
    numbers = json.loads(metadata["numbers"])
    if rng.random() < 0.3:
        texts = ("", "{", "[]", "3", "null", "[" * 9999, '{"step": 3}', "9" * 9999)
        metadata["numbers"] = choose(rng, texts)
        return
    numbers[choose(rng, numbers)] = hostile_value(rng)
    metadata["numbers"] = json.dumps(numbers)


def state_case(half_trained: Path, rng: np.random.Generator, folder: Path) -> Case:
    path = folder / half_trained.name
    data = half_trained.read_bytes()
    header, tensor_bytes = split_safetensors(data)
    kinds = ("bytes", "header", "tensors", "tensors", "numbers", "numbers", "file", "good")
    kind = choose(rng, kinds)
    if kind in ("header", "numbers"):
        (corrupt_header if kind == "header" else corrupt_numbers)(rng, header)
        path.write_bytes(join_safetensors(header, tensor_bytes))
    elif kind == "tensors":
        tensors = load_file(half_trained)
        corrupt_tensors(rng, tensors)
        save_file(tensors, path, header["__metadata__"])
    elif kind == "file":
        kind = choose(rng, ODD_FILES)
        ODD_FILES[kind](path)
    else:
        path.write_bytes(corrupt(rng, data) if kind == "bytes" else data)
    # Finite weights and moments may still make a loss overflow, which has its own error.
    return Case(kind, partial(train, folder), (path, "the loss is"), (FloatingPointError,))


def test_states(tmp_path, half_trained):
    check_inputs("states", tmp_path, partial(state_case, half_trained))
