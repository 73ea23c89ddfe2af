# %% [markdown]
# # 01 · DDPM basics
#
# **A diffusion model is a noise predictor and a few lines of Gaussian arithmetic: on data that
# can be solved by hand we check every line, then a U-Net takes the place of the exact answer.**
#
# | At a glance | |
# | --- | --- |
# | Level | beginner; some algebra with Gaussians |
# | Minutes (ci / lite / paper) | under 1 / 1 to 2 / hours on a GPU (it trains the cell model); 35 to read |
# | Memory | under 2 GB |
# | Downloads | none |
# | Previous | [00](00_start_here.ipynb) |
# | Next | [02 · From sampling to anomaly detection](02_sampling_to_detection.ipynb) |

# %% [markdown]
# ## You will be able to
#
# - write the forward process in one line and say what each symbol stands for;
# - go back and forth between noise, clean image and score;
# - derive one step of DDPM and of DDIM, and test a sampler against a known answer;
# - turn samples of a *prior* into samples of a *posterior* with Bayes' rule (guidance);
# - train a small noise predictor, and see what its loss does not tell.
#
# ## Prerequisites
#
# Gaussian densities, Bayes' rule, a little PyTorch. The notation table in
# [00](00_start_here.ipynb) lists every symbol of the course; here each is introduced again.

# %% tags=["parameters"]
profile: str = "lite"  # ci | lite | paper
dataset: str = "elpv"  # data set of the last part
category: str = "mono"  # its category
root: str = ""  # folder of images, for dataset "folder"
seed: int = 0  # all randomness
retrain: bool = False  # train the cell model anew instead of loading it
out_dir: str = "runs/notebooks"  # where trainings go

# %% tags=["setup"]
import importlib.util
import math

import torch

from diffad_lite import plots
from diffad_lite.data import load_dataset
from diffad_lite.diffusion import GaussianDiffusion, NoiseSchedule
from diffad_lite.experiments import Run, pretrained_or_train
from diffad_lite.networks import UNet
from diffad_lite.notebook import explore, resolve_profile
from diffad_lite.training import TrainConfig, train_network

profile = resolve_profile(profile)
plots.use_style()
torch.manual_seed(seed)  # initial weights; everything else has a generator of its own


def rng(offset: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * seed + offset)


print("profile:", profile)

# %% [markdown]
# ## One number instead of an image
#
# An image is a list of numbers. We begin with a list of *one* number, drawn from a bell curve:
# $x_0 \sim \mathcal N(\mu, \tau^2)$. Here everything a diffusion model has to learn is known in
# closed form, so that each line of code can be held against the truth. (Samples are random: between
# machines the last digits of printed numbers may differ.)
#
# | symbol | code | meaning |
# | --- | --- | --- |
# | $x_0$ | `x0` | a clean datum |
# | $t = 0, \dots, T-1$ | `t` | timestep; a larger $t$ means more noise |
# | $\beta_t$ | `schedule.betas[t]` | variance of the noise that step $t$ adds |
# | $\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$ | `schedule.alphas_cumprod[t]`, `abar` | what is left of the signal's variance after step $t$ |
# | $\epsilon$ | `noise` | a standard normal draw |
# | $x_t$ | `x_t` | the datum after step $t$ |
#
# By custom $x_0$ always means the clean datum, which is the state at $t = -1$ here
# ($\bar\alpha_{-1} = 1$), and $x_T$ the noisiest state, at $t = T-1$. The papers count from 1: their
# $t$ is our $t + 1$. The package works on batches of images (B, C, H, W); a number is an image of one
# pixel.

# %% tags=["context"]
mu, tau = 1.5, 0.5  # the data: mean and standard deviation
schedule = NoiseSchedule.named("linear")  # T = 1000 steps
diffusion = GaussianDiffusion(schedule, clip=None)  # our numbers have no bounds
x0 = mu + tau * torch.randn(20_000, 1, 1, 1, generator=rng())  # (B, 1, 1, 1)

# %% [markdown]
# ### The forward process
#
# Each step shrinks the state a little and adds a little noise,
# $x_t = \sqrt{1-\beta_t}\, x_{t-1} + \sqrt{\beta_t}\, z_t$ with a fresh $z_t \sim \mathcal N(0, 1)$.
# Sums of Gaussians are Gaussian, so many steps collapse into one (Ho et al. 2020, eq. 4):
#
# $$x_t = \sqrt{\bar\alpha_t}\; x_0 + \sqrt{1 - \bar\alpha_t}\; \epsilon
# \qquad\Longleftrightarrow\qquad
# x_0 = \frac{x_t - \sqrt{1-\bar\alpha_t}\,\epsilon}{\sqrt{\bar\alpha_t}}$$
#
# *(Why: if it holds at $t-1$, the new variance is
# $(1-\beta_t)(1-\bar\alpha_{t-1}) + \beta_t = 1 - \bar\alpha_t$.)*


# %% tags=["teaches:diffad_lite.diffusion.gaussian:GaussianDiffusion.add_noise", "teaches:diffad_lite.diffusion.gaussian:GaussianDiffusion.predict_x0"]
def add_noise(schedule, x0, t, noise):
    abar = schedule.alpha_bar(t, x0)  # shaped so that it multiplies a batch
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def predict_x0(schedule, x_t, t, noise):
    abar = schedule.alpha_bar(t, x_t)
    return (x_t - (1 - abar).sqrt() * noise) / abar.sqrt()


# %% [markdown]
# Since $x_0$ is Gaussian, so is $x_t$, with mean $\mu_t$ and variance $v_t$:
#
# $$\mu_t = \sqrt{\bar\alpha_t}\,\mu, \qquad v_t = \bar\alpha_t \tau^2 + 1 - \bar\alpha_t .$$
#
# **Predict** the mean and the standard deviation of $x_t$ at the last step. Do they still depend
# on $\mu$ and $\tau$? Then walk all steps one by one and compare with the closed form.


# %%
def marginal(t):
    """Mean and variance of x_t."""
    abar = schedule.alphas_cumprod[t].item()
    return abar**0.5 * mu, abar * tau**2 + 1 - abar


x, walk = x0, [x0]
generator = rng(1)
for beta in schedule.betas.tolist():
    x = (1 - beta) ** 0.5 * x + beta**0.5 * torch.randn(x.shape, generator=generator)
    walk.append(x)

# %%
print("   t   walked: mean    sd    one jump: mean    sd    exact: mean    sd")
for t in (9, 99, 299, 999):
    jump = add_noise(schedule, x0, t, torch.randn(x0.shape, generator=rng(2)))
    mean, variance = marginal(t)
    walked = walk[t + 1].mean().item(), walk[t + 1].std().item()
    row = f"{t:4d}{walked[0]:15.3f}{walked[1]:7.3f}{jump.mean():17.3f}{jump.std():7.3f}"
    print(f"{row}{mean:14.3f}{variance**0.5:7.3f}")
    assert abs(walked[0] - mean) < 0.05 and abs(walked[1] - variance**0.5) < 0.05

