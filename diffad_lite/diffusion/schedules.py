"""Noise schedules: how much noise the forward process has added after each step.

Convention of the whole package: ``t`` is an integer 0 .. T-1, and ``alphas_cumprod[t]`` is
``abar`` *after* step ``t + 1``. The clean image has ``t = -1`` and ``abar = 1``.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

BetaSchedule = Literal["linear", "cosine", "scaled_linear"]


def make_betas(name: BetaSchedule, num_timesteps: int = 1000) -> Tensor:
    """Return the variances ``beta_t`` of the forward steps.

    Args:
        name: ``"linear"`` (Ho et al. 2020, section 4: 1e-4 to 0.02), ``"cosine"`` (Nichol and
            Dhariwal 2021, eq. 17, capped at 0.999) or ``"scaled_linear"`` (linear in the square
            root, 0.00085 to 0.012; the schedule of latent diffusion's code).
        num_timesteps: T. The end points of the linear schedules are not rescaled with T.

    Returns:
        float64 tensor (T,), values in (0, 1).

    Raises:
        ValueError: unknown name, or T < 1.
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if name == "linear":
        return torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(0.00085**0.5, 0.012**0.5, num_timesteps, dtype=torch.float64) ** 2
    if name == "cosine":
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown beta schedule {name!r}; known: {', '.join(get_args(BetaSchedule))}")


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process ``q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)``.

    Ho et al. 2020, eq. 4.

    Attributes:
        betas: float64 (T,).
    """

    betas: Tensor

    @classmethod
    def named(cls, name: BetaSchedule, num_timesteps: int = 1000) -> "NoiseSchedule":
        """Return a named schedule; see :func:`make_betas`."""
        return cls(make_betas(name, num_timesteps))

    @cached_property
    def _alpha_bars(self) -> Tensor:
        # A 1 is appended at the end, so that index -1 is the clean image.
        return torch.cat([torch.cumprod(1 - self.betas, 0), torch.ones(1, dtype=torch.float64)])

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> Tensor:
        """``abar_t = prod_{s<=t} (1 - beta_s)``, float64 (T,), decreasing."""
        return self._alpha_bars[:-1]

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ``abar_t / (1 - abar_t)``, float64 (T,)."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def alpha_bar(self, t: int | Tensor, like: Tensor) -> Tensor:
        """Return ``abar_t`` in the dtype of ``like`` (B, ...), shaped to multiply it.

        Args:
            t: one timestep, or one for each image (B,); -1 .. T-1.
            like: the tensor that ``abar_t`` will multiply.

        Raises:
            ValueError: a timestep is out of range.
        """
        t = torch.as_tensor(t).cpu().long()  # one transfer from a GPU, not three
        if t.min() < -1 or t.max() >= self.num_timesteps:
            raise ValueError(
                f"timesteps {t.min().item()} to {t.max().item()} are not all in "
                f"-1..{self.num_timesteps - 1}"
            )
        abar = self._alpha_bars[t].to(like)
        return abar.reshape(-1, *[1] * (like.ndim - 1)) if abar.ndim else abar

    def timesteps(self, start: int | None = None, steps: int | None = None) -> list[int]:
        """Return the timesteps of a sampler, from ``start`` down, evenly spaced ("trailing").

        After the last one comes -1, the clean image.

        Args:
            start: first timestep, 0 .. T-1; default T-1, pure noise.
            steps: number of network evaluations, 1 .. start+1; default all.

        Raises:
            ValueError: either is out of range.
        """
        start = self.num_timesteps - 1 if start is None else start
        if not 0 <= start < self.num_timesteps:
            raise ValueError(f"start must be in 0..{self.num_timesteps - 1}, got {start}")
        steps = start + 1 if steps is None else steps
        if not 1 <= steps <= start + 1:
            raise ValueError(f"steps must be in 1..{start + 1} from timestep {start}, got {steps}")
        return [round((start + 1) * (steps - i) / steps) - 1 for i in range(steps)]

    def strided_timesteps(self, start: int, stride: int, first: int = 0) -> list[int]:
        """Return ``first``, ``first + stride``, ... below ``start``, decreasing ("leading").

        The grids of public codes: an image is noised to ``start``, yet the sampler takes it for an
        image at the largest of these timesteps.

        Args:
            start: timestep that images are noised to, above ``first``, at most T-1.
            stride: distance of two timesteps, at least 1.
            first: the last timestep of the sampler, at least 0.

        Raises:
            ValueError: ``start`` or ``stride`` is out of range.
        """
        if not first < start < self.num_timesteps or stride < 1:
            raise ValueError(
                f"start must be in {first + 1}..{self.num_timesteps - 1} and stride at least 1, "
                f"got {start} and {stride}"
            )
        return list(range(first, start, stride))[::-1]
