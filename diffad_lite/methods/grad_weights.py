"""Weights of patterns, without labels: rare ones count more, those that normal images have, less.

What a crippled diffusion model draws is long-tailed (a few patterns make most of it) and unlabelled
(much of it is normal). Locations are clustered by their features; a cluster's weight follows from
its share among contrastive and among normal locations. The rule is ours: GRAD's own could not be
read (see :mod:`.grad`).
"""

import copy
from dataclasses import dataclass

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from diffad_lite.config import check_ranges
from diffad_lite.networks import PatchDetector

SAMPLED = 20_000  # locations that the clusters are found from
CLIP = 10.0  # weights lie within 1 / CLIP and CLIP


@dataclass(frozen=True)
class WeightConfig:
    """Configuration of :class:`Reweighting`.

    Attributes:
        n_clusters: K.
        flatten_contrastive: exponent that makes rare contrastive patterns count more.
        flatten_normal: likewise for normal ones.
        filter_normal: exponent that takes weight from patterns which normal images have.
    """

    n_clusters: int = 32
    flatten_contrastive: float = 0.5
    flatten_normal: float = 0.5
    filter_normal: float = 2.0

    def __post_init__(self) -> None:
        """Raise ValueError for numbers that cannot be."""
        check_ranges(self, n_clusters=(1, 10**6))
        for name in ("flatten_contrastive", "flatten_normal", "filter_normal"):
            check_ranges(self, **{name: (0, 10)})


def pattern_weights(
    contrastive: Tensor, normal: Tensor, config: WeightConfig
) -> tuple[Tensor, Tensor]:
    """Weights of clusters from their shares.

    ``w ~ c^-a (1 - n / (n + c))^eta`` and ``v ~ n^-b``, each of mean 1 over its locations, then
    clipped.

    Args:
        contrastive: share c of each cluster among contrastive locations (K,), positive.
        normal: likewise n among normal ones.
        config: the exponents a, b and eta.

    Returns:
        ``w`` for contrastive and ``v`` for normal locations, (K,) each.
    """
    foreign = contrastive / (contrastive + normal)
    w = contrastive**-config.flatten_contrastive * foreign**config.filter_normal
    v = normal**-config.flatten_normal
    w, v = w / (w * contrastive).sum(), v / (v * normal).sum()
    return w.clamp(1 / CLIP, CLIP), v.clamp(1 / CLIP, CLIP)


class Reweighting(nn.Module):
    """Clusters of a frozen detector's features, and their weights.

    Args:
        detector: as large as the one whose features are clustered.
        config: see :class:`WeightConfig`.
        width: of its features.
    """

    contrastive: Tensor
    normal: Tensor
    w: Tensor
    v: Tensor
    centres: Tensor

    def __init__(self, detector: PatchDetector, config: WeightConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.snapshot = copy.deepcopy(detector).requires_grad_(False)
        for name in ("contrastive", "normal", "w", "v"):
            self.register_buffer(name, torch.ones(config.n_clusters))
        self.register_buffer("centres", torch.zeros(config.n_clusters, width))

    @torch.no_grad()
    def fit(
        self,
        detector: PatchDetector,
        contrastive: Tensor,
        drawn: Tensor,
        normal: Tensor,
        seed: int,
    ) -> None:
        """Freeze a copy of the detector, cluster its features, and set the weights.

        A detector that goes on learning would move the features under the clusters; hence the copy.

        Args:
            detector: trained for a while.
            contrastive: images (N, C, H, W).
            drawn: which of their locations count, bool (N, h, w).
            normal: images (M, C, H, W).
            seed: of the clusters.
        """
        self.snapshot.load_state_dict(detector.state_dict())
        points = [self._points(contrastive)[drawn.flatten()], self._points(normal)]
        rng = torch.Generator().manual_seed(seed)
        sample = torch.cat([p[torch.randperm(len(p), generator=rng)[:SAMPLED]] for p in points])
        k = min(self.config.n_clusters, len(sample))
        found = MiniBatchKMeans(k, random_state=seed, n_init=3).fit(sample.numpy())
        self.centres[:k] = torch.from_numpy(found.cluster_centers_).to(self.centres)
        self.centres[k:] = 10.0  # far from everything
        for name, own in zip(("contrastive", "normal"), points, strict=True):
            counts = torch.bincount(self._nearest(own.to(self.centres)), minlength=len(self.w))
            getattr(self, name).copy_((counts + 1) / (counts + 1).sum())  # none is 0
        w, v = pattern_weights(self.contrastive, self.normal, self.config)
        self.w.copy_(w)
        self.v.copy_(v)

    def _points(self, images: Tensor) -> Tensor:
        """Features of every location (n, width), on the CPU."""
        device = self.centres.device
        parts = [self.snapshot.features(part.to(device)).cpu() for part in images.split(32)]
        return torch.cat(parts).permute(0, 2, 3, 1).flatten(0, 2)

    def _nearest(self, points: Tensor) -> Tensor:
        return torch.cdist(points, self.centres).argmin(1)

    @torch.no_grad()
    def clusters(self, images: Tensor) -> Tensor:
        """Cluster of each location, (B, h, w)."""
        features = self.snapshot.features(images).float()
        nearest = self._nearest(features.permute(0, 2, 3, 1).flatten(0, 2))
        return nearest.view(len(images), *features.shape[-2:])