# %% [markdown]
# Three ways, one answer: training will use the single jump. At $t = 999$ nothing of $\mu$ and
# $\tau$ is left, which is why sampling can start from pure noise. In the figure, three of the walks
# run through the band between $\mu_t - 2\sqrt{v_t}$ and $\mu_t + 2\sqrt{v_t}$.

# %%
moments = torch.tensor([(mu, tau**2)] + [marginal(t) for t in range(1000)])
mean, sd = moments[:, 0], moments[:, 1].sqrt()
paths = torch.stack(walk)[:, :3, 0, 0, 0]  # (T + 1, 3)
curves = {"mean": mean, "mean - 2 sd": mean - 2 * sd, "mean + 2 sd": mean + 2 * sd}
curves |= {f"walk {i + 1}": paths[:, i] for i in range(3)}
fig, data = plots.show_curves(
    range(-1, 1000), curves, xlabel="timestep t (-1 = clean)", ylabel="$x_t$"
)
legend = fig.axes[0].legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))

# %% [markdown]
# ### The score and the best guess of the noise
#
# Undoing the noise needs one function only. The **score** is the slope of the log density of the
# noisy data, an arrow that points to where data are denser:
#
# $$\nabla_{x_t} \log p_t(x_t) = -\frac{x_t - \mu_t}{v_t}.$$
#
# The other quantity is the best guess of the noise inside $x_t$, its conditional mean. For jointly
# Gaussian variables $\mathbb E[\epsilon \mid x_t] =
# \operatorname{Cov}(\epsilon, x_t)\,(x_t - \mu_t) / v_t$, and the covariance is
# $\sigma_t = \sqrt{1-\bar\alpha_t}$, hence
#
# $$\epsilon^*(x_t, t) = \sigma_t\,\frac{x_t - \mu_t}{v_t}
# \qquad\text{and so}\qquad
# \boxed{\;\text{score} = -\,\epsilon^* / \sigma_t\;}$$
#
# The box holds for *any* data, not only for bell curves. It is why a network trained to guess
# noise can be used as a score.


# %% tags=["context"]
def exact_eps(x_t, t):
    """The best guess of the noise in x_t, for our data."""
    abar = schedule.alpha_bar(t, x_t)
    mean, variance = abar.sqrt() * mu, abar * tau**2 + 1 - abar
    return (1 - abar).sqrt() * (x_t - mean) / variance


# %% [markdown]
# Two checks at one noise level. Autograd gives the score without our algebra. And the average of
# the true noise over all draws whose $x_t$ falls into the same narrow bin is an estimate of
# $\mathbb E[\epsilon \mid x_t]$ that knows nothing of the formula.

# %%
t = 200
noise = torch.randn(x0.shape, generator=rng(3))
x_t = diffusion.add_noise(x0, t, noise).requires_grad_()
mean, variance = marginal(t)
log_density = torch.distributions.Normal(mean, variance**0.5).log_prob(x_t)
score = torch.autograd.grad(log_density.sum(), x_t)[0]
x_t = x_t.detach()
sigma = (1 - schedule.alphas_cumprod[t].item()) ** 0.5
torch.testing.assert_close(score, -exact_eps(x_t, t) / sigma, rtol=1e-4, atol=1e-4)
print("score = -eps / sigma: equal")

# %%
bins = x_t.flatten().argsort().chunk(20)  # 20 bins of equal count
centre = torch.stack([x_t.flatten()[i].mean() for i in bins])
measured = torch.stack([noise.flatten()[i].mean() for i in bins])
exact = exact_eps(centre, t)
fig, data = plots.show_curves(
    centre,
    {"closed form": exact, "mean of the noise in a bin": measured},
    xlabel="$x_t$",
    ylabel="noise",
    title=f"the noise inside $x_t$, t = {t}",
    markers=True,
)
assert (measured - exact).abs().max() < 0.2

# %% [markdown]
# The two lines lie on each other: the best guess is a straight line in $x_t$. For images it is a
# complicated function, and a network has to learn it.
#
# ### What loss can be reached?
#
# The network will be trained on the squared error of the noise. Even the exact guess does not
# reach zero, because $x_t$ does not tell the noise completely. What remains is the conditional
# variance, $\operatorname{Var}(\epsilon \mid x_t) = 1 - \sigma_t^2 / v_t = \bar\alpha_t \tau^2 / v_t$.
#
# **Predict** where the loss of the exact guess is larger: at small $t$, where the image is almost
# clean, or at large $t$, where it is almost noise?

# %%
print("   t    loss of exact_eps    closed form")
for t in (0, 10, 100, 300, 999):
    noise = torch.randn(x0.shape, generator=rng(4))
    loss = diffusion.loss(exact_eps, x0, torch.full((len(x0),), t), noise).item()
    floor = schedule.alphas_cumprod[t].item() * tau**2 / marginal(t)[1]
    print(f"{t:4d}{loss:21.4f}{floor:15.4f}")
    assert abs(loss - floor) < 0.05

# %% [markdown]
# At small $t$! There the noise is a whisper behind a loud signal, and hardly audible. At large $t$
# the state *is* the noise, and repeating it is nearly right. Keep this in mind when we look at
# the loss of a real network: small loss at large $t$ is no merit.
#
# ### One step back, if $x_0$ were known
#
# Where was the walk one step earlier, given that it started at $x_0$ and is now at $x_t$? By Bayes'
# rule $q(x_{t-1} \mid x_t, x_0) \propto q(x_t \mid x_{t-1})\, q(x_{t-1} \mid x_0)$, a product of two
# Gaussians in $x_{t-1}$, in which precisions (one over variance) add up. With
# $\alpha_t = 1 - \beta_t = \bar\alpha_t / \bar\alpha_{t-1}$:
#
# $$\frac{1}{\tilde\beta_t} = \frac{\alpha_t}{1-\alpha_t} + \frac{1}{1-\bar\alpha_{t-1}}
# \;\Rightarrow\;
# \tilde\beta_t = \frac{(1-\alpha_t)(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}, \qquad
# \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,(1-\alpha_t)}{1-\bar\alpha_t}\, x_0
# + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\, x_t$$
#
# (Ho et al., eq. 6 and 7). Nothing here needs neighbours: with
# $\alpha = \bar\alpha_t / \bar\alpha_{t'}$ the same lines jump from $t$ to any earlier $t'$.


# %% tags=["teaches:diffad_lite.diffusion.gaussian:GaussianDiffusion.posterior"]
def posterior(schedule, x_t, x0, t, t_prev):
    abar, abar_prev = schedule.alpha_bar(t, x_t), schedule.alpha_bar(t_prev, x_t)
    alpha = abar / abar_prev
    weight_x0 = abar_prev.sqrt() * (1 - alpha) / (1 - abar)
    weight_xt = alpha.sqrt() * (1 - abar_prev) / (1 - abar)
    variance = (1 - alpha) * (1 - abar_prev) / (1 - abar)
    return weight_x0 * x0 + weight_xt * x_t, variance


