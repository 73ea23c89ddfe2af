# %% [markdown]
# # 11 · Scaling up
#
# **From a laptop to a cluster without another line of code: what a profile changes, how a grid of runs survives being
# broken off, what several workers gain and several processes do, and what it will cost, said beforehand.**
#
# | At a glance | |
# | --- | --- |
# | Level | intermediate; some command line |
# | Minutes (ci / lite / paper) | 1 / 2 / as lite (it plans the paper profile and does not train it); 35 to read |
# | Memory | about 3 GB, for two workers |
# | Downloads | none |
# | Previous | [10](10_own_images.ipynb) |
# | Next | this is the last |

# %% [markdown]
# ## You will be able to
#
# - list what differs between two profiles, and weigh a network before it is built;
# - run notebooks with parameters, and avoid the one trap of it;
# - write a grid, run it, break it off, damage it, and let it go on;
# - run the same grid on workers, on this machine or another, and say when that is *slower*;
# - explain what several processes do in one training, and for which layer it is not the same;
# - predict hours from records, and read results with intervals.
#
# ## Prerequisites
#
# [00](00_start_here.ipynb) and [02](02_sampling_to_detection.ipynb) for the methods and measures. A terminal.

# %% tags=["parameters"]
profile: str = "lite"  # ci | lite | paper
dataset: str = "shapes"  # data set of the small sweep; "folder" reads your own
category: str = ""  # its category
root: str = ""  # folder of images, for dataset "folder"
image_size: int = 32  # side in pixels, in the small sweep
workers: int = 2  # of Dask, on this machine
seed: int = 0  # all randomness
grid_file: str = ""  # grid whose cost is predicted; "" is the one behind the tables

# %% tags=["setup"]
import contextlib
import functools
import json
import logging
import os
import signal
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import papermill
import torch
from IPython.display import Markdown

from diffad_lite import plots
from diffad_lite.core import changed_fields
from diffad_lite.data import DEFAULT_CATEGORIES, data_dir
from diffad_lite.evaluation import metrics, records, tables
from diffad_lite.experiments import (
    folder_of,
    read_grid,
    scorings,
    sweep,
    sweep_on_dask,
    trainings,
)
from diffad_lite.methods import Denoiser, get_method
from diffad_lite.notebook import explore, resolve_profile
from diffad_lite.training import processes

# %% tags=["context"]
# Of Dask we need not hear that a port is taken, or that a worker ends slowly.
warnings.filterwarnings("ignore", "Port .* is already in use")
logging.getLogger("distributed.nanny").setLevel("ERROR")
profile = resolve_profile(profile)
plots.use_style()
quick = profile == "ci"
as_described = dataset == "shapes" and image_size == 32
print("profile:", profile)

# %% [markdown]
# Everything that this notebook writes goes to a folder of its own, which is gone at the end. Commands are called
# inside of it, so that the paths that they print are short.

# %% tags=["context"]
temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
scratch = Path(temporary.name)


def inside():
    """For ``with``: be in that folder, and back afterwards."""
    return contextlib.chdir(scratch)


# %% [markdown]
# ## One method, three sizes
#
# `profile` chooses a configuration: `ci` proves that the code runs, `lite` fits a laptop, `paper` follows the published
# code as far as it could be read. A configuration is a frozen dataclass, so that two of them can be compared field
# by field.
#
# **Predict**: in which of network, noise, training do AnoDDPM's `lite` and `paper` differ?


# %%
def configured(name, profile):
    """The configuration of a method for grey images."""
    side = 256 if profile == "paper" else 64
    return get_method(name).Config.for_profile(profile, channels=1, image_size=side)


def value(config, dotted):
    return functools.reduce(getattr, dotted.split("."), config)


three = {name: configured("anoddpm", name) for name in ("ci", "lite", "paper")}
lines = ["| field | ci | lite | paper |", "| --- | --- | --- | --- |"]
for field in sorted(changed_fields(three["lite"], three["paper"])):
    row = [str(value(config, field)) for config in three.values()]
    lines.append(f"| `{field}` | " + " | ".join(row) + " |")
Markdown("\n".join(lines))

# %% [markdown]
# *Table: the fields of `AnoDDPMConfig` in which `lite` and `paper` differ.* In all of them. A result of `lite` is
# about *that* configuration on *that* data; it says nothing certain about `paper`. The
# [page of each method](../docs/methods/index.md) lists every field with its source, by file and line.
#
# ### Weigh it first
#
# How large are these networks? PyTorch's *meta* device holds shapes and no numbers, so that the largest network is
# built at once and takes no memory. In training each parameter is there five times, as a weight, its gradient, two
# moments of AdamW, and its average over time, each in float32:
#
# $$\text{bytes} = 5 \cdot 4 \cdot \text{parameters} .$$
#
# **Predict** the factor between AnoDDPM's `paper` and `lite`.

