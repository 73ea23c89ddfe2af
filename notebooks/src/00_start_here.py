# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Start here
#
# A diffusion model that has only ever seen healthy solar cells points at the broken parts of
# sick ones. This notebook shows it in a minute; the rest of the course explains it, takes it
# apart, and asks how good it really is.
#
# | At a glance | |
# | --- | --- |
# | Level | beginner; some Python and NumPy |
# | Minutes (ci / lite / paper) | under 1 / under 1 / hours on a GPU (it trains the model); 20 to read |
# | Memory | 1 GB, no GPU (ci, lite) |
# | Previous | this is the first |
# | Next | [01 · DDPM basics](01_ddpm_basics.ipynb) |

# %% [markdown]
# ## You will be able to
#
# - say what *unsupervised image anomaly detection* is, and what a method may and may not see;
# - read an anomaly map and an image score, and turn scores into decisions with a threshold;
# - load the course's data and a trained model in three lines;
# - find your way: what each notebook does, and what each symbol means.
#
# ## Prerequisites
#
# Python, NumPy arrays, and the idea of a neural network. No knowledge of diffusion models:
# that is [notebook 01](01_ddpm_basics.ipynb).

# %% tags=["parameters"]
profile: str = "lite"  # ci | lite | paper
dataset: str = "elpv"  # data set; "folder" reads your own
category: str = "mono"  # its category
root: str = ""  # folder of images, for dataset "folder"
seed: int = 0  # all randomness
retrain: bool = False  # train anew instead of loading bundled weights
out_dir: str = "runs/notebooks"  # where a training goes

# %% tags=["setup"]
import numpy as np
from IPython.display import Markdown

from diffad_lite import plots
from diffad_lite.data import data_dir
from diffad_lite.evaluation import bootstrap_auroc, image_metrics, records, tables
from diffad_lite.experiments import Run, machine, pretrained_or_train
from diffad_lite.methods import get_method, top_k_mean
from diffad_lite.notebook import explore, resolve_profile

profile = resolve_profile(profile)
plots.use_style()
rng = np.random.default_rng(seed)
print("profile:", profile)

# %% [markdown]
# ## Real solar cells
#
# A camera that sees infrared photographs a solar module while a current flows through it, and
# every working part of a cell glows (*electroluminescence*). Cracks and dead areas stay dark.
# The data set ELPV holds 2,624 such cells, each judged by experts. Here are some cells of
# monocrystalline silicon; the dark horizontal bars are wires, and belong there.
#
# **Predict** before you run the cell: half of the sixteen cells below are defective. Which?

# %% tags=["context"]
run = Run("anoddpm", dataset, category, root or None, profile=profile, seed=seed)
data = run.load_data().subset(32 if profile == "ci" else 64)
labels = data.test_labels

# %%
normal, defective = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
quiz = rng.permutation(np.concatenate([normal[:8], defective[:8]]))
fig, _ = plots.show_images(data.test_images[quiz], [str(k) for k in range(16)])

# %% [markdown]
# *Figure: sixteen test cells, in random order.* The answer, for the same cells:

# %%
print("defective:", [k for k, i in enumerate(quiz) if labels[i] == 1])

# %% [markdown]
# Some are easy, some are not, and nobody told you what to look for. That is the task:
#
# - **Training** sees *normal* images only. Defects are rare, and the next one is unlike the last.
# - **Calibration** images are normal too, and held out of training. They tell how large scores
#   of normal images get, hence where the threshold goes.
# - **Test** images, normal and defective, are scored once. No setting is chosen on them.

# %%
summary = data.summary()
for name in ("name", "category", "split_seed", *(k for k in summary if k[:2] == "n_")):
    print(f"{name:16} {summary[name]}")

