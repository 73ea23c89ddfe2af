"""Measure time and memory of methods at inference in one run, so that ratios can be compared.

All settings score the same images in turn, for several rounds, so that other load of the machine
affects all of them. Memory counts the tensors that exist at the same time, not the memory of the
process, which never decreases.
"""

import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffad_lite.core.files import write_json
from diffad_lite.data.datasets import load_dataset
from diffad_lite.experiments.evaluate import bundled_checkpoint
from diffad_lite.experiments.machine import machine_record
from diffad_lite.experiments.run import Run
from diffad_lite.methods.base import Method, get_method, load_pretrained

# Name -> method and changed settings, on the bundled weights of elpv mono.
SETTINGS: dict[str, tuple[str, dict[str, int]]] = {
    "pca": ("pca", {}),
    "padim": ("padim", {}),
    "anoddpm": ("anoddpm", {}),
    "anoddpm, 10 steps": ("anoddpm", {"noise_level": 99, "steps": 10, "n_noises": 1}),
    "anoddpm, 600 steps": ("anoddpm", {"noise_level": 599, "steps": 600, "n_noises": 1}),
    "diffusionad": ("diffusionad", {}),
    "glad": ("glad", {}),
    "mdps": ("mdps", {}),
    "bernoulli": ("bernoulli", {}),
    "bernoulli, 1 chain": ("bernoulli", {"n_chains": 1}),
    "grad": ("grad", {}),
}
FITTED_HERE = ("pca", "padim")


class TensorsAlive(TorchDispatchMode):
    """Counts the bytes of tensors that its ``with`` block creates; ``peak`` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages that it creates."""
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in args if torch.is_tensor(x)}
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(x) and (storage := x.untyped_storage())._cdata not in known:
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


def measure(
    methods: Mapping[str, Method], images: torch.Tensor, *, rounds: int = 3
) -> dict[str, dict[str, Any]]:
    """Score the images with all methods in turn: ``rounds`` rounds after a warm-up.

    Args:
        methods: name -> fitted method.
        images: (B, C, H, W), float32 in [-1, 1].
        rounds: number of rounds, from 1.

    Returns:
        name -> ``ms`` per image, one value per round; ``mb`` of tensors that exist at the same
        time; ``evaluations`` of networks per image; ``parameters``.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    measured = {}
    for name, method in methods.items():
        with method.count_evaluations() as evaluations, TensorsAlive() as alive:
            method.predict(images)
        measured[name] = {
            "ms": [],
            "mb": alive.peak / 2**20,
            "evaluations": evaluations[0] / len(images),
            "parameters": sum(p.numel() for p in method.network.parameters()),
        }
    for _ in range(rounds):
        for name, method in methods.items():
            started = time.perf_counter()
            method.predict(images)
            if method.device.type == "cuda":
                torch.cuda.synchronize()
            measured[name]["ms"].append(1000 * (time.perf_counter() - started) / len(images))
    return measured


def measure_bundled(
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    n_images: int = 16,
    rounds: int = 3,
) -> dict[str, dict[str, Any]]:
    """Measure :data:`SETTINGS` with bundled weights on cells of ``elpv mono``; write the result.

    PCA and PaDiM have no bundled weights; they are fitted here, in seconds. Other methods without
    bundled weights are skipped.

    Returns:
        what :func:`measure` returns; ``out`` contains it as ``settings``, with the machine.

    Raises:
        ValueError: no images or rounds, or none of the methods is available.
    """
    if n_images < 1:
        raise ValueError(f"n_images must be at least 1, got {n_images}")
    data = load_dataset("elpv", "mono")
    methods = {}
    for name in SETTINGS if names is None else names:
        method, changes = SETTINGS[name]
        folder = bundled_checkpoint(method, "elpv", "mono")
        if folder.is_dir():
            loaded = load_pretrained(folder)
            methods[name] = loaded.with_settings(**changes) if changes else loaded
        elif method in FITTED_HERE:
            config = Run(method, "elpv", "mono").configure(data)
            methods[name] = get_method(method)(config).fit(
                data.train, data.calibration, seed=0, progress=False
            )
    if not methods:
        raise ValueError("no method to measure: give a name of speed.SETTINGS that has weights")
    images = data.test_images[:n_images]
    measured = measure(methods, images, rounds=rounds)
    device = next(iter(methods.values())).device
    record = {"n_images": len(images), "rounds": rounds, **machine_record(device)}
    write_json(Path(out), record | {"settings": measured})
    return measured