# %%
weighed = ("anoddpm", "diffusionad", "glad", "mdps", "bernoulli", "grad")


def parameters_of(name, profile):
    with torch.device("meta"):
        method = get_method(name)(configured(name, profile))
    return sum(p.numel() for p in method.network.parameters())


counts = {name: [parameters_of(name, p) for p in three] for name in weighed}
print("millions of parameters      ci    lite   paper    five times paper")
for name, (ci, lite, paper) in counts.items():
    row = "".join(f"{n / 1e6:8.1f}" for n in (ci, lite, paper))
    print(f"{records.method_names()[name]:22}{row}{20 * paper / 1e9:15.1f} GB")
assert counts["anoddpm"][2] > 10 * counts["anoddpm"][1]

# %% [markdown]
# *List: parameters in millions, frozen ones included, for grey images; the last column is the formula, without what
# the layers keep for the gradient, which comes on top, grows with batch and pixels, and was not measured here.*
# `paper` profiles are tested like this, by numbers and shapes. They have not been trained to the end here, and the
# course reports nothing of them.
#
# ## Notebooks with parameters
#
# The cell tagged `parameters` is the interface of every notebook of the course. papermill puts a second cell behind
# it, with the values that you give, and executes a *copy*. Here is the smallest notebook that shows it:

# %%
source = "n: int = 3  # how many\ntwice = 2 * n"
tagged = {"tags": ["parameters"]}
cell = nbformat.v4.new_code_cell
cells = [cell(source, metadata=tagged), cell("print(n, twice, 2 * n)")]
about = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
about |= {"language_info": {"name": "python"}}
tiny = nbformat.v4.new_notebook(cells=cells, metadata=about)
nbformat.write(tiny, scratch / "a.ipynb")
print(papermill.inspect_notebook(scratch / "a.ipynb")["n"])

# %% [markdown]
# **Predict**: it is run with `n = 5`. What does the last line print?

# %%
options = {"parameters": {"n": 5}, "progress_bar": False, "kernel_name": "python3"}
options["extra_arguments"] = ["--log-level=CRITICAL"]  # of the kernel
ran = papermill.execute_notebook(scratch / "a.ipynb", scratch / "b.ipynb", **options)
for part in ran.cells:
    print(f"{part.metadata.tags}\n    " + part.source.replace("\n", "\n    "))
said = ran.cells[-1].outputs[0].text.strip()
print("printed:", said)
assert said == "5 6 10"

# %% [markdown]
# `twice` is 6: it was computed *before* the new value came. So a parameters cell holds literals only, and everything
# that follows from them is computed later, in the set-up cell. Nor does anybody check types: `-p n five` would be
# taken. Therefore set-up cells check (`resolve_profile` raises for a profile that does not exist), and so does
# `diffad notebooks` for names that no notebook has. For the series:
#
# ```console
# diffad notebooks --profile ci                          # all, into runs/notebooks
# diffad notebooks --only 00 --profile ci --set seed=3   # one, with a parameter; papermill's -p seed 3 works, too
# DIFFAD_PROFILE=ci pytest --nbval-lax notebooks/00_start_here.ipynb
# ```
#
# The last line is for nbval, which cannot inject anything; an environment variable is its way to a profile. A
# call that was broken off goes on with the notebooks that are missing.

# %%
lesson = Path("00_start_here.ipynb")
found = papermill.inspect_notebook(lesson) if lesson.exists() else {}
for name, about in found.items():
    row = name, about["inferred_type_name"], about["default"], about["help"]
    print("{:10}{:6}{:18}{}".format(*row))

# %% [markdown]
# *List: the parameters of notebook 00, as papermill reads them: name, type, default, help.*
#
# ## A grid of runs
#
# One run is one command. A table is dozens: methods, data, seeds, settings. A **grid** names them, as YAML or as a
# dictionary. Ours is a toy, on made scenes (`shapes`), with trainings of seconds. The real one is
# [data/grid.yaml](../data/grid.yaml).

# %% tags=["context"]
data = {"dataset": dataset, "image_size": image_size}
data |= {"category": category} if category else {}
data |= {"root": str(Path(root).resolve())} if root else {}
short = {"short": {"denoiser.train.steps": 20 if quick else 60}}
seeds = [seed] if quick else [seed, seed + 1]
trained = {"methods": ["anoddpm"], "trainings": short, "variants": {"default": {}}}
grid = {
    "profile": "ci" if quick else "lite",
    "methods": ["mean_image", "pca"] if quick else ["brightness", "mean_image", "pca"],
    "seeds": [seed],
    "data": [data, data | trained | {"seeds": seeds}],
    "plants": ["cells" if dataset == "folder" else None],
    "variants": {"raw": {"calibrate": False}, "default": {}},
}