# %% [markdown]
# A check without algebra: start many walks at the *same* $x_0$, note where they are at $t' = 60$
# and at $t = 100$, and keep those that end near one place. Their positions at $t'$ must have that
# mean and that variance.

# %%
start, t, t_prev, place = torch.tensor(2.0), 100, 60, 1.5
z1, z2 = torch.randn(2, 400_000, generator=rng(5))
alpha = schedule.alphas_cumprod[t] / schedule.alphas_cumprod[t_prev]
x_prev = diffusion.add_noise(start, t_prev, z1)
x_t = alpha**0.5 * x_prev + (1 - alpha) ** 0.5 * z2
near = x_prev[(x_t - place).abs() < 0.02]
mean, variance = posterior(schedule, torch.tensor(place), start, t, t_prev)
print(f"{len(near)} walks ended there")
print(f"mean      {near.mean():.4f}   closed form {mean:.4f}")
print(f"variance  {near.var():.4f}   closed form {variance:.4f}")
assert abs(near.mean() - mean) < 0.02 and abs(near.var() / variance - 1) < 0.1

# %% [markdown]
# ### DDPM: one step back when $x_0$ is not known
#
# Let $\hat\epsilon$ be a guess of the noise, here $\epsilon^*(x_t, t)$, later a network's. Put the
# estimate $\hat x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\hat\epsilon)/\sqrt{\bar\alpha_t}$ in
# the place of $x_0$ and sort the terms. This is algorithm 2 of Ho et al.:
#
# $$x_{t-1} = \frac{1}{\sqrt{\alpha_t}} \Big( x_t - \frac{1-\alpha_t}{\sqrt{1-\bar\alpha_t}}\,
# \hat\epsilon \Big) + \sqrt{\tilde\beta_t}\; z .$$


# %% tags=["teaches:diffad_lite.diffusion.gaussian:GaussianDiffusion.ddpm_step"]
def ddpm_step(schedule, x_t, t, t_prev, noise_hat, noise):
    abar, abar_prev = schedule.alpha_bar(t, x_t), schedule.alpha_bar(t_prev, x_t)
    alpha = abar / abar_prev
    x0_hat = (x_t - (1 - abar).sqrt() * noise_hat) / abar.sqrt()
    mean = (x_t - (1 - alpha) / (1 - abar).sqrt() * noise_hat) / alpha.sqrt()
    variance = (1 - alpha) * (1 - abar_prev) / (1 - abar)  # 0 at the last step
    return mean + variance.sqrt() * noise, x0_hat


# %% [markdown]
# The whole sampler is a loop: ask for the noise, take the step. We run ours and the package's,
# `ddpm_sample`, which yields every state on the way. They draw the same noise, so they must agree.

# %%
x_T = torch.randn(x0.shape, generator=rng(6))  # pure noise
timesteps = schedule.timesteps()  # 999, 998, ..., 0
x, generator = x_T, rng(7)
for t in timesteps:
    noise = torch.randn(x.shape, generator=generator) if t > 0 else torch.zeros_like(x)
    x, x0_hat = ddpm_step(schedule, x, t, t - 1, exact_eps(x, t), noise)

*_, last = diffusion.ddpm_sample(exact_eps, x_T, timesteps, rng(7))
torch.testing.assert_close(x, last.x, rtol=1e-3, atol=1e-3)
print(f"data: mean {mu}, sd {tau};  samples: mean {x.mean():.3f}, sd {x.std():.3f}")
assert abs(x.mean() - mu) < 0.03 and abs(x.std() - tau) < 0.03

# %% [markdown]
# ### DDIM: the same without fresh noise
#
# Song et al. 2021 keep the noise that was found and mix it in again at the lower level (eq. 12 with
# $\sigma = 0$). Nothing is drawn, so one start gives one result, and steps can be long:
#
# $$x_{t'} = \sqrt{\bar\alpha_{t'}}\;\hat x_0 + \sqrt{1 - \bar\alpha_{t'}}\;\hat\epsilon .$$
#
# **Predict**: with only 10 steps instead of 1000, will the samples be too narrow, too wide or just
# right? For which of the two samplers is it worse?

# %%
print("sampler  steps    mean      sd     (data: 1.500  0.500)")
spread = {}
for steps in (10, 50, 250, 1000):
    timesteps = schedule.timesteps(steps=steps)
    *_, ddpm = diffusion.ddpm_sample(exact_eps, x_T, timesteps, rng(7))
    *_, ddim = diffusion.ddim_sample(exact_eps, x_T, timesteps)
    for name, sample in (("DDPM", ddpm.x), ("DDIM", ddim.x)):
        spread[name, steps] = sample.std().item()
        print(f"{name:7}{steps:7d}{sample.mean():9.3f}{sample.std():8.3f}")
assert abs(spread["DDPM", 1000] - tau) < 0.03 and abs(spread["DDIM", 1000] - tau) < 0.03

# %% [markdown]
# Too narrow, and DDPM more so (the bound, further down, tells why); with short steps both are right.
# So with few steps DDIM beats DDPM *with the variance* $\tilde\beta_t$, *if* the noise guess is exact.
# Remember the "if" when we come to networks.
#
# ### There and back again
#
# Because DDIM draws nothing, it can be run uphill: from an image to *its* noise (`ddim_encode`)
# and down again. The round trip is exact only for infinitely many steps, since on the way up the
# noise must be guessed at a level that has not been reached yet. The figure has logarithmic axes;
# the dashed line falls like one over the number of steps.

# %%
counts, round_trip = [10, 20, 50, 100, 200, 500, 1000], []
for steps in counts:
    timesteps = schedule.timesteps(steps=steps)
    *_, up = diffusion.ddim_encode(exact_eps, x0[:2000], timesteps[::-1])
    *_, down = diffusion.ddim_sample(exact_eps, up.x, timesteps)
    round_trip.append((down.x - x0[:2000]).abs().mean().item())
fig, data = plots.show_curves(
    counts,
    {
        "round trip": round_trip,
        "1 / steps": [round_trip[-1] * 1000 / n for n in counts],
    },
    xlabel="steps each way",
    ylabel="mean |decoded - x0|",
    log="xy",
    markers=True,
)
assert round_trip[-1] < 0.1 * round_trip[0]

