"""Fuzzing of checkpoints: weights, their configuration, and the state of a training."""

import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fuzz import NAMES, PICKLE, Case, damaged, pick, survive
from torch import Tensor, nn

from diffad_lite.methods.base import METHODS, load_pretrained
from diffad_lite.training.loop import train_network
from diffad_lite.training.state import TrainConfig, TrainingState

SIDE = 16
TINY = {"base_channels": 4, "channel_mults": (1, 2), "attention_levels": ()}
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
RARE = ("diffusionad", "padim", "bank", "grad")  # as they take a while
INFERENCE = {"smooth_sigma", "calibrate", "top_fraction", "quantile"}

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # few calibration scores, and casts
    pytest.mark.skipif(os.name == "nt", reason="signals and links are those of POSIX"),
]


def pictures(n: int, seed: int = 0) -> Tensor:
    noise = torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return noise * 2 - 1


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """One folder a method: untrained networks with statistics, as small as they can be."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, changes in CHANGES.items():
        cls = METHODS[name]
        config = cls.Config.for_profile("ci", channels=1, image_size=SIDE)
        method = cls(replace(config, **changes)).calibrate(pictures(6))
        method.reports_ = {"train": {"steps": 3, "seconds": 0.5}}
        method.save_pretrained(folder / name, seed=0, resize="squash", fingerprint="0")
    return folder


def copied(rng: np.random.Generator, checkpoints: Path, folder: Path) -> Path:
    names = [name for name in CHANGES if name not in RARE or rng.random() < 0.2]
    return Path(shutil.copytree(checkpoints / pick(rng, names), folder / pick(rng, NAMES)))


def use(folder: Path) -> None:
    """Load a checkpoint; score images where only cheap settings may have changed."""
    before = load_pretrained(folder)
    before.save_pretrained(folder.with_name("again"))
    again = load_pretrained(folder.with_name("again"))
    assert again.config == before.config
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    usual = METHODS[before.name].Config.for_profile("ci", channels=1, image_size=SIDE)
    usual = replace(usual, **CHANGES[before.name])
    cheap = {name: values[name] for name in INFERENCE & values.keys()}
    if replace(usual, **cheap) == before.config and before.threshold_ is not None:
        prediction = before.predict(pictures(2, seed=1))
        assert prediction.image_score.isfinite().all()
        assert math.isfinite(before.threshold_)


# -------------------------------------------------------------------------------- weights

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "X", 3)


def edited_header(data: bytes, change: Callable[[dict], object]) -> bytes:
    """A safetensors file whose JSON header was changed."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def odd_header(rng: np.random.Generator, header: dict) -> None:
    name = pick(rng, header)
    entry = header[name]
    match pick(rng, ("dtype", "shape", "offsets", "name", "gone", "metadata", "value", "both")):
        case "dtype":
            entry["dtype"] = pick(rng, DTYPES)
        case "shape":
            shapes = ([], [0], [2**63], [-1], [2**40, 2**40], [1] * 999, "x", None, [1.5])
            entry["shape"] = pick(rng, shapes)
        case "offsets":
            offsets = ([0, 0], [4, 0], [0, 2**63], [-4, 4], [1, 5], [], [0], "x", [0, 1e300])
            entry["data_offsets"] = pick(rng, offsets)
        case "name":
            names = ("../../x", "network.", "", "a" * 9999, "map_mean")
            header[pick(rng, names)] = header.pop(name)
        case "gone":
            header.pop(name)
        case "metadata":
            header["__metadata__"] = pick(rng, (1, [], {"a": 1}, {"a": "b" * 9999}, None))
        case "value":
            header[name] = hostile(rng)
        case "both":  # swapped, which may fit or not
            other = pick(rng, header)
            header[name], header[other] = header[other], header[name]


def odd_tensors(rng: np.random.Generator, tensors: dict[str, Tensor]) -> None:
    name = pick(rng, tensors)
    value = tensors[name]
    odd = {
        "gone": None,
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
    chosen = pick(rng, odd)
    if odd[chosen] is None:
        del tensors[name]
    else:
        tensors[name] = odd[chosen]
    if rng.random() < 0.2:
        names = ("network.more", "../up", "calibration_scores", "map_std")
        tensors[pick(rng, names)] = value.clone()


def torch_pickle(path: Path) -> None:
    class Call:
        def __reduce__(self) -> tuple:
            return os.system, ("false",)

    path.write_bytes(pickle.dumps(Call()))


FILES: dict[str, Callable[[Path], object]] = {
    "torch.save": lambda p: torch.save({"network.mean": torch.zeros(3)}, p),
    "pickle": lambda p: p.write_bytes(PICKLE),
    "another pickle": torch_pickle,
    "nothing": lambda p: p.write_bytes(b""),
    "huge header": lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
    "nested header": lambda p: p.write_bytes(struct.pack("<Q", 99_999) + b"[" * 99_999),
    "folder": lambda p: p.mkdir(),
    "itself": lambda p: p.symlink_to(p.name),
    "zeros": lambda p: p.symlink_to("/dev/zero"),
    "null": lambda p: p.symlink_to(os.devnull),
}


def weights_case(rng: np.random.Generator, checkpoints: Path, folder: Path) -> Case:
    checkpoint = copied(rng, checkpoints, folder)
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    what = pick(rng, ("bytes", "bytes", "header", "header", "tensors", "tensors", "file", "good"))
    if what == "bytes":
        path.write_bytes(damaged(rng, data))
    elif what == "header":
        path.write_bytes(edited_header(data, lambda header: odd_header(rng, header)))
    elif what == "tensors":
        tensors = load_file(path)
        odd_tensors(rng, tensors)
        save_file(tensors, path)
    elif what == "file":
        what = pick(rng, FILES)
        path.unlink()
        FILES[what](path)
    named = (checkpoint, "maps has")  # finite weights may still overflow in what they compute
    return Case(f"{what} of {checkpoint.name}", lambda: use(checkpoint), named)


def test_weights(tmp_path, checkpoints):
    survive("weights", tmp_path, lambda rng, folder: weights_case(rng, checkpoints, folder))


# --------------------------------------------------------------------------- configurations


def nested(depth: int, inside: Any = 1) -> Any:
    for _ in range(depth):
        inside = [inside]
    return inside


def hostile(rng: np.random.Generator) -> Any:
    """A JSON value that nobody asked for."""
    return pick(
        rng,
        (
            *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63),
            *(10**18, 10**400, -(10**400), 2**20, 999, "", "x", "../../../etc/passwd", "/", "\0"),
            *("é\u202e", "a" * 20_000, "1", "nan", "pca", [], {}, [[]], [1], [0], [-1], [1] * 3000),
            *([10**9], [1, 2, 10**6], {"a": {"b": {}}}, {"steps": 1}, [None], ["x"], nested(50)),
            *({"": 1}, {"x": [1, {"y": 2}]}, "line\nbreak", "resnet18", "denoiser", "efficientnet"),
        ),
    )