# %% [markdown]
# What is *trained*: each method on each data set with each seed (and with each entry of `trainings`, whose settings
# need a training of their own). What is *scored*, from the same training: each of the `variants`, whose settings only
# matter when a map is made, on each of the `plants` (real or planted defects). An entry of `data` may have its own.
#
# **Predict**: how many trainings, how many scorings?

# %%
runs = list(trainings(grid))
for run, own in runs:
    names = [scoring.variant for scoring in scorings(own, run)]
    print(f"{folder_of(run, Path('grid')).as_posix():40}{', '.join(names)}")
scored = sum(len(list(scorings(own, run))) for run, own in runs)
print(f"{len(runs)} trainings, {scored} scorings")

# %% [markdown]
# On the command line this is `diffad sweep grid.yaml --out grid`. Each line below is one training, and below it what is
# scored with it.

# %%
started = time.monotonic()
with inside():
    failures = sweep(grid, "grid", progress=False)
alone = time.monotonic() - started
print(f"{len(failures)} failures")
assert failures == []

# %% [markdown]
# ### Again
#
# **Predict**: the same call once more. What is done?

# %%
started = time.monotonic()
with inside():
    sweep(grid, "grid", progress=False)
print(f"{alone:.0f} s before, {time.monotonic() - started:.0f} s now")

# %% [markdown]
# Nothing, except that data are read and records compared. A scoring is skipped when its `result.json` carries the
# hash of the same run *and* the same configuration; with one setting changed it is made anew. `result.json` is the
# last file that a scoring writes, under another name first, so that it is there whole or not at all.
#
# ### Damage
#
# Disks fill up, and people edit files. One record is cut in half, another is lost.

# %%
only_pca = grid | {"methods": ["pca"], "data": grid["data"][:1]}
((run, _),) = trainings(only_pca)
pca_folder = folder_of(run, scratch / "grid")
record = pca_folder / "raw" / "result.json"
record.write_text(record.read_text(encoding="utf-8")[:200], encoding="utf-8")
(pca_folder / "default" / "result.json").unlink()
with inside():
    sweep(only_pca, "grid", progress=False)
assert "image_auroc" in json.loads(record.read_text(encoding="utf-8"))

# %% [markdown]
# The broken file is named and made again, the lost one is made again, and PCA is *not* trained again: its checkpoint
# is whole.
#
# ### Ctrl-C in the middle of a training
#
# A training saves its state every half minute, and when it is interrupted: weights, averages, the optimiser's
# moments, the step, and the state of the random numbers. We press Ctrl-C (the *stop* button of a notebook) at the
# seventh step of one of AnoDDPM's trainings, and call again.
#
# **Predict**: how many steps does the second call make, and do the scores agree with those of the sweep above, which
# nobody interrupted?

# %%
one = grid | {"data": [grid["data"][1] | {"seeds": seeds[:1]}]}
steps, plain = [], Denoiser.loss


def counted(self, network, x0, generator):
    """The denoiser's loss; at the seventh step somebody presses Ctrl-C."""
    steps.append(len(x0))
    if len(steps) == 7:
        signal.raise_signal(signal.SIGINT)
    return plain(self, network, x0, generator)


# %%
with inside(), mock.patch.object(Denoiser, "loss", counted):
    try:
        sweep(one, "broken", progress=False)
    except KeyboardInterrupt:
        print(f"stopped after {len(steps)} steps")
    before = len(steps)
    sweep(one, "broken", progress=False)
print(f"{len(steps) - before} steps in the second call")
assert before == 7 and len(steps) == short["short"]["denoiser.train.steps"]

# %%
((run, _),) = trainings(one)
place = (folder_of(run, Path()) / "default").as_posix()
scores = []
for name in ("grid", "broken"):
    (result,) = records.select(records.read_results(scratch / name), name=place)
    scores.append(records.read_scores(result)[1])
print(f"largest difference of two scores: {np.abs(scores[0] - scores[1]).max():.1e}")
np.testing.assert_allclose(*scores, rtol=1e-3)

# %% [markdown]
# The scores are those of the training that was never broken off. That is a property that tests hold
# ([tests/fuzz/test_interruptions.py](../tests/fuzz/test_interruptions.py)), and it is worth more than it seems: without it a long
# training on a shared machine can neither be repeated nor trusted.
#
# ### What fails
#
# One bad run must not stop the others. A name with a typing error beside one that is right:

# %%
with inside():
    failures = sweep(only_pca | {"methods": ["pac", "pca"]}, "grid", progress=False)
    log = next(Path("grid").rglob("error.txt"))
    last = log.read_text(encoding="utf-8").splitlines()[-1]
print("returned:", *failures)
print(f"{log.as_posix()} ends: {last}")
assert len(failures) == 1 and "did you mean 'pca'" in last

# %% [markdown]
# The command lists failures at the end and returns 1; the whole traceback lies in `error.txt` of that run's folder, and
# goes when the run succeeds. A full disk is different: it would fail all the others as well, and ends the sweep.
#
# ## The same grid on workers
#
# Runs do not need each other, so they can be made at the same time. `sweep_on_dask` hands each training, with its
# scorings, to the next free **worker**. Here the workers are two processes on this machine; with
# `scheduler="tcp://..."` they are wherever somebody has started some. What a run is and what is skipped stays as it
# was. (AnoDDPM comes first, and everything waits for it: other methods may begin with its training, and take it
# over.)
#
# **Predict**: two workers on two cores, and runs of seconds. Is it faster than one after the other?


# %%
def on_workers(grid, out):
    """Failures of a sweep on Dask, or one after the other where Dask is missing."""
    try:
        return sweep_on_dask(grid, out, workers=workers)
    except ImportError as error:
        print(error)
        return sweep(grid, out, progress=False)


started = time.monotonic()
with inside():
    assert on_workers(grid, "dask") == []
print(f"{time.monotonic() - started:.0f} s with {workers} workers, {alone:.0f} s alone")


# %%
def by_folder(name):
    """Results of a sweep, by their place in it."""
    found = records.read_results(scratch / name)
    return {r["name"]: r for r in found}


here, there = by_folder("grid"), by_folder("dask")
assert here.keys() == there.keys()
gap = max(abs(here[k]["image_auroc"] - there[k]["image_auroc"]) for k in here)
print(f"{len(here)} results in both; largest difference of image AUROC {gap:.4f}")
assert gap < 0.05

# %% [markdown]
# The results are the same (another number of threads adds numbers in another order, which is a last digit). The time is
# above: each worker is a new Python that imports PyTorch, and the workers share the cores that one run has alone. **On
# one laptop several workers gain little**, and lose where a single run keeps all cores busy anyway. On several machines
# they pay, since each brings its own cores. The commands:
#
# ```console
# diffad sweep data/grid.yaml --out runs/grid --workers 2                  # this machine
# dask scheduler                                                           # a cluster: on one machine,
# dask worker tcp://10.0.0.1:8786 --nthreads 1                             # on each of the others,
# diffad sweep data/grid.yaml --out runs/grid --scheduler tcp://10.0.0.1:8786
# ```
#
# All must see the output folder and the data under the same names. A worker that dies, or whose time on the cluster is
# up, is replaced, and its run goes on from its last state. A script for **Slurm**, with what to change in it, stands in
# [docs/scaling.md](../docs/scaling.md); it is not repeated here. Dask opens ports on this machine; those of the
# local cluster are free ones, so that two of them do not meet.
#
# ## Read the results
#
# Records are files; whatever made them, they are read alike.

# %%
results = records.read_results(scratch / "grid")
Markdown(tables.image_table(results))

# %% [markdown]
# *Table: the toy grid, rendered from its records. Seeds of one setting are one row; the interval is over test
# images.* Two rows differ, but do they differ by more than chance? Both saw the *same* images, so the question is
# asked of pairs: draw the test images with replacement, take both AUROCs of the same draw, and subtract. From the
# interval of the difference follows a verdict, by rule.
#
# **Predict**: the calibrated mean image against the raw one, PCA against the latter, and AnoDDPM, trained for seconds,
# against PCA?

# %%
pairs = {
    "calibrated mean image": ("mean_image", "default"),
    "raw": ("mean_image", "raw"),
}
pairs |= {"PCA": ("pca", "default"), "AnoDDPM": ("anoddpm", "default")}
rows = {k: records.select(results, method=m, variant=v) for k, (m, v) in pairs.items()}
for a, b in (("calibrated mean image", "raw"), ("PCA", "raw"), ("AnoDDPM", "PCA")):
    difference, low, high = records.difference_of(rows[a], rows[b])
    said = metrics.verdict(low, high)
    print(f"{a} - {b}: {difference:+.3f} [{low:+.3f}, {high:+.3f}], 'better' {said}")
    assert low <= difference <= high