# %% [markdown]
# ### Bayes' rule at sampling time: guidance
#
# So far the samples follow the *prior* $p(x_0)$. Suppose a gauge shows $y = x_0 + \rho z$,
# $z \sim \mathcal N(0, 1)$. Which $x_0$ are plausible now? Bayes' rule holds at every noise level,
# and its logarithm has a slope:
#
# $$p_t(x_t \mid y) \propto p_t(x_t)\, p(y \mid x_t)
# \quad\Rightarrow\quad
# \underbrace{\nabla \log p_t(x_t \mid y)}_{\text{posterior score}} =
# \underbrace{\nabla \log p_t(x_t)}_{-\epsilon^*/\sigma_t} +
# \underbrace{\nabla \log p(y \mid x_t)}_{\text{likelihood score}}$$
#
# Multiply by $-\sigma_t$, and the sampler needs no change at all, only another noise guess:
#
# $$\hat\epsilon_{\text{guided}} = \epsilon^* - \sigma_t \nabla_{x_t} \log p(y \mid x_t).$$
#
# For our data the likelihood is exact. Given $x_t$, the clean value is Gaussian with mean
# $\hat x_0(x_t)$ and variance $c_t = \tau^2 (1-\bar\alpha_t) / v_t$. So
# $y \mid x_t \sim \mathcal N(\hat x_0, c_t + \rho^2)$, and with
# $\partial \hat x_0 / \partial x_t = \sqrt{\bar\alpha_t}\, \tau^2 / v_t$ we get
# $\nabla \log p(y \mid x_t) = \sqrt{\bar\alpha_t}\,\frac{\tau^2}{v_t} \cdot
# \frac{y - \hat x_0}{c_t + \rho^2}$.

# %% tags=["context"]
y, rho = 0.5, 0.4  # what the gauge shows, and the standard deviation of its error


def guided_eps(x_t, t):
    """The best guess of the noise, given x_t and the reading y."""
    abar = schedule.alpha_bar(t, x_t)
    variance = abar * tau**2 + 1 - abar  # v_t
    x0_hat = diffusion.predict_x0(x_t, t, exact_eps(x_t, t))
    c = tau**2 * (1 - abar) / variance
    slope = abar.sqrt() * tau**2 / variance * (y - x0_hat) / (c + rho**2)
    return exact_eps(x_t, t) - (1 - abar).sqrt() * slope


# %% [markdown]
# The truth to compare with: precisions add up once more, $1/\tau_y^2 = 1/\tau^2 + 1/\rho^2$ and
# $\mu_y = \tau_y^2\,(\mu/\tau^2 + y/\rho^2)$.
#
# **Predict**: the data lie around 1.5, the gauge shows 0.5. Will the guided samples lie at 0.5, at
# 1.5 or between, and will they be wider or narrower than the prior?

# %%
*_, last = diffusion.ddpm_sample(guided_eps, x_T, schedule.timesteps(), rng(8))
variance_y = 1 / (1 / tau**2 + 1 / rho**2)
mean_y = variance_y * (mu / tau**2 + y / rho**2)
print(f"closed form: mean {mean_y:.3f}, sd {variance_y**0.5:.3f}")
print(f"samples:     mean {last.x.mean():.3f}, sd {last.x.std():.3f}")
assert abs(last.x.mean() - mean_y) < 0.03 and abs(last.x.std() - variance_y**0.5) < 0.03

# %% [markdown]
# Between, and narrower: the network (here, the exact guess) was not touched, and still it answers
# another question. In the figure, the dots of the guided samples follow the closed-form posterior.

# %%
grid = torch.linspace(-0.5, 3, 71)
counts = torch.histc(last.x, 71, -0.525, 3.025)


def bell(mean, sd):
    return torch.distributions.Normal(mean, sd).log_prob(grid).exp()


fig, data = plots.show_curves(
    grid,
    {
        "prior": bell(mu, tau),
        "likelihood of y": bell(y, rho),
        "posterior, closed form": bell(mean_y, variance_y**0.5),
        "guided samples": counts / len(last.x) / 0.05,
    },
    xlabel="$x_0$",
    ylabel="density",
)

# %% [markdown]
# ### The bound, in short
#
# Why is guessing noise the same as fitting the data? Ho et al. (eq. 5) bound the negative log
# likelihood by three kinds of terms, $\mathbb E[-\log p(x_0)] \le L_T + \sum_t L_t + L_0$ (KL is the
# Kullback-Leibler divergence, zero only for equal distributions; $p(x_{t'} \mid x_t)$ is the sampler's
# own step, a Gaussian):
#
# - $L_T = \mathrm{KL}\big(q(x_T \mid x_0)\,\|\,\mathcal N(0, 1)\big)$: is the end pure noise?
# - $L_t = \mathrm{KL}\big(q(x_{t'} \mid x_t, x_0)\,\|\,p(x_{t'} \mid x_t)\big)$, two Gaussians whose
#   means differ by $k_t (x_0 - \hat x_0)$; $k_t$ is the weight of $x_0$ in $\tilde\mu_t$. If both have
#   variance $\tilde\beta_t$, this is $k_t^2 (x_0 - \hat x_0)^2 / 2 \tilde\beta_t$: a weighted squared
#   error of the noise. Without the weight it is the loss that everybody trains.
# - $L_0 = \mathbb E[-\log p(x_0 \mid x_t)]$ at the last visited level.
#
# For our data $\mathbb E (x_0 - \hat x_0)^2 = c_t$, so the bound can be typed in. It cannot fall
# below the entropy of the data, $\tfrac12 \log 2\pi e \tau^2$. The mean of $p$ comes from the noise
# guess, but its variance is ours to choose. Ho et al. name two: $\tilde\beta_t$, right if $x_0$ were
# known, and $1 - \alpha$ (their $\beta_t$). For our data the true one is $\tilde\beta_t + k_t^2 c_t$.
#
# **Predict**: will more steps bring the bound down to the entropy, for each of the three?


# %%
def bound(steps):
    """The bound in nats, for three choices of the reverse variance."""
    ts = schedule.timesteps(steps=steps)
    abar = schedule.alphas_cumprod[ts]  # (steps,)
    prev = torch.cat([abar[1:], torch.ones(1)])
    alpha = abar / prev
    c = tau**2 * (1 - abar) / (abar * tau**2 + 1 - abar)  # E (x0 - x0_hat)^2
    k = prev.sqrt() * (1 - alpha) / (1 - abar)
    tilde = (1 - alpha) * (1 - prev) / (1 - abar)
    L_T = (abar[0] * (mu**2 + tau**2) - abar[0] - (1 - abar[0]).log()) / 2
    L_0 = (2 * math.pi * math.e * c[-1]).log() / 2
    total = []
    for variance in (tilde, 1 - alpha, tilde + k**2 * c):
        L_t = ((variance / tilde).log() + (tilde + k**2 * c) / variance - 1) / 2
        total.append((L_T + L_t[:-1].sum() + L_0).item())  # the last step is L_0
    return total


# %% tags=["nbval-check-output"]
entropy = math.log(2 * math.pi * math.e * tau**2) / 2
print(f"entropy of the data: {entropy:.3f} nats; the bound with reverse variance")
print("steps   beta_tilde   beta   true")
for steps in (10, 50, 250, 1000):
    small, large, true = bound(steps)
    print(f"{steps:5d}{small:13.3f}{large:7.3f}{true:7.3f}")
    assert entropy <= true < min(small, large) and true - entropy < 0.001

# %% [markdown]
# With the true variance the bound is tight for any number of steps: all that is left is that $x_T$
# is not *exactly* noise. With $1-\alpha$ it is tight up to the length of the steps. With
# $\tilde\beta_t$ it is not, however many steps there are: the last few, where the state is almost
# clean, claim to know more than they do, and each pays for it. The samples above hardly showed it,
# for what is wrong there is as faint as the noise of those steps. But the choice of
# $\tilde\beta_t$ also explains why DDPM was too narrow with few steps: it leaves out $k_t^2 c_t$.
# Nichol and Dhariwal 2021 let the network learn the variance.