# %% [markdown]
# (The counts of test images are those of this notebook, which scores a part of the test set so
# as to be quick. The tables at the end are of the whole set.)
#
# ## An anomaly found in a minute
#
# The model is a *denoiser*. In training we add Gaussian noise to healthy cells, and a network
# learns to tell the noise from the cell. To test a cell $x$ we
#
# 1. add noise up to level $t$: $\;x_t = \sqrt{\bar\alpha_t}\,x + \sqrt{1-\bar\alpha_t}\,\epsilon$,
#    where $\epsilon$ is standard Gaussian noise, and $\bar\alpha_t$, which falls from 1 to 0 as $t$
#    grows, says how much of the image is left; here $t = 25$ of 1000 levels,
# 2. let the network remove it, which gives the *reconstruction* $\hat x_0$, here the mean of four
#    tries with different noise,
# 3. compare: the *anomaly map* is $|x - \hat x_0|$, blurred a little, and measured at each
#    position in units of what is usual there for normal cells.
#
# The network knows healthy cells only, so it paints healthy cells. What it does not paint back
# is the anomaly. This is AnoDDPM (Wyatt et al. 2022) with Gaussian noise; its weights for these
# cells come with the course.

# %% tags=["context"]
method = pretrained_or_train(run, data, retrain=retrain, out_dir=out_dir)
prediction = method.predict(data.test_images, seed=seed)
scores = prediction.image_score.numpy()

# %% [markdown]
# **Predict**: what will the reconstruction of a cracked cell look like, and what that of a cell
# with a large black area? The network sees the cell through a light noise only.