# %% [markdown]
# *List: difference of image AUROC with its 95 % interval ("raw" is the mean image with raw maps), and whether the
# claim "the first is better" holds, is reversed, or is inconclusive.* A toy with trainings of seconds says nothing
# about the methods; that the *procedure* is the one behind the claims of this course is the point. The interval
# covers the choice of test images. How much trainings differ among themselves only more seeds show.
#
# `diffad report --runs runs/grid README.md data/README.md` copies records (no weights) to `data/results` and renders
# every table anew. What is in the repository is small and can be read without running anything:

# %%
known = records.read_results(data_dir() / "results")
print(f"{len(known)} records, {len({r['method'] for r in known})} methods")
print("made on:", dict(Counter(r["device"] for r in known)))
print("threads:", dict(Counter(r["threads"] for r in known)))

# %% [markdown]
# Read the second line twice. **What a GPU changes was not measured here**, neither its speed nor whether a result
# moves. A GPU is used when PyTorch sees one; scoring stays in float32, training may use bfloat16.
#
# ## One training, several processes
#
# A grid is many trainings. *One* training that is too slow can be shared: each of $P$ processes, usually one for each
# GPU, takes its part of every batch, and gradients are averaged before each step. Why is that the same training? The
# loss of a batch $\mathcal B$ is a mean, and for parts $\mathcal B_1, \ldots, \mathcal B_P$ of *equal* size
#
# $$\nabla \frac1{|\mathcal B|} \sum_{x \in \mathcal B} \ell(x)
# \;=\; \frac1P \sum_{p=1}^{P} \nabla \frac1{|\mathcal B_p|} \sum_{x \in \mathcal B_p} \ell(x) .$$
#
# **Predict**: for which layer is this false?

# %% tags=["context"]
generator = torch.Generator().manual_seed(seed)
batch = torch.randn(8, 1, 8, 8, generator=generator)
batch += torch.randn(8, 1, 1, 1, generator=generator)  # each its own brightness
target = torch.randn(8, 4, 8, 8, generator=generator)