# %% [markdown]
# ## Digits: a network takes over
#
# The recipe stays; only `exact_eps` has to be learned. Our images are handwritten digits,
# 8x8 pixels brought to 16x16, with values in $[-1, 1]$. From here on the samplers clip $\hat x_0$
# to that range.
#
# The figure shows the single jump $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$
# of one digit, the same noise at every level, for three schedules $\beta_t$.
#
# **Predict**: which schedule spends the most steps on pictures that already look like pure noise?

# %%
digits = load_dataset("digits", image_size=16)
names, ts = ("linear", "cosine", "scaled_linear"), (0, 50, 100, 200, 400, 600, 800, 999)
schedules = {name: NoiseSchedule.named(name) for name in names}
digit, noise = digits.train[400:401], torch.randn(1, 1, 16, 16, generator=rng(10))
rows = []
for one in schedules.values():
    rows += [GaussianDiffusion(one).add_noise(digit, t, noise) for t in ts]
titles = [f"{name}, {t}" if t == 0 else f"t = {t}" for name in names for t in ts]
fig, data = plots.show_images(torch.cat(rows), titles, columns=len(ts))

# %% [markdown]
# The signal-to-noise ratio $\mathrm{SNR}_t = \bar\alpha_t / (1-\bar\alpha_t)$ says it in one
# number. Where it is 1, signal and noise have the same weight.

# %%
fig, data = plots.show_curves(
    range(1000),
    {name: one.snr for name, one in schedules.items()} | {"SNR = 1": [1.0] * 1000},
    xlabel="timestep t",
    ylabel="signal-to-noise ratio",
    log="y",
)
limits = fig.axes[0].set_ylim(1e-5, 1e5)

# %% tags=["nbval-check-output"]
print("share of the steps with SNR below 0.1")
for name, one in schedules.items():
    print(f"{name:14} {(one.snr < 0.1).double().mean():.3f}")

# %% [markdown]
# The linear schedule of Ho et al. spends about half of its steps where the digit is lost to the
# eye; the cosine schedule was made to spend fewer. We stay with the linear one, which AnoDDPM uses.
#
# ### The loss
#
# Draw an image, a timestep and a noise; let the network $\epsilon_\theta$ guess the noise (Ho et
# al., eq. 14 and algorithm 1):
#
# $$L = \mathbb E_{x_0, t, \epsilon}\,
# \big\| \epsilon - \epsilon_\theta(\sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon,\; t)
# \big\|^2 .$$

# %%
images = GaussianDiffusion(schedule)  # clips clean estimates to [-1, 1]


