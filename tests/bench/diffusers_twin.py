"""The same network and loops in two versions: ours, and with diffusers.

Both have the widths, blocks and attention of the lite AnoDDPM, and the same precision, batch and
images. They differ in modules, schedule, optimiser step and weight average.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffad_lite.diffusion.gaussian import GaussianDiffusion, final_step, randn
from diffad_lite.diffusion.schedules import NoiseSchedule
from diffad_lite.methods.denoiser import Denoiser, DenoiserConfig
from diffad_lite.networks.unet import UNet
from diffad_lite.training.loop import supports_bf16, train_network
from diffad_lite.training.state import TrainConfig

CONFIG = DenoiserConfig()
CHANNELS = 1
STEPS = 10  # of DDIM, when images are sampled
LOSS = Denoiser(CONFIG, CHANNELS).loss


class Unshuffled(nn.Module):
    """A diffusers network behind a pixel-unshuffle of ``side``; 1 is the network alone."""

    def __init__(self, side: int, image_size: int) -> None:
        super().__init__()
        c, self.side = CONFIG, side
        self.inner = UNet2DModel(
            sample_size=image_size // side,
            in_channels=CHANNELS * side**2,
            out_channels=CHANNELS * side**2,
            block_out_channels=tuple(c.base_channels * m for m in c.channel_mults),
            layers_per_block=c.blocks_per_level,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=8,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Estimate the noise (B, C, H, W) of x (B, C, H, W) at timesteps t (B,)."""
        noise_hat = self.inner(F.pixel_unshuffle(x, self.side), t).sample
        return F.pixel_shuffle(noise_hat, self.side)


def our_network(side: int) -> UNet:
    """Return the denoiser of the lite profile, with a pixel-unshuffle of ``side``."""
    return Denoiser(replace(CONFIG, unshuffle=side), CHANNELS).network


def train_ours(network: nn.Module, images: Tensor, steps: int, batch_size: int) -> None:
    """Train with the loop of the package."""
    config = TrainConfig(steps=steps, batch_size=batch_size)
    train_network(network, LOSS, images, config, seed=0, progress=False)


def train_theirs(network: nn.Module, images: Tensor, steps: int, batch_size: int) -> None:
    """Train as in the diffusers example of unconditional training."""
    scheduler = DDPMScheduler(num_train_timesteps=CONFIG.num_timesteps)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, weight_decay=0.0)
    ema = EMAModel(network.parameters(), decay=0.999)
    device = next(network.parameters()).device
    network.train()
    for _ in range(steps):
        clean = images[torch.randint(len(images), (batch_size,))].to(device)
        noise = torch.randn(clean.shape, device=device)
        t = torch.randint(CONFIG.num_timesteps, (batch_size,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=supports_bf16(device)):
            noise_hat = network(scheduler.add_noise(clean, noise, t), t)
            loss = F.mse_loss(noise_hat.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        loss.item()


@torch.no_grad()
def sample_ours(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Sample images (B, C, H, W) with ten steps of DDIM."""
    device = next(network.parameters()).device
    schedule = NoiseSchedule.named(CONFIG.beta_schedule, CONFIG.num_timesteps)
    x = randn(torch.empty(shape, device=device), torch.Generator().manual_seed(0))
    timesteps = schedule.timesteps(CONFIG.num_timesteps - 1, STEPS)
    return final_step(GaussianDiffusion(schedule).ddim_sample(network, x, timesteps)).x


@torch.no_grad()
def sample_theirs(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Sample in the same way with the scheduler of diffusers."""
    device = next(network.parameters()).device
    scheduler = DDIMScheduler(num_train_timesteps=CONFIG.num_timesteps)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.to(device)), t, x).prev_sample
    return x


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds of a call, including its work on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