def small_network(norm):
    """A convolution and a normalisation, with random weights."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), norm)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return network


def gradient(network, part):
    """Gradient of the mean square error on a part of the batch, as one vector."""
    loss = (network(batch[part]) - target[part]).square().mean()
    own = torch.autograd.grad(loss, tuple(network.parameters()))
    return torch.cat([g.flatten() for g in own])


# %%
halves = slice(0, 4), slice(4, 8)
layers = {"GroupNorm": torch.nn.GroupNorm(2, 4), "BatchNorm": torch.nn.BatchNorm2d(4)}
for name, layer in layers.items():
    network = small_network(layer)
    whole = gradient(network, slice(None))
    averaged = sum(gradient(network, part) for part in halves) / 2
    error = ((whole - averaged).norm() / whole.norm()).item()
    print(f"{name}: relative difference {error:.1e}")
    assert (error > 1e-3) == (name == "BatchNorm")

# %% [markdown]
# BatchNorm: it normalises by the statistics of the batch that *it* sees, and each process sees its part. The
# denoisers of this course have GroupNorm, which looks at one image; DiffusionAD's paper profile has BatchNorm in its
# segmentation network. And the parts must be equal, which the package insists on:

# %%
with mock.patch.dict(os.environ, WORLD_SIZE="3"):  # as if three had been started
    try:
        processes.local_batch_size(16)
    except ValueError as error:
        print(error)
    else:
        raise AssertionError("16 images were divided by 3")

# %% [markdown]
# Processes are started by accelerate, and only `train` may be called so; scoring is done by one process.
#
# ```console
# accelerate launch --multi_gpu --num_processes 4 -m diffad_lite.cli train \
#     --method diffusionad --profile paper --dataset folder --root mvtec --category bottle --out runs/bottle
# ```
#
# It is not run here, since starting it takes longer than this whole section. Tests run it, with two processes of this
# machine in the place of two GPUs ([tests/training/test_processes.py](../tests/training/test_processes.py)): both end with the same
# weights, equal to those of one process on the batches of both, and a broken training goes on. On real GPUs it has not
# been tried here.
#
# ## What will it cost?
#
# Before a sweep is started its hours can be said, if each kind of training has been recorded once. For the grid
# behind the tables:


# %% tags=["context"]
def recorded(run, results):
    """Records of the same training, whatever the seed."""
    wanted = {"method": run.method, "dataset": run.dataset, "profile": run.profile}
    wanted["category"] = run.category or DEFAULT_CATEGORIES.get(run.dataset)
    wanted |= {"image_size": run.image_size, "training": run.training}
    return records.select(results, **wanted)


def hours_of(run, own, results):
    """Hours to train, and to make the scorings, from records; None without any."""
    known = recorded(run, results)
    if not known:
        return None
    scored = records.mean(known, "ms_per_image") / 1000 * records.mean(known, "n_test")
    train = records.mean(known, "train_seconds")
    return train / 3600, scored * len(list(scorings(own, run))) / 3600


# %% tags=["context"]
course = read_grid(grid_file or data_dir() / "grid.yaml")
past = records.read_results(data_dir() / "results")
jobs = {}  # folder of a training -> method, hours to train, hours to score
unknown = []
for run, own in trainings(course):
    hours = hours_of(run, own, past)
    if hours is None:
        unknown.append(run)
        continue
    folder = folder_of(run, Path("runs"))
    train = jobs.get(folder, (0, hours[0], 0))[1]  # entries may share a training
    score = jobs.get(folder, (0, 0, 0.0))[2] + hours[1]
    jobs[folder] = run.method, train, score

# %%
print(f"{'':26}trainings   hours to train   to score")
for name in dict.fromkeys(method for method, _, _ in jobs.values()):
    rows = [job for job in jobs.values() if job[0] == name]
    train, score = (sum(row[i] for row in rows) for i in (1, 2))
    print(f"{records.method_names()[name]:26}{len(rows):6d}{train:15.2f}{score:13.2f}")
total = sum(train + score for _, train, score in jobs.values())
print(f"{len(jobs)} trainings, {total:.1f} hours; without any record: {len(unknown)}")
assert grid_file or total > 1

# %% [markdown]
# *List: the grid of this course by method, hours predicted from the records in `data/results`: mean seconds of
# training over seeds, and milliseconds an image times test images times scorings.* What it leaves out: reading data,
# metrics, figures, start-up. The records were made on one or two threads, some beside other work (the counts above),
# so that the sum is a magnitude, not a promise. One method may be most of the bill: look there before you buy
# machines.
#
# ### How many machines?
#
# $W$ machines like the recorded one, each taking the next training when it is free. No plan is shorter than the longest
# training, nor than the sum shared evenly:
#
# $$\text{time} \;\ge\; \max\Big(\max_j h_j ,\; \frac1W \sum_j h_j\Big) ,$$
#
# with $h_j$ the hours of training $j$ and its scorings. Here AnoDDPM's come first, and the others wait for all of them.
#
# **Predict**: from which $W$ on is another machine useless?


# %% tags=["context"]
def plan(jobs, machines):
    """(method, machine, begin, end) of each training, on the first free machine."""
    rows, free = [], [0.0] * machines
    for first in (True, False):
        free = [max(free)] * machines  # AnoDDPM first; the others wait for all of them
        for method, train, score in jobs.values():
            if (method == "anoddpm") == first:
                who = free.index(min(free))
                rows.append((method, who, free[who], free[who] + train + score))
                free[who] += train + score
    return rows


def finished(jobs, machines):
    return max(end for *_, end in plan(jobs, machines))


# %%
machines = range(1, 17)
longest = max(train + score for _, train, score in jobs.values())
curves = {"as they come": [finished(jobs, w) for w in machines]}
curves["no plan is shorter"] = [max(longest, total / w) for w in machines]
axes = {"xlabel": "machines W", "ylabel": "hours until all is done"}
fig, _ = plots.show_curves(machines, curves, **axes, markers=True)
assert curves["no plan is shorter"][-1] <= finished(jobs, 16) <= finished(jobs, 1)

# %% [markdown]
# *Figure: predicted hours of the grid against the number of machines, and the bound.* The first machines halve the
# time, the last ones wait. Who does what:


# %%
def show_plan(W):
    fig, ax = plt.subplots(figsize=(8, 0.35 * W + 1.3))
    names = list(dict.fromkeys(method for method, _, _ in jobs.values()))
    for method, who, begin, end in plan(jobs, W):
        place = names.index(method)
        style = {"color": plots.COLOURS[place % 7], "hatch": "/" * (place // 7)}
        ax.barh(who, end - begin, left=begin, edgecolor="white", **style, label=method)
    ax.set(xlabel="hours", ylabel="machine", yticks=range(W))
    known = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=False))
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 5, "fontsize": 8}
    ax.legend(known.values(), known, **place)
    return fig, {"plan": plan(jobs, W)}


explore(show_plan, static=[{"W": 4}], W=[1, 2, 4, 8, 16])

# %% [markdown]
# *Figure: in a live notebook, a slider; printed, four machines. A bar is one training with its scorings.* A long
# training that comes last leaves the others idle. Exercise 11.2 asks how many machines are enough.
#
# ## Where it is not the same: Windows and others
#
# - Workers are fresh processes, and each imports the main module anew, on every system. In a *script*, call
#   `sweep_on_dask` below `if __name__ == "__main__":`, or each worker starts the sweep again; in a notebook, and with
#   the command `diffad sweep`, there is nothing to do.
# - Windows does not delete files that are open, does not say how much memory a process took (`peak_memory_mb` is
#   null), and has no Slurm. Stop a command with Ctrl-C; closing the window kills it, and up to half a minute is lost.
# - On a cluster, a home folder that all machines share can be slow; what is written often is only the state of a
#   training.
#
# This notebook was executed on Linux.

# %% [markdown]
# ## Paper, public code, ours
#
# | | public codes of the papers | here |
# | --- | --- | --- |
# | settings | scripts with JSON or YAML files, for each category (MDPS, GLAD); GLAD's holds paths of its authors' machine | one dataclass a method, three profiles; a misspelt name is refused |
# | randomness | DiffusionAD's seeds Python's `random`, and neither NumPy nor PyTorch | one seed for all of it; after an interruption the same steps |
# | scores | MDPS's and masked Bernoulli's depend on the other images of a batch ([05](05_mdps.ipynb), [06](06_bernoulli.ipynb)) | of an image alone, so that any worker may have it |
# | a table | | a grid; every number rendered from records |
# | several GPUs | not looked at | by accelerate; tested on CPUs only |

# %% [markdown]
# ## What did not work
#
# - **Several workers on one machine**: little to gain, and with long trainings something to lose (the times above).
# - **A budget in minutes for numbers that are compared**: it fixes the seconds, not the steps, so that a busy machine
#   trains less. Grids fix steps.
# - **Exactly equal digits everywhere**: another number of threads is another order of sums. Equal bit for bit is a
#   promise for one machine and one number of threads.
# - **BatchNorm on several processes**: see above.
# - **Predicting hours of the paper profile** from those of `lite`: pixels, widths and steps change together, and
#   nothing of it was measured. Time a few steps on the machine that will do it (`--max-minutes 1`), and multiply.

# %% [markdown]
# ## Exercises

# %% [markdown] tags=["exercise"]
# ### Exercise 11.1 ★
#
# Write `count(grid)`: how many trainings and how many scorings a grid means, as a pair, without running anything. (Two
# entries of the grid may mean the *same* training: count folders, not entries.)


# %% tags=["solution"]
def count(grid):
    # BEGIN SOLUTION
    pairs = list(trainings(grid))
    scored = sum(len(list(scorings(own, run))) for run, own in pairs)
    return len({folder_of(run, Path("runs")) for run, _ in pairs}), scored
    # END SOLUTION


# %% tags=["check"]
made = {"methods": ["pca", "padim"], "seeds": [0, 1, 2], "data": [{"dataset": "elpv"}]}
assert count(made) == (6, 6)
assert count(made | {"plants": [None, "cells"], "variants": {"a": {}, "b": {}}}) == (
    6,
    24,
)
assert count(made | {"trainings": {"a": {}, "b": {}}}) == (12, 12)
twice = [{"dataset": "elpv"}, {"dataset": "elpv", "variants": {"raw": {}}}]
assert count(made | {"data": twice}) == (6, 12), "one training serves both entries"
print("the grid behind the tables:", "{} trainings, {} scorings".format(*count(course)))

# %% [markdown] tags=["explain"]
# Trainings are a product: methods, data, seeds, trainings. Scorings multiply them by plants and variants, and are
# cheap. So a question that can be asked as a *variant* costs next to nothing, and a question about training costs a
# training for each seed.

# %% [markdown] tags=["exercise"]
# ### Exercise 11.2 ★★
#
# Write `enough(jobs, slack)`: the smallest number of machines with which `finished(jobs, machines)` is at most `1 +
# slack` times what it is with as many machines as there are jobs.


# %% tags=["solution"]
def enough(jobs, slack):
    # BEGIN SOLUTION
    best = finished(jobs, len(jobs))
    machines = 1
    while finished(jobs, machines) > (1 + slack) * best:
        machines += 1
    return machines
    # END SOLUTION


# %% tags=["check"]
equal = dict.fromkeys(range(12), ("pca", 1.0, 0.0))
assert [enough(equal, slack) for slack in (0, 1, 2, 11)] == [12, 6, 4, 1]
giant = equal | {12: ("glad", 12.0, 0.0)}
assert enough(giant, 0) == 13 and enough(giant, 0.1) == 7, (
    "in this order the giant waits"
)

# %% tags=["check"]
first = dict(reversed(giant.items()))
assert enough(first, 0) == 2, "the giant first: one machine has it, one does the rest"
for slack in (0, 0.1, 0.5, 1):
    print(f"the grid, at most {slack:.0%} longer: {enough(jobs, slack)} machines")

# %% [markdown] tags=["explain"]
# The longest training sets the end, so that it should *begin* first; with the giant last, machines that are free
# cannot help it. Greedy plans of this kind are never worse than twice the best one, and longest-first is better still
# (Graham 1969). If one training is too long, only several processes for *that* training help.

# %% [markdown] tags=["exercise"]
# ### Exercise 11.3 ★★
#
# A dry run: write `missing(grid, out)`, the folders (relative to `out`, as text) of all scorings that have no
# readable `result.json` there. A scoring lies in the folder of its training, `folder_of(run, out)`, in a folder named
# by variant and plant: `raw`, `raw-cells`.


# %% tags=["solution"]
def missing(grid, out):
    # BEGIN SOLUTION
    found = []
    for run, own in trainings(grid):
        for scoring in scorings(own, run):
            name = "-".join(filter(None, (scoring.variant, scoring.plant)))
            folder = folder_of(run, out) / name
            try:
                json.loads((folder / "result.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found.append(folder.relative_to(out).as_posix())
    return found
    # END SOLUTION


# %% tags=["check"]
small = grid | {
    "methods": ["brightness", "pca"],
    "data": [data],
    "plants": [None, "cells"],
}
assert len(missing(small, scratch / "dry")) == 8, "nothing is there yet"
with inside():
    sweep(small | {"methods": ["brightness"], "plants": [None]}, "dry", progress=False)
still = missing(small, scratch / "dry")
assert len(still) == 6 and any(k.endswith(f"s{seed}/raw-cells") for k in still)
done = next((scratch / "dry").rglob("result.json"))
done.write_text(done.read_text(encoding="utf-8")[:99], encoding="utf-8")
assert len(missing(small, scratch / "dry")) == 7, "half a file is no result"
print(*still, sep="\n")

# %% [markdown] tags=["explain"]
# `sweep` itself asks more: the record must carry the hash of the *same* run and configuration. A result of another
# setting under the same name would pass here and be made again there.

# %% [markdown] tags=["exercise"]
# ### Exercise 11.4 ★★★
#
# If the parts of a batch are *not* equal, the plain average is wrong. Write `combine(gradients, sizes)`: the gradient
# of the whole batch from those of the parts (a list of vectors) and their numbers of images.


# %% tags=["solution"]
def combine(gradients, sizes):
    # BEGIN SOLUTION
    return sum(n * g for n, g in zip(sizes, gradients, strict=True)) / sum(sizes)
    # END SOLUTION


# %% tags=["check"]
network = small_network(torch.nn.GroupNorm(2, 4))
whole = gradient(network, slice(None))

# %% tags=["check"]
for cuts in ((0, 4, 8), (0, 1, 8), (0, 2, 3, 8)):
    pieces = [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    mine = combine([gradient(network, p) for p in pieces], np.diff(cuts).tolist())
    error = ((mine - whole).norm() / whole.norm()).item()
    assert error < 1e-4, f"not the gradient of the whole batch for the cuts {cuts}"
    print(f"cuts {cuts}: relative difference {error:.0e}")

# %% [markdown] tags=["explain"]
# A mean of means is the mean only for equal parts; otherwise each counts as often as it has images. The package
# refuses unequal parts instead, because a batch that can be divided is always to be had, and because an error that
# only shows with three GPUs is found late.

# %% [markdown]
# ## What we learned
#
# - A profile changes everything at once: compare field by field, and count parameters before you build.
# - Parameters are literals; what follows from them comes later.
# - A sweep that can be killed, damaged and called again needs three things: a hash, a record that is written last,
#   and a training that goes on to the same end.
# - Workers pay on several machines; on one they share the same cores.
# - Gradients of equal parts average to that of the whole, and BatchNorm does not know.
# - Hours can be predicted from records; a difference has an interval; what was not measured is said.
#
# Here the course ends. [00](00_start_here.ipynb) has the map.

# %% tags=["context"]
temporary.cleanup()

# %% [markdown]
# ## References
#
# - [papermill](https://papermill.readthedocs.io), [Dask](https://docs.dask.org),
#   [dask-jobqueue](https://jobqueue.dask.org), [Accelerate](https://huggingface.co/docs/accelerate): manuals.
# - R. L. Graham: *Bounds on Multiprocessing Timing Anomalies*, SIAM Journal on Applied Mathematics 17, 1969.
# - S. Ioffe, C. Szegedy: *Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
#   Shift*, ICML 2015. Y. Wu, K. He: *Group Normalization*, ECCV 2018.
# - [docs/scaling.md](../docs/scaling.md): commands, Slurm, several GPUs. [data/README.md](../data/README.md): the
#   tables.
