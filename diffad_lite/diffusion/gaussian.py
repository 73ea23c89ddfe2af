"""Gaussian diffusion: closed forms, one DDPM or DDIM step, samplers as generators, the loss.

A *noise predictor* is any callable ``predictor(x_t, t) -> noise_hat`` with ``x_t`` (B, C, H, W) and
``t`` an int64 tensor (B,). Everything here is a few lines of arithmetic around it.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffad_lite.diffusion.schedules import NoiseSchedule

NoisePredictor = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]
State = TypeVar("State")


def randn(like: Tensor, generators: Generators) -> Tensor:
    """Draw standard normal noise in the shape of ``like`` (B, ...), on the CPU.

    With one generator for each image, the noise of an image does not depend on the other images
    of its batch. With a single generator it does.
    """
    return draw(torch.randn, like.shape, generators).to(like)


def draw(sampler: Callable[..., Tensor], shape: Sequence[int], generators: Generators) -> Tensor:
    """Draw random numbers (B, ...) by ``torch.randn`` or ``torch.rand``; see :func:`randn`.

    Raises:
        ValueError: the number of generators is not the batch size.
    """
    if isinstance(generators, torch.Generator):
        return sampler(shape, generator=generators)
    if len(generators) != shape[0]:
        raise ValueError(
            f"{len(generators)} generators for a batch of {shape[0]} images; "
            "give a single generator, or one for each image"
        )
    return torch.stack([sampler(shape[1:], generator=g) for g in generators])


def noise_generators(keys: Sequence[str], seed: int) -> list[torch.Generator]:
    """Return one CPU generator per image, seeded by (seed, key)."""
    digests = [hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8] for key in keys]
    # 63 bits, the range of manual_seed
    return [torch.Generator().manual_seed(int.from_bytes(d, "big") >> 1) for d in digests]


class Step(NamedTuple):
    """One state of a sampling trajectory.

    Attributes:
        t: timestep of ``x`` (-1 = clean).
        x: the state (B, C, H, W).
        x0_hat: clean estimate of the step that led here; None for the first state.
    """

    t: int
    x: Tensor
    x0_hat: Tensor | None


def final_step(steps: Iterable[State]) -> State:
    """Return the last state of a sampler; earlier ones are not kept."""
    return deque(steps, maxlen=1)[0]


class GaussianDiffusion:
    """DDPM (Ho et al. 2020) and DDIM (Song et al. 2021) over one noise schedule.

    Args:
        schedule: the forward process.
        clip: bound of the clean estimate while sampling; images are in [-1, 1]. None does not
            clip, for data without bounds, such as the 1-D toy.
    """

    def __init__(self, schedule: NoiseSchedule, clip: float | None = 1.0) -> None:
        self.schedule = schedule
        self.clip = clip

    def add_noise(self, x0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Return ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` (Ho et al., eq. 4)."""
        abar = self.schedule.alpha_bar(t, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def predict_x0(self, x_t: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """Return the clean image that ``noise`` implies: eq. 4 solved for ``x_0``, not clipped."""
        abar = self.schedule.alpha_bar(t, x_t)
        return (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()

    def predict_noise(self, x_t: Tensor, t: int | Tensor, x0: Tensor) -> Tensor:
        """Return the noise that a clean image implies: eq. 4 solved for ``eps``; t >= 0."""
        abar = self.schedule.alpha_bar(t, x_t)
        return (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()

    def posterior(
        self, x_t: Tensor, x0: Tensor, t: int | Tensor, t_prev: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and variance of ``q(x_{t_prev} | x_t, x_0)`` (Ho et al., eq. 6-7).

        Args:
            x_t: the state (B, C, H, W).
            x0: the clean images (B, C, H, W).
            t: timestep of ``x_t``, 0 .. T-1.
            t_prev: any earlier timestep, -1 .. t-1.

        Returns:
            mean (B, C, H, W) and variance (shaped to broadcast over it).
        """
        abar, abar_prev = self.schedule.alpha_bar(t, x_t), self.schedule.alpha_bar(t_prev, x_t)
        alpha = abar / abar_prev  # of the whole stride; alpha_t when t_prev = t - 1
        mean = (
            abar_prev.sqrt() * (1 - alpha) / (1 - abar) * x0
            + alpha.sqrt() * (1 - abar_prev) / (1 - abar) * x_t
        )
        return mean, (1 - alpha) * (1 - abar_prev) / (1 - abar)

    def clean_estimate(self, x_t: Tensor, t: int | Tensor, noise_hat: Tensor) -> Tensor:
        """Return ``predict_x0``, clipped to the range of the data as the samplers do."""
        x0_hat = self.predict_x0(x_t, t, noise_hat)
        return x0_hat if self.clip is None else x0_hat.clamp(-self.clip, self.clip)

    def ddpm_step(
        self, x_t: Tensor, t: int, t_prev: int, noise_hat: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take one ancestral step (Ho et al., algorithm 2, variance ``beta_tilde``).

        Returns:
            ``x_{t_prev}`` and the clean estimate; no noise is added when ``t_prev = -1``.
        """
        x0_hat = self.clean_estimate(x_t, t, noise_hat)
        mean, variance = self.posterior(x_t, x0_hat, t, t_prev)
        return mean + variance.sqrt() * noise, x0_hat

    def ddim_step(
        self, x_t: Tensor, t: int, t_next: int, noise_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take one deterministic step (Song et al. 2021, eq. 12 with sigma = 0).

        ``t_next < t`` denoises; ``t_next > t`` encodes by the same formula, run backwards.

        Returns:
            ``x_{t_next}`` and the clean estimate.
        """
        x0_hat = self.clean_estimate(x_t, t, noise_hat)
        # Where the estimate was clipped, the noise must change, too: together they give x_t.
        if self.clip is not None and t >= 0:
            noise_hat = self.predict_noise(x_t, t, x0_hat)
        return self.add_noise(x0_hat, t_next, noise_hat), x0_hat

    def ddpm_sample(
        self,
        predictor: NoisePredictor,
        x_t: Tensor,
        timesteps: Sequence[int],
        generators: Generators,
    ) -> Iterator[Step]:
        """Sample ancestrally along ``timesteps`` (decreasing) and yield every state.

        ``final_step(diffusion.ddpm_sample(...)).x`` is the sample.
        """
        yield Step(timesteps[0], x_t, None)
        for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
            noise_hat = predictor(x_t, torch.full((len(x_t),), t, device=x_t.device))
            noise = randn(x_t, generators) if t_prev >= 0 else torch.zeros_like(x_t)
            x_t, x0_hat = self.ddpm_step(x_t, t, t_prev, noise_hat, noise)
            yield Step(t_prev, x_t, x0_hat)

    def ddim_sample(
        self, predictor: NoisePredictor, x_t: Tensor, timesteps: Sequence[int]
    ) -> Iterator[Step]:
        """Sample deterministically along ``timesteps`` (decreasing) and yield every state.

        With a single timestep, the sample is the one-step estimate ``x0_hat(x_t)``.
        """
        yield Step(timesteps[0], x_t, None)
        for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
            noise_hat = predictor(x_t, torch.full((len(x_t),), t, device=x_t.device))
            x_t, x0_hat = self.ddim_step(x_t, t, t_prev, noise_hat)
            yield Step(t_prev, x_t, x0_hat)

    def ddim_encode(
        self, predictor: NoisePredictor, x0: Tensor, timesteps: Sequence[int]
    ) -> Iterator[Step]:
        """Run DDIM from the image to the noise along ``timesteps`` (increasing).

        The predictor is evaluated at the *target* timestep, since the clean image has none.
        Encoding and decoding give the image back only in the limit of many steps.
        """
        yield Step(-1, x0, None)
        x_t = x0
        for t, t_next in zip([-1, *timesteps[:-1]], timesteps, strict=True):
            noise_hat = predictor(x_t, torch.full((len(x0),), t_next, device=x0.device))
            x0_hat = self.predict_x0(x_t, t, noise_hat)
            x_t = self.add_noise(x0_hat, t_next, noise_hat)
            yield Step(t_next, x_t, x0_hat)

    def loss(self, predictor: NoisePredictor, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return ``E || eps - eps_theta(x_t, t) ||^2`` per element (Ho et al., eq. 14)."""
        return F.mse_loss(predictor(self.add_noise(x0, t, noise), t).float(), noise)