# %%
brightness = (data.test_images + 1).flatten(1)
half = 0.5 * brightness.median(1, keepdim=True).values
dark_area = (brightness < half).float().mean(1).numpy()  # share of very dark pixels
darkest = defective[np.argmax(dark_area[defective])]
by_score = defective[np.argsort(-scores[defective])]
chosen = [*normal[:2], *by_score[:: max(1, len(by_score) // 5)][:5], darkest]
usual = float(prediction.anomaly_map[labels == 0].flatten().quantile(0.999))
fig, _ = plots.show_detections(
    data.test_images[chosen],
    prediction.anomaly_map[chosen],
    reconstructions=prediction.reconstruction[chosen],
    titles=["normal" if labels[i] == 0 else "defective" for i in chosen],
    scale=(0, 2 * usual),
)

# %% [markdown]
# *Figure: two normal cells, then five defective ones from high to low scores, then the one with
# the largest dark area. All maps share one scale, which ends at twice the 99.9 % quantile of
# normal pixels.*
#
# Thin cracks fade in the reconstruction and light up in the map. The large dark area is
# different: at this light noise it *stays* in the reconstruction, a little paler, because it
# survives the noise. The map lights up there all the same, being in units of what is usual at a
# position, and for normal cells very little is. More noise would remove more, and healthy detail
# with it. This **noise-level dilemma** is the theme of notebook 02, and every method
# of this course is an answer to it.
#
# ## From maps to decisions
#
# An **image score** is one number a cell: here the mean of the largest 1 % of the map. To
# *decide* we need a threshold, and it must not come from defective cells, since in practice
# there are none yet. With $n$ calibration scores sorted upwards, take the one of rank
#
# $$k = \lceil (n+1)\,q \rceil , \qquad q = 0.95 .$$
#
# If normal cells stay as they are, a new one exceeds it with probability at most $1-q$, on average
# over draws of the calibration cells: this is a *conformal* threshold. With one draw of some
# hundred cells the rate scatters by a few per cent.

# %%
fig, measured = plots.show_scores(labels, scores, threshold=method.threshold_)

# %% [markdown]
# *Figure: scores of normal and defective test cells; the dashed line is the threshold from
# calibration cells.* The number in the title, the **AUROC**, is the probability that a
# defective cell scores higher than a normal one: 0.5 is chance, 1 is perfect. It needs no
# threshold. Which decisions does the threshold give?

# %%
alarm = scores > method.threshold_
low, high = bootstrap_auroc(labels, scores)
print(f"defective cells found: {alarm[labels == 1].sum()} of {(labels == 1).sum()}")
print(f"false alarms:          {alarm[labels == 0].sum()} of {(labels == 0).sum()}")
auroc = measured["image_auroc"]
print(f"image AUROC {auroc:.3f}, 95 % interval {low:.3f} to {high:.3f}")
assert auroc > 0.75, "far below what these weights reach"

# %% [markdown]
# The interval resamples the test cells: with so few, a third decimal means nothing.
#
# ## Is that good? Ask a baseline
#
# Before one admires a diffusion model, one asks what a simple method does. *Brightness* uses
# nothing but the mean grey value (defective cells are darker). *PCA* brings each cell to mean 0
# and deviation 1, draws it from 80 principal components of healthy cells, and looks at what is
# missing; it trains in a second.
#
# **Predict**: how far above them is the diffusion model?

# %%
intervals, aurocs = {}, {}
for name in ("brightness", "mean_image", "pca"):
    config = get_method(name).Config.for_profile(
        profile,
        channels=data.info["channels"],
        image_size=data.info["image_size"],
        dataset=dataset,
    )
    baseline = get_method(name)(config).fit(data.train, data.calibration, seed=seed)
    baseline_scores = baseline.predict(data.test_images).image_score.numpy()
    key = records.method_names()[name]
    aurocs[key] = image_metrics(labels, baseline_scores)["image_auroc"]
    intervals[key] = bootstrap_auroc(labels, baseline_scores)
aurocs["AnoDDPM"], intervals["AnoDDPM"] = auroc, (low, high)

# %%
fig, _ = plots.show_bars(aurocs, intervals, xlabel="image AUROC, 95 % interval")

# %% [markdown]
# *Figure: image AUROC on the cells of this notebook.* The intervals of PCA and of the diffusion
# model overlap: on this data PCA is a strong opponent, and this course does not hide it. On the
# whole test set, three training seeds each:

# %%
results = records.read_results(data_dir() / "results")
wanted = {"dataset": "elpv", "category": "mono", "image_size": 64}  # one data set
wanted |= {"plant": None, "variant": "default", "training": ""}  # as it comes
Markdown(tables.image_table(records.select(results, **wanted)))

# %% [markdown]
# *Table: rendered from the result files in `data/results`; AP is average precision, F1 and false
# alarms are at the threshold from calibration cells, "evaluations" counts how often the network
# looks at an image. "Calibrated": maps in units of what is usual at a position; "raw": not.*
# Brightness raises more false alarms than the 5 % that were meant, more than one unlucky draw of
# calibration cells explains well; other values of `split_seed` would tell. Keep three questions for
# the way: Which defects does each method miss? What does it cost? And is a difference larger than
# its interval?
#
# ## Move a slider
#
# The threshold is yours to choose. Moving it trades missed defects for false alarms; no metric
# can tell you which hurts more.

# %%
ladder = [round(float(v), 2) for v in np.quantile(scores, np.linspace(0.05, 0.95, 13))]


def at_threshold(threshold: float) -> plots.Result:
    fig, data = plots.show_scores(labels, scores, threshold=threshold)
    alarm = scores > threshold
    missed, false = (~alarm & (labels == 1)).sum(), (alarm & (labels == 0)).sum()
    fig.axes[0].set_title(f"missed defects {missed}, false alarms {false}")
    return fig, data


explore(at_threshold, threshold=ladder)

# %% [markdown]
# *Figure: in a live notebook, a slider; printed, one setting of it.*
#
# ## Map of the course
#
# | notebook | question |
# | --- | --- |
# | **00** Start here | what is this about? |
# | [**01** DDPM basics](01_ddpm_basics.ipynb) | how do diffusion models learn and sample? |
# | [**02** From sampling to anomaly detection](02_sampling_to_detection.ipynb) | how much noise, and is it better than PCA? |
# | [**03** DiffusionAD](03_diffusionad.ipynb) | one denoising step and a segmentation network |
# | [**04** GLAD](04_glad.ipynb) | an own noise level for every image |
# | [**05** MDPS](05_mdps.ipynb) | posterior sampling where the image is suspect |
# | [**06** Masked Bernoulli diffusion](06_bernoulli.ipynb) | flipping bits instead of adding noise |
# | [**07** GRAD-style detection](07_grad.ipynb) | diffusion as a maker of wrong patterns |
# | [**08** Evaluation](08_evaluation.ipynb) | which claims hold? |
# | [**09** Explore](09_explore.ipynb) | every knob, one cell |
# | [**10** Your own images](10_own_images.ipynb) | a folder in, a report out |
# | [**11** Scaling up](11_scaling_up.ipynb) | grids, workers, cost |
#
# Each has exercises with checks.
#
# ## Notation
#
# The symbols of this table mean one thing in the whole course, whatever a paper calls them, except
# where a notebook says otherwise (03: $m$, a share, and $A$, an appearance; 06: $s$, an earlier
# step; 08 and 10: $m$, a count). Other letters, such as $k$, $n$, $\tau$, $\kappa$, $\rho$, $\delta$, $\pi$, belong to
# their notebook, which says what they are. Images are in $[-1, 1]$ with shape (B, C, H, W); timesteps count from 0, and
# $t = -1$ is the clean image.
#
# | symbol | in code | meaning | in the papers |
# | --- | --- | --- | --- |
# | $x_0$, $x$ | `x0`, `images` | clean image | MDPS: observed image $y$; Bernoulli: code $z_0$ |
# | $x_t$ | `x_t` | image noised to timestep $t$ | Bernoulli: $z_t$, bits |
# | $T$ | `num_timesteps` | number of forward steps | |
# | $\beta_t$ | `betas[t]` | variance of one step | Bernoulli: flip rate |
# | $\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$ | `alphas_cumprod[t]` | signal left | MDPS: $\alpha_t$ |
# | $\sigma_t = \sqrt{1 - \bar\alpha_t}$ | `(1 - abar).sqrt()` | noise level | |
# | $\epsilon$ | `noise` | standard Gaussian noise | MDPS: also $n$ |
# | $\hat\epsilon = \epsilon_\theta(x_t, t)$ | `noise_hat` | the network's estimate of it | |
# | $\hat x_0$ | `x0_hat` | clean image that $\hat\epsilon$ implies | |
# | | `noise_level` | timestep to which a test image is noised | GLAD, MDPS: $T'$ |
# | $A$ | `anomaly_map` | (H, W), large where anomalous | |
# | $s$ | `image_score` | one number an image | |
# | $m$ | `mask` | 1 = anomalous | Bernoulli: 1 = "take the model's bit" |
#
# ## Is this machine ready?

# %%
for check in machine.run_checks():
    print(check)

# %% [markdown]
# ## Paper, public code, ours
#
# | | AnoDDPM's public code (`test_args/args28.json`, `UNet.py`) | here, lite profile |
# | --- | --- | --- |
# | images | brain MRI, 256 px | solar cells, 64 px |
# | noise | simplex in that configuration | Gaussian; simplex comes with notebook 02 |
# | network | base width 128, six levels | base width 32, three levels, pixel-unshuffle stem |
# | training | 3,000 epochs of 100 images, batch 1 | 5,000 steps of 16 images |
# | reverse process | many steps | one step, the mean of four noises |
# | map | squared error | absolute error, standardised by position |
#
# ## What did not work
#
# - **Large dark areas** are mostly painted back at this noise level (the figure above). Their high
#   score comes from a small remaining difference measured in small units, not from a healthy
#   reconstruction.
# - **Choosing the noise level**: on *planted* defects in calibration cells, the image score liked
#   the lowest level best, pixel AP the highest, and AUPRO one between (table in
#   [data/README.md](../data/README.md)). $t = 25$ is a compromise, taken without the test cells.
# - **Beating PCA** on this data: see the table.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 00.1 ★
#
# Compute image scores from anomaly maps by hand. Write `my_score(maps)`: for each of the maps
# (N, H, W), the mean of its largest `k = ceil(0.01 * H * W)` values, as a NumPy array (N,). Do not
# use `top_k_mean`.


# %% tags=["solution"]
def my_score(maps: np.ndarray) -> np.ndarray:
    # BEGIN SOLUTION
    flat = np.sort(maps.reshape(len(maps), -1), axis=1)
    k = int(np.ceil(0.01 * flat.shape[1]))
    return flat[:, -k:].mean(axis=1)
    # END SOLUTION


# %% tags=["check"]
ramp = np.arange(200.0).reshape(1, 10, 20)
assert np.allclose(my_score(ramp), [198.5]), "200 values: the mean of the largest 2"
assert np.allclose(my_score(ramp[:, :, :15]), [193.5]), "150 values: k is 2, too"
maps = prediction.anomaly_map.numpy()
my_scores = my_score(maps)
assert np.allclose(my_scores, top_k_mean(maps, 0.01), atol=1e-4), "not the top-1 % mean"
assert np.allclose(my_scores, scores, atol=1e-3), "differs from the method's scores"
print("right: that is the image score")

# %% [markdown] tags=["explain"]
# Sorting is the clearest way; `np.partition` finds the largest values without sorting the rest.
# The mean of the largest 1 % is a compromise: the maximum is at the mercy of one noisy pixel,
# the mean of all pixels drowns a thin crack.

# %% [markdown] tags=["exercise"]
# ### Exercise 00.2 ★★
#
# AUROC is a probability. Write `my_auroc(labels, scores)`: compare every defective cell (label 1)
# with every normal one (label 0), and return the share of pairs in which the defective cell scores
# higher; ties count one half. Do not use scikit-learn.


# %% tags=["solution"]
def my_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    # BEGIN SOLUTION
    difference = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())
    # END SOLUTION


# %% tags=["check"]
four = np.array([0, 1, 0, 1]), np.array([1.0, 1.0, 0.0, 2.0])
assert my_auroc(*four) == 0.875, "of four pairs three are right and one is a tie: 0.875"
found = my_auroc(labels, scores)
assert abs(found - image_metrics(labels, scores)["image_auroc"]) < 1e-9, "not the AUROC"
print(f"right: {found:.3f}")

# %% [markdown] tags=["explain"]
# This is the Mann-Whitney statistic divided by the number of pairs. It shows at once why AUROC
# does not change under any increasing transformation of the scores.

# %% [markdown] tags=["exercise"]
# ### Exercise 00.3 ★★
#
# Write `conformal(scores, q)`: the score of rank $\lceil (n+1) q \rceil$ among the `n` given
# ones, or the largest if that rank does not exist.


# %% tags=["solution"]
def conformal(scores: np.ndarray, q: float) -> float:
    # BEGIN SOLUTION
    n = len(scores)
    rank = int(np.ceil(round((n + 1) * q, 9)))
    return float(np.sort(scores)[min(rank, n) - 1])
    # END SOLUTION


# %% tags=["check"]
assert conformal(np.arange(1.0, 100.0), 0.9) == 90.0
assert conformal(np.array([3.0, 1.0, 2.0]), 0.99) == 3.0
assert abs(conformal(method.calibration_scores_, 0.95) - method.threshold_) < 1e-6
print("right: that is where the dashed line stands")

# %% [markdown] tags=["explain"]
# Why $n + 1$? The new cell is one more draw from the same distribution: among $n + 1$ equally
# likely ranks, at most a share $1 - q$ lies above rank $\lceil (n+1) q \rceil$. With few
# calibration cells and a high $q$ the rank exceeds $n$, and no threshold can promise that much.
# (Rounded first: in floats $100 \cdot 0.55$ is a little above 55, and would be rounded up to 56.)

# %% [markdown]
# ## What we learned
#
# - Anomaly detection here means: learn normal images, measure how a new one differs.
# - A denoiser trained on normal images reconstructs normal images; the residual is a map, its
#   largest values a score, and a quantile of calibration scores a threshold.
# - Noise removes thin defects from the reconstruction easily, broad ones only at a price.
# - A baseline belongs beside every number, and an interval around it.
#
# ## References
#
# - J. Wyatt, A. Leach, S. Schmon, C. Willcocks: *AnoDDPM: Anomaly Detection with Denoising
#   Diffusion Probabilistic Models using Simplex Noise*, CVPR Workshops (NTIRE) 2022.
# - J. Ho, A. Jain, P. Abbeel: *Denoising Diffusion Probabilistic Models*, NeurIPS 2020,
#   [arXiv 2006.11239](https://arxiv.org/abs/2006.11239).
# - S. Deitsch et al.: *Automatic classification of defective photovoltaic module cells in
#   electroluminescence images*, Solar Energy 185, 2019,
#   [doi 10.1016/j.solener.2019.02.067](https://doi.org/10.1016/j.solener.2019.02.067). The
#   images of this notebook are from its data set, CC BY-NC-SA 4.0.