def loss(network, x0, generator):
    t = torch.randint(1000, (len(x0),), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    return images.loss(network, x0, t, noise)


# %% [markdown]
# ### A live training
#
# The network is a small **U-Net**: down to a coarse grid, up again, with shortcuts between equal
# sizes; the timestep enters every block. Its last layer starts at zero, so that an untrained network
# answers "no noise". The loop behind `train_network` is the usual one: draw a batch, compute
# the loss, step; in the end the network holds a running average (EMA) of its weights.
#
# **Predict** the loss of the very first step.

# %%
unet = UNet(1, base_channels=16, channel_mults=(1, 2, 4))
steps = {"ci": 20, "lite": 500, "paper": 5000}[profile]
config = TrainConfig(
    steps=steps, batch_size=32, learning_rate=3e-3, warmup_steps=20, ema_decay=0.99
)
print(f"{sum(p.numel() for p in unet.parameters()):,} parameters, {steps} steps")

# %%
report = train_network(unet, loss, digits.train, config, seed=seed, stage="digits")
losses = report.losses
print(f"first loss {losses[0]:.3f}, mean of the last ten {losses[-10:].mean():.3f}")
assert abs(losses[0] - 1) < 0.1 and losses[-10:].mean() < 0.7 * losses[0]

# %% [markdown]
# The first loss is near 1: guessing zero leaves the whole noise, whose variance is 1. One step sees
# 32 images at 32 timesteps, so its loss jumps about; the curve is a moving average.

# %%
window = max(2, steps // 20)
fig, data = plots.show_curves(
    range(window, steps + 1),
    {"loss": losses.unfold(0, window, 1).mean(1)},
    xlabel=f"step (mean of the last {window})",
    ylabel="squared error of the noise",
    log="y",
)

# %% [markdown]
# ### Is the loss all there is?
#
# The loss is an average over all $t$. We take it apart on images held out of training: at a few $t$,
# the squared error of the noise, and what it means for the clean image. An error $\delta$ of the noise
# becomes an error
#
# $$\delta\,\frac{\sqrt{1-\bar\alpha_t}}{\sqrt{\bar\alpha_t}} = \frac{\delta}{\sqrt{\mathrm{SNR}_t}}$$
#
# of $\hat x_0$: more than a hundred times as much at the last step. As a yardstick, take somebody
# who does not look at $x_t$ at all, and always answers with the mean training image.
#
# **Predict**: where does the network beat that yardstick?


# %%
@torch.no_grad()
def errors_at(network, x0, ts):
    """(2, len(ts)): squared error of the noise, root mean square error of x0_hat."""
    noise = torch.randn(x0.shape, generator=rng(11))
    errors = torch.empty(2, len(ts))
    for i, t in enumerate(ts):
        x_t = images.add_noise(x0, t, noise)
        noise_hat = network(x_t, torch.full((len(x0),), t))
        x0_hat = images.predict_x0(x_t, t, noise_hat)
        errors[0, i] = (noise_hat - noise).square().mean()
        errors[1, i] = (x0_hat - x0).square().mean().sqrt()
    return errors


# %%
ts = (10, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
held_out = digits.calibration[:128]
errors = errors_at(unet, held_out, ts)
yardstick = (held_out - digits.train.mean(0)).square().mean().item() ** 0.5
print("   t    squared error of the noise    RMS error of the clean image")
for t, noise_error, image_error in zip(ts, *errors, strict=True):
    print(f"{t:4d}{noise_error:25.4f}{image_error:29.3f}")
print(f"mean image: {yardstick:.3f}")

# %% [markdown]
# As in the one-number world, the error of the noise is largest at small $t$, so the loss is mostly
# about those. The clean image tells the opposite story:

# %%
fig, data = plots.show_curves(
    ts,
    {"network": errors[1], "mean image": [yardstick] * len(ts)},
    xlabel="timestep t",
    ylabel="RMS error of the clean estimate",
    log="y",
    markers=True,
)
assert errors[1, 0] < yardstick < errors[1, -1]

# %% [markdown]
# At small $t$ the estimate is excellent. At large $t$ it is worse than the mean image, that is,
# worse than knowing nothing, although the squared error of the noise looks tiny there.
#
# ### Sampling
#
# A sampler begins exactly there, at the right end. Two things save it: $\hat x_0$ is clipped to
# $[-1, 1]$, and a step moves only a little way towards it, then looks again. Here is DDPM; the upper
# row is the state $x_t$, the lower row the clean image that the network sees in it.

# %%
noise_T = torch.randn(8, 1, 16, 16, generator=rng(12))
few = {"ci": 10, "lite": 100, "paper": 1000}[profile]
timesteps = schedule.timesteps(steps=few)
with torch.no_grad():
    trajectory = list(images.ddpm_sample(unet, noise_T, timesteps, rng(13)))
fig, data = plots.show_trajectory(trajectory)

# %% [markdown]
# First the estimate is a guess at random, then the big shapes are settled, and strokes come last.
# (In the ci profile, 20 training steps give blobs only.)
#
# Next figure: real digits in the top row, eight samples of DDPM in the middle, and below them DDIM
# from the same noise $x_T$.
#
# **Predict**: DDIM draws no fresh noise. Does this help or hurt, given the errors at large $t$?

# %%
with torch.no_grad():
    *_, ddim = images.ddim_sample(unet, noise_T, timesteps)
shown = {"real": digits.train[::140], "DDPM": trajectory[-1].x, "DDIM": ddim.x}
fig, data = plots.show_images(torch.cat(list(shown.values())), columns=8)
for name, x in shown.items():
    roughness = (x[..., 1:] - x[..., :-1]).abs().mean()
    print(f"{name}: mean {x.mean():.2f}, step between neighbours {roughness:.2f}")
assert ddim.x.abs().max() <= 1 and trajectory[-1].x.isfinite().all()

# %% [markdown]
# For so short a training the samples are decent; some are no digit. Some of DDIM's are grainy: what a
# wrong first estimate mixed into the state, DDIM carries along to the end, while DDPM washes it out
# with fresh noise and a new look at each step. **No loss curve shows this; looking at samples does.**
#
# ## Solar cells
#
# The network of lesson 02 was trained on normal solar cells, 64x64 pixels; its weights come with
# the course. Nothing changes but the data and the size of the U-Net.

# %%
source = dataset, category or None, root or None
run = Run("anoddpm", *source, profile=profile, seed=seed)
cells = run.load_data()
method = pretrained_or_train(run, cells, retrain=retrain, out_dir=out_dir)
network = method.network.cpu()  # a few images only: no GPU needed
print(f"{len(cells.train)} normal cells to train on, {len(cells.calibration)} held out")
print(f"{sum(p.numel() for p in network.parameters()):,} parameters")

# %% [markdown]
# First the same question as for the digits: up to which $t$ does its estimate of a held-out cell
# beat the mean training image?
#
# **Predict**: cells resemble each other more than digits do. Is the mean image harder to beat?

# %%
level = method.config.noise_level  # where lesson 02 starts
ts = sorted({level, 10, 25, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999})
held_out = cells.calibration[: 4 if profile == "ci" else 16]
errors_cells = errors_at(network, held_out, ts)[1]
yardstick = (held_out - cells.train.mean(0)).square().mean().item() ** 0.5
fig, data = plots.show_curves(
    ts,
    {"network": errors_cells, "mean image": [yardstick] * len(ts)},
    xlabel="timestep t",
    ylabel="RMS error of the clean estimate",
    log="y",
    markers=True,
)
better = [t for t, error in zip(ts, errors_cells, strict=True) if error < yardstick]
print("beats the mean image at t =", better)
assert level in better

# %% [markdown]
# The mean image is a better guess here (the dashed line stands lower), and still it is not harder to
# beat: the curves cross at about the same place. Brightness differs from cell to cell, which the mean
# image cannot know, and the network sees it through a lot of noise. Now DDPM from pure noise, in a few steps.

# %%
count, few = (2, 5) if profile == "ci" else (4, 50)
timesteps = schedule.timesteps(steps=few)
noise_T = torch.randn(count, *cells.train.shape[1:], generator=rng(14))
with torch.no_grad():
    trajectory = list(images.ddpm_sample(network, noise_T, timesteps, rng(15)))
fig, data = plots.show_trajectory(trajectory)

# %% [markdown]
# In the next figure, top row: normal cells. Below: samples of DDPM and of DDIM from the same pure
# noise. Last row: DDIM again, but started from the top row's *real* cells, noised to $t = 200$.

# %%
real = cells.calibration[:count]
x_t = images.add_noise(real, 200, noise_T)
with torch.no_grad():
    *_, ddim = images.ddim_sample(network, noise_T, timesteps)
    *_, near = images.ddim_sample(network, x_t, schedule.timesteps(200, min(few, 20)))
shown = {"real": real, "DDPM": trajectory[-1].x, "DDIM": ddim.x, "from t = 200": near.x}
titles = [name for name in shown for _ in range(count)]
fig, data = plots.show_images(torch.cat(list(shown.values())), titles, columns=count)
for name, x in shown.items():
    roughness = (x[..., 1:] - x[..., :-1]).abs().mean()
    print(f"{name}: step between neighbours {roughness:.3f}")

# %% [markdown]
# DDPM draws cells with wires, cut corners and a brightness of their own, smoother than real ones. DDIM
# leaves grain in most, more than with the digits. Started from a real cell at a low level, DDIM returns
# that cell without its marks, even most of the black corner of the first, and with a faint texture of
# its own; the large errors at large $t$ are never met. **Anomaly detection**
# works like the last row: it starts from the image under test, at levels where the network is at its
# best.
#
# ### One step is an estimate already
#
# A single network evaluation at $t$ gives $\hat x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon_\theta)
# / \sqrt{\bar\alpha_t}$. Top row: one cell, noised to several $t$. Bottom row: the estimate.
#
# **Predict**: which parts of the cell are lost first as $t$ grows?


# %%
@torch.no_grad()
def one_step(x0, t):
    """The noised image and the clean estimate of one network evaluation."""
    x_t = images.add_noise(x0, t, torch.randn(x0.shape, generator=rng(15)))
    return x_t, images.clean_estimate(x_t, t, network(x_t, torch.full((len(x0),), t)))


ts = (25, 50, 100, 200, 300, 500)
pairs = [one_step(real[:1], t) for t in ts]
rows = torch.cat([x_t for x_t, _ in pairs] + [x0_hat for _, x0_hat in pairs])
titles = [f"$x_t$, t = {t}" for t in ts] + [r"$\hat x_0$"] * len(ts)
fig, data = plots.show_images(rows, titles, columns=len(ts))

# %% [markdown]
# Faint spots and fine texture go first, then what is rare, such as a dark corner; the wires, which
# every cell has, stay longest. What the network does not expect is not painted back, and stands out in
# the difference between image and estimate. How this becomes a detector is lesson 02.
#
# Move the slider: the cell, its noised version, the estimate, and three times the difference (grey is
# zero). Without a live notebook you see two settings.


# %%
def frame(t):
    x_t, x0_hat = one_step(real[:1], t)
    titles = ["cell", f"noised, t = {t}", "estimate", "3 x difference"]
    difference = 3 * (real[:1] - x0_hat)
    return plots.show_images(torch.cat([real[:1], x_t, x0_hat, difference]), titles)


levels = [5, 15, 25, 50, 75, 100, 150, 200, 250, 300, 400, 500]
explore(frame, static=[{"t": 25}, {"t": 200}], t=levels)

# %% [markdown]
# ## The same samplers in diffusers
#
# Are our forty lines right for a real network too? The library
# [diffusers](https://github.com/huggingface/diffusers) has both samplers. It is no dependency of the
# course, so this cell runs where it is installed, on the digit network.


# %%
def sample_with(scheduler, network, x, steps, **options):
    """The loop of a sampler in diffusers."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        noise_hat = network(x, t.expand(len(x)))
        x = scheduler.step(noise_hat, t, x, **options).prev_sample
    return x


noise_T = torch.randn(4, 1, 16, 16, generator=rng(16))
timesteps = schedule.timesteps(steps=25)
with torch.no_grad():
    *_, ddpm = images.ddpm_sample(unet, noise_T, timesteps, rng(17))
    *_, ddim = images.ddim_sample(unet, noise_T, timesteps)

# %%
if importlib.util.find_spec("diffusers"):
    theirs = importlib.import_module("diffusers")
    same = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}
    one = theirs.DDPMScheduler(variance_type="fixed_small", **same)
    two = theirs.DDIMScheduler(**same)
    with torch.no_grad():
        a = sample_with(one, unet, noise_T, 25, generator=rng(17))
        b = sample_with(two, unet, noise_T, 25, use_clipped_model_output=True)
    torch.testing.assert_close(ddpm.x, a, rtol=0, atol=1e-3)
    torch.testing.assert_close(ddim.x, b, rtol=0, atol=1e-3)
    print("DDPM and DDIM: equal to diffusers")
else:
    print("diffusers is not installed; to compare: pip install diffusers")

# %% [markdown]
# The options matter. `timestep_spacing="trailing"` makes the sampler start at the last timestep;
# `use_clipped_model_output` lets the noise follow when $\hat x_0$ was clipped, as ours does, so that
# the pair $(\hat x_0, \hat\epsilon)$ still adds up to $x_t$.
#
# ## Paper, public code, ours
#
# | | Ho et al. 2020 (DDPM) | Song et al. 2021 (DDIM) | Nichol and Dhariwal 2021 | here |
# | --- | --- | --- | --- | --- |
# | what | the loss, ancestral sampling | deterministic sampling with few steps, for the same trained network | better likelihood, fewer steps | both samplers |
# | schedule | linear, $10^{-4}$ to $0.02$, $T = 1000$ | as DDPM | cosine | linear; the others at hand |
# | reverse variance | $\beta_t$ or $\tilde\beta_t$, fixed | a knob $\eta$: 0 is DDIM, 1 is DDPM with $\tilde\beta_t$ | learned, between the two | $\tilde\beta_t$, or none |
# | loss | unweighted error of the noise | none of its own | that, plus a little of the bound | unweighted, mean over pixels |
# | output of the network | the noise | the noise | the noise and a variance | the noise |
# | network | U-Net, 36 million weights for CIFAR-10 at 32 px | as DDPM | larger, more attention | 0.6 million (digits), 2.7 million (cells, lite) |
# | stem | a convolution | as DDPM | a convolution | cells: pixels folded 2x2 into channels first (pixel-unshuffle), for speed |
# | optimiser | Adam, rate constant after a warm-up; EMA 0.9999 | as DDPM | Adam; EMA 0.9999 | AdamW, warm-up, cosine decay to zero; EMA whose decay grows from the start |
# | precision | 32 bit | 32 bit | some in 16 bit | training in bf16 where the processor has it, inference in 32 bit |
#
# The sources of our settings stand in comments in `diffad_lite/methods/anoddpm.py`.

# %% [markdown]
# ## What did not work
#
# - **Clipping in the one-number world.** Images are bounded, our bell curve is not. A sampler that
#   clips to $[-1, 1]$ cannot reach a mean of 1.5, and nothing warns you.
# - **Few steps.** With 10 steps both samplers draw too narrow a distribution (table in "DDIM"), and
#   the round trip of encoding and decoding misses by as much as the next cell prints.
# - **DDIM from pure noise with short trainings.** Grain on digits and cells, where DDPM is clean.
#   A cure is to let the network say only what is not known beforehand: at large $t$ the noise is
#   nearly $x_t$ itself, so put $\hat\epsilon = \sqrt{1-\bar\alpha_t}\,x_t + \sqrt{\bar\alpha_t}\,v_\theta$
#   and learn $v_\theta$ (*v-prediction*, Salimans and Ho 2022). An error $\delta$ of $v_\theta$ then
#   becomes $\delta\sqrt{1-\bar\alpha_t}$ in $\hat x_0$, never more than $\delta$. The course stays with
#   the noise, as the papers that it follows do.
# - **Trusting the loss.** It was small where the clean estimate was worst.

# %%
clipped = GaussianDiffusion(schedule, clip=1.0)
*_, last = clipped.ddpm_sample(exact_eps, x_T, schedule.timesteps(), rng(7))
print(f"samples, clipped: mean {last.x.mean():.3f}, sd {last.x.std():.3f}")
print(f"data:             mean {mu:.3f}, sd {tau:.3f}")
print(f"DDIM round trip:  mean error {round_trip[0]:.3f} with 10 steps")
assert last.x.max() <= 1

# %% [markdown]
# ## Exercises
#
# Each ends with a check. They use the one-number world, except where they say otherwise.

# %% [markdown] tags=["exercise"]
# ### Exercise 01.1 ★
#
# `add_noise` mixes $x_0$ and $\epsilon$ into $x_t$. Solve the same equation for the noise: write
# `predict_noise(schedule, x_t, t, x0)`.


# %% tags=["solution"]
def predict_noise(schedule, x_t, t, x0):
    # BEGIN SOLUTION
    abar = schedule.alpha_bar(t, x_t)
    return (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
    # END SOLUTION


# %% tags=["check"]
noise = torch.randn(x0.shape, generator=rng(20))
for t in (0, 300, 999):
    found = predict_noise(schedule, diffusion.add_noise(x0, t, noise), t, x0)
    assert torch.allclose(found, noise, atol=1e-2), f"not the noise at t = {t}"
many = torch.randint(1000, (len(x0),), generator=rng(21))
found = predict_noise(schedule, diffusion.add_noise(x0, many, noise), many, x0)
assert torch.allclose(found, noise, atol=1e-2), "fails when each image has its own t"
print("right: image, noise and state - any two give the third")

# %% [markdown] tags=["explain"]
# `schedule.level` shapes the level for a batch, so one line serves one `t` for all images and one
# `t` for each. The samplers use this function when $\hat x_0$ was clipped: the noise must follow. At
# $t = 0$ the division by a small $\sqrt{1-\bar\alpha_0}$ costs digits of float32.

# %% [markdown] tags=["exercise"]
# ### Exercise 01.2 ★★
#
# For each of the three schedules, find the first timestep at which the signal-to-noise ratio is at
# most 1. Fill the dictionary `half_way`: name -> `t` (an `int`).

# %% tags=["solution"]
half_way = {}
for name in ("linear", "cosine", "scaled_linear"):
    # BEGIN SOLUTION
    half_way[name] = int((NoiseSchedule.named(name).snr <= 1).nonzero()[0])
    # END SOLUTION

# %% tags=["check"]
assert len(half_way) == 3, "one entry for each schedule"
for name, t in half_way.items():
    abar = NoiseSchedule.named(name).alphas_cumprod
    assert abar[t] <= 0.5 < abar[t - 1], f"{name}: {t} is not the first"
print("right:", half_way)

# %% [markdown] tags=["explain"]
# $\mathrm{SNR} = 1$ means $\bar\alpha_t = 1/2$. The cosine schedule reaches it in the middle by
# construction ($\cos^2$ of 45 degrees), the linear one long before: it has more steps in the noise.

# %% [markdown] tags=["exercise"]
# ### Exercise 01.3 ★★
#
# Write one DDIM step `my_ddim_step(schedule, x_t, t, t_next, noise_hat)` without clipping. It returns
# the new state and the clean estimate. Do not use methods of `GaussianDiffusion`.


# %% tags=["solution"]
def my_ddim_step(schedule, x_t, t, t_next, noise_hat):
    # BEGIN SOLUTION
    abar, abar_next = schedule.alpha_bar(t, x_t), schedule.alpha_bar(t_next, x_t)
    x0_hat = (x_t - (1 - abar).sqrt() * noise_hat) / abar.sqrt()
    return abar_next.sqrt() * x0_hat + (1 - abar_next).sqrt() * noise_hat, x0_hat
    # END SOLUTION


# %% tags=["check"]
x_t, noise_hat = torch.randn(2, 5, 1, 4, 4, generator=rng(22)).double()
for t, t_next in ((999, 500), (40, -1), (200, 300)):
    state, x0_hat = my_ddim_step(schedule, x_t, t, t_next, noise_hat)
    expected, expected_x0 = diffusion.ddim_step(x_t, t, t_next, noise_hat)
    assert torch.allclose(x0_hat, expected_x0), f"the estimate is wrong at t = {t}"
    assert torch.allclose(state, expected), f"the state is wrong from {t} to {t_next}"
print("right: also to the clean image (t = -1), and uphill")

# %% [markdown] tags=["explain"]
# Level 1 stands for the clean image, so $t' = -1$ needs no special case: $\sqrt{1 - 1} = 0$ removes
# the noise. And $t' > t$ runs the same line uphill, which is all that encoding is.

# %% [markdown] tags=["exercise"]
# ### Exercise 01.4 ★★★
#
# Another gauge shows an amplified value, $y = a\,x_0 + \rho z$. Write `amplified_eps(x_t, t)`, the
# guided noise for the reading `y_a` of a gauge with gain `a` and error `rho_a`. Which mean and which
# variance does $y$ have, given $x_t$?

# %% tags=["context"]
a, y_a, rho_a = 3.0, 6.0, 0.5


# %% tags=["solution"]
def amplified_eps(x_t, t):
    # BEGIN SOLUTION
    abar = schedule.alpha_bar(t, x_t)
    variance = abar * tau**2 + 1 - abar
    x0_hat = diffusion.predict_x0(x_t, t, exact_eps(x_t, t))
    c = tau**2 * (1 - abar) / variance
    dx0_hat = abar.sqrt() * tau**2 / variance  # slope of x0_hat in x_t
    slope = a * dx0_hat * (y_a - a * x0_hat) / (a**2 * c + rho_a**2)
    return exact_eps(x_t, t) - (1 - abar).sqrt() * slope
    # END SOLUTION


# %% tags=["check"]
start = torch.randn(x0.shape, generator=rng(23))
*_, last = diffusion.ddpm_sample(amplified_eps, start, schedule.timesteps(), rng(24))
variance = 1 / (1 / tau**2 + a**2 / rho_a**2)
mean = variance * (mu / tau**2 + a * y_a / rho_a**2)
found, sd = last.x.mean().item(), last.x.std().item()
assert abs(found - mean) < 0.02, f"mean {found:.3f}, expected {mean:.3f}"
assert abs(sd / variance**0.5 - 1) < 0.1, f"sd {sd:.3f}, expected {variance**0.5:.3f}"
print(f"right: mean {mean:.3f}, sd {variance**0.5:.3f}")

# %% [markdown] tags=["explain"]
# Given $x_t$, $y$ has mean $a \hat x_0$ and variance $a^2 c_t + \rho^2$; the chain rule brings one
# more $a$. Leaving out $a^2 c_t$ pretends that $\hat x_0$ were certain. For images nobody knows
# $c_t$, and how methods guess it makes a difference: lesson 05.

# %% [markdown]
# ## What we learned
#
# - One line, $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$, connects image, noise
#   and state; any two give the third.
# - The best guess of the noise is the score up to a factor, $-\epsilon^*/\sigma_t$. Bayes' rule adds
#   scores, so a prior becomes a posterior at sampling time, without training.
# - DDPM draws fresh noise at every step, DDIM none. Both are exact for small steps, too narrow for
#   long ones; DDIM can be run uphill, up to an error that falls like one over the steps.
# - The loss weighs timesteps in its own way. Errors at large $t$ are tiny in the noise and huge in
#   the image: look at $\hat x_0$ at each $t$, and at samples.
# - One evaluation at a low level is a good estimate of a normal cell. Next: what it does to a
#   defective one.
#
# ## References
#
# - J. Ho, A. Jain, P. Abbeel: *Denoising Diffusion Probabilistic Models*, NeurIPS 2020,
#   [arXiv 2006.11239](https://arxiv.org/abs/2006.11239).
# - J. Song, C. Meng, S. Ermon: *Denoising Diffusion Implicit Models*, ICLR 2021,
#   [arXiv 2010.02502](https://arxiv.org/abs/2010.02502).
# - A. Nichol, P. Dhariwal: *Improved Denoising Diffusion Probabilistic Models*, ICML 2021,
#   [arXiv 2102.09672](https://arxiv.org/abs/2102.09672).
# - Y. Song et al.: *Score-Based Generative Modeling through Stochastic Differential Equations*, ICLR
#   2021, [arXiv 2011.13456](https://arxiv.org/abs/2011.13456).
# - P. Dhariwal, A. Nichol: *Diffusion Models Beat GANs on Image Synthesis*, NeurIPS 2021 (guidance),
#   [arXiv 2105.05233](https://arxiv.org/abs/2105.05233).
# - T. Salimans, J. Ho: *Progressive Distillation for Fast Sampling of Diffusion Models*, ICLR 2022
#   (v-prediction), [arXiv 2202.00512](https://arxiv.org/abs/2202.00512).
# - Digits: scikit-learn, from the UCI repository, CC BY 4.0. Cells: ELPV, S. Deitsch et al.,
#   CC BY-NC-SA 4.0.