TEXTS: dict[str, Callable[[str], bytes]] = {
    "deep": lambda t: (t.rstrip()[:-1] + ', "x": ' + "[" * 99_999 + "}").encode(),
    "deep and whole": lambda t: (
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


def places(values: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every value of nested JSON."""
    for key, value in values.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def replace_one(rng: np.random.Generator, values: dict) -> str:
    """Put a hostile value somewhere, or take a key away, or add one."""
    *path, last = pick(rng, places(values))
    node = values
    for key in path:
        node = node[key]
    match pick(rng, ("value",) * 5 + ("gone", "more", "renamed")):
        case "value":
            node[last] = hostile(rng)
        case "gone":
            del node[last]
        case "more":
            node[pick(rng, ("x", "", "../x", "a" * 9999, "config"))] = hostile(rng)
        case "renamed":
            node[pick(rng, ("x", str(last).upper(), f"{last} "))] = node.pop(last)
    return ".".join(map(str, (*path, last)))


def configuration_case(rng: np.random.Generator, checkpoints: Path, folder: Path) -> Case:
    checkpoint = copied(rng, checkpoints, folder)
    path = checkpoint / "config.json"
    text = path.read_text()
    what = pick(rng, ("value",) * 6 + ("text", "text", "bytes", "good"))
    if what == "value":
        values = json.loads(text)
        what = replace_one(rng, values)
        path.write_text(json.dumps(values))
    elif what == "text":
        what = pick(rng, TEXTS)
        path.write_bytes(TEXTS[what](text))
    elif what == "bytes":
        path.write_bytes(damaged(rng, text.encode()))
    named = (checkpoint, "unknown method", "maps has")
    return Case(f"{what} of {json.loads(text)['method']}", lambda: use(checkpoint), named)


def test_configurations(tmp_path, checkpoints):
    survive(
        "configurations", tmp_path, lambda rng, folder: configuration_case(rng, checkpoints, folder)
    )


# ----------------------------------------------------------------------- state of a training

TRAINING = TrainConfig(steps=6, batch_size=2, warmup_steps=1)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3))


def error_of(network: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator)
    return network(images + noise).square().mean()


def train(workdir: Path) -> nn.Module:
    network = small_network()
    options: dict[str, Any] = {"seed": 3, "progress": False, "workdir": workdir}
    report = train_network(network, error_of, pictures(4), TRAINING, **options)
    assert len(report.losses) == report.steps == TRAINING.steps
    return network


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory) -> Path:
    """The state of a training after half of its steps."""
    folder = tmp_path_factory.mktemp("half")
    network = small_network()
    state = TrainingState(network, pictures(4), TRAINING, 3, "train", folder, {})
    for _ in range(3):
        state.take_step(error_of(network, pictures(2), state.generator))
    state.save()
    return folder / "train.state.safetensors"


def odd_numbers(rng: np.random.Generator, header: dict) -> None:
    metadata = header["__metadata__"]
    numbers = json.loads(metadata["numbers"])
    if rng.random() < 0.3:
        texts = ("", "{", "[]", "3", "null", "[" * 9999, '{"step": 3}', "9" * 9999)
        metadata["numbers"] = pick(rng, texts)
        return
    numbers[pick(rng, numbers)] = hostile(rng)
    metadata["numbers"] = json.dumps(numbers)


def state_case(rng: np.random.Generator, half_trained: Path, folder: Path) -> Case:
    path = folder / half_trained.name
    data = half_trained.read_bytes()
    ways = ("bytes", "header", "tensors", "tensors", "numbers", "numbers", "file", "good")
    what = pick(rng, ways)
    if what in ("header", "numbers"):
        change = {"header": odd_header, "numbers": odd_numbers}[what]
        path.write_bytes(edited_header(data, lambda header: change(rng, header)))
    elif what == "tensors":
        tensors = load_file(half_trained)
        odd_tensors(rng, tensors)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        save_file(tensors, path, header["__metadata__"])
    elif what == "file":
        what = pick(rng, FILES)
        FILES[what](path)
    else:
        path.write_bytes(damaged(rng, data) if what == "bytes" else data)
    # Finite weights and moments may still make a loss overflow, which has an error of its own.
    return Case(what, lambda: train(folder), (path, "the loss is"), (FloatingPointError,))


def test_states(tmp_path, half_trained):
    survive("states", tmp_path, lambda rng, folder: state_case(rng, half_trained, folder))
