"""The real notebooks: fresh, clean, with exercises that work and lessons equal to the package.

Nothing is executed in a kernel here: exercises run in this process, with the ci profile.
"""

import importlib
import importlib.util
import linecache
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from IPython.display import display

from diffad_lite.diffusion.bernoulli import BernoulliDiffusion
from diffad_lite.diffusion.gaussian import GaussianDiffusion, noise_generators
from diffad_lite.diffusion.schedules import NoiseSchedule
from diffad_lite.methods.anoddpm import AnoDDPM, AnoDDPMConfig
from diffad_lite.methods.diffusionad import DiffusionAD, DiffusionADConfig
from diffad_lite.methods.glad import GLAD, GLADConfig
from diffad_lite.methods.grad import GRAD, GRADConfig, WeightConfig
from diffad_lite.methods.mdps import MDPS, MDPSConfig

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def load_tool(name):
    path = NOTEBOOKS / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"notebook_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, lint = load_tool("build"), load_tool("lint")
MASTERS = list(build.find_masters(NOTEBOOKS).values())
each_master = pytest.mark.parametrize("master", MASTERS, ids=lambda master: master.stem)


def test_notebooks_are_what_their_masters_make_and_were_executed(capsys):
    code = build.main(["--check"])
    assert code == 0, capsys.readouterr().out


def test_notebooks_keep_the_house_rules(capsys):
    code = lint.main([])
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_what_is_drawn_is_shown(path):
    """A cell that draws a figure has a picture below it."""
    drawn = 0
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and re.search(r"^fig, .*= plots\.show_", cell.source, re.M):
            shown = [o for o in cell.outputs if "image/png" in o.get("data", {})]
            assert shown, f"no picture below {cell.source[:100]!r}"
            drawn += 1
    assert drawn or "explore" in path.name


# --- exercises


@pytest.fixture
def classroom(monkeypatch):
    """The surroundings of a notebook under nbval; what cells change in them is put back."""
    monkeypatch.setenv("DIFFAD_PROFILE", "ci")
    monkeypatch.setenv("DIFFAD_STATIC", "1")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(NOTEBOOKS)
    plt.switch_backend("agg")
    threads = torch.get_num_threads()
    with plt.rc_context(), torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)
    plt.close("all")


def run_cell(source, namespace, name):
    """Execute a cell; tracebacks and ``inspect.getsource`` see its lines."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


def exercise_cells(master, *, stub):
    """Role, name for tracebacks, and source of what the exercises are made of, in order."""
    for number, cell in enumerate(build.read_master(master), 1):
        role, source = build.role(cell), cell.source
        if role == "exercise":
            yield role, source.splitlines()[0], ""
        elif role and cell.cell_type == "code":
            source = build.fill(source, stub=stub) if role == "solution" else source
            yield role, f"<{master.name}, cell {number}, {role}>", source


def run_solved(master):
    """Run what the exercises need, every solution and every check; any error is one of ours."""
    namespace = {"__name__": "__main__", "display": display}
    for role, name, source in exercise_cells(master, stub=False):
        if role != "exercise":
            run_cell(source, namespace, name)


def unsolved_that_pass(master):
    """The prompts of exercises whose stubs, left as they are, pass their checks."""
    namespace = {"__name__": "__main__", "display": display}
    failed = {}
    prompt = None
    for role, name, source in exercise_cells(master, stub=True):
        if role == "exercise":
            prompt = name
            failed[prompt] = False
        elif role not in ("solution", "check"):
            run_cell(source, namespace, name)
        elif not failed[prompt]:
            expected = (NotImplementedError,)
            expected += (AssertionError, NameError) if role == "check" else ()
            try:
                run_cell(source, namespace, name)
            except expected:
                failed[prompt] = True
    return [prompt for prompt, done in failed.items() if not done]


@each_master
@pytest.mark.usefixtures("classroom")
def test_solutions_pass_their_checks(master):
    run_solved(master)


@each_master
@pytest.mark.usefixtures("classroom")
def test_stubs_do_not_pass_their_checks(master):
    assert unsolved_that_pass(master) == []


MADE = """\
# %% [markdown]
# # Made

# %% tags=["parameters"]
profile: str = "lite"  # ci | lite | paper

# %% tags=["setup"]
import os
import matplotlib.pyplot as plt
assert os.environ["DIFFAD_PROFILE"] == "ci" and os.path.basename(os.getcwd()) == "notebooks"
plt.rcParams["figure.dpi"] = 33

# %%
raise RuntimeError("a lesson's cell that no exercise needs")

# %% [markdown] tags=["exercise"]
# ### Exercise 00.1 ★

# %% tags=["solution"]
def one():
    # BEGIN SOLUTION
    return 1
    # END SOLUTION

# %% tags=["check"]
assert one() == 1

# %% tags=["context"]
three = 3

# %% [markdown] tags=["exercise"]
# ### Exercise 00.2 ★

# %% tags=["solution"]
# BEGIN SOLUTION
two = three - 1
# END SOLUTION

# %% tags=["check"]
assert two == 2
"""


@pytest.fixture
def made(tmp_path, classroom):
    """Write a made master, with a change."""

    def write(old="", new=""):
        assert old in MADE
        (tmp_path / "00_made.py").write_text(MADE.replace(old, new), encoding="utf-8")
        return tmp_path / "00_made.py"

    return write


def test_the_exercise_runner_accepts_a_sound_master(made):
    run_solved(made())
    assert plt.rcParams["figure.dpi"] == 33
    assert unsolved_that_pass(made()) == []


def test_the_exercise_runner_sees_a_wrong_solution(made):
    with pytest.raises(AssertionError):
        run_solved(made("return 1", "return 4"))


def test_the_exercise_runner_sees_a_check_that_checks_nothing(made):
    assert unsolved_that_pass(made("assert one() == 1", "pass")) == ["### Exercise 00.1 ★"]


def test_the_exercise_runner_sees_a_context_that_needs_a_solution(made):
    with pytest.raises(NotImplementedError):
        unsolved_that_pass(made("three = 3", "three = 2 + one()"))


def test_the_exercise_runner_sees_a_stub_that_breaks_in_another_way(made):
    with pytest.raises(ZeroDivisionError):
        unsolved_that_pass(made("def one():\n", "def one(x=1 / 0):\n"))


# --- cells that re-derive code of the package


def same(*arguments):
    """One comparison, where the lesson's function takes what the package's does."""
    return arguments, arguments


def betas_inputs():
    return [same("linear", 10), same("cosine", 1000), same("scaled_linear", 50)]


def gaussian_inputs(*arguments):
    """Lessons write ``f(schedule, ...)`` for the method ``f(diffusion, ...)`` of free estimates.

    ``"x"`` and ``"y"`` stand for two batches of images.
    """

    def inputs():
        batches = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        named = dict(zip("xy", batches, strict=True))
        diffusion = GaussianDiffusion(NoiseSchedule.named("linear"), clip=None)
        rows = [[named.get(value, value) for value in row] for row in arguments]
        return [((diffusion.schedule, *row), (diffusion, *row)) for row in rows]

    return inputs


def make_answer(network):
    """Fill an untrained network, whose last layer is zero, with random weights."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))


def trajectory_inputs():
    """An untrained model whose last layer answers, in one step and in three; two images."""
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = []
    for steps in (1, 3):
        config = AnoDDPMConfig.for_profile("ci", channels=1, image_size=16)
        method = AnoDDPM(replace(config, noise_level=40, steps=steps))
        make_answer(method.network)
        ours, theirs = (noise_generators("ab", 0) for _ in range(2))
        rows.append(((method, images, ours), (method, images, theirs)))
    return rows


def norm_guidance_inputs():
    """Three images at three levels, and weights from none to far beyond the reference."""
    method = DiffusionAD(DiffusionADConfig.for_profile("ci", channels=1, image_size=16))
    x_t, noise_hat, norm = torch.randn(3, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([25, 200, 600])
    return [same(method, x_t, t, noise_hat, norm.clamp(-1, 1), w) for w in (0.0, 1.0, 30.0)]


def anomaly_loss_inputs():
    """Eight images, each sign, both ways of fading; a denoiser that answers."""
    normal = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = []
    for changes in ({"kappa": 1}, {"kappa": 0}, {"kappa": -1, "fade": "linear"}):
        config = GLADConfig.for_profile("ci", channels=1, image_size=16)
        method = GLAD(replace(config, **changes))
        denoiser = method.network["denoiser"]
        make_answer(denoiser)
        ours, theirs = (torch.Generator().manual_seed(2) for _ in range(2))
        rows.append(((method, denoiser, normal, ours), (method, denoiser, normal, theirs)))
    return rows


def mdps_and_images():
    """A model whose denoiser answers, two states and two pictures."""
    method = MDPS(MDPSConfig.for_profile("ci", channels=1, image_size=16))
    make_answer(method.network["denoiser"])
    x_t, y = torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return method, x_t, y.clamp(-1, 1)


def guided_noise_inputs():
    """Weights from none to strong, at a low and a high level."""
    method, x_t, y = mdps_and_images()
    return [same(method, x_t, t, y, w) for t in (25, 200) for w in (0.0, 1.0, 30.0)]


def posterior_sample_inputs():
    """No, half and every pixel suspect; with and without guidance."""
    method, _, y = mdps_and_images()
    half = (torch.arange(16) < 8).expand(2, 1, 16, 16).float()
    rows = []
    for mask, w in ((0 * half, 2.0), (half, 0.0), (half, 2.0), (1 + 0 * half, 2.0)):
        ours, theirs = (noise_generators("ab", 0) for _ in range(2))
        rows.append(((method, y, mask, 60, w, ours), (method, y, mask, 60, w, theirs)))
    return rows


def bit_posterior_inputs():
    """Every pair of bits, and probabilities in the place of the clean one."""
    diffusion = BernoulliDiffusion(NoiseSchedule.named("linear"))
    z_t = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    z0 = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.3], dtype=torch.float64)
    return [same(diffusion, z_t, z0, t, s) for t, s in STRIDES]


def masked_sample_inputs():
    """Every bit suspect, some and none; two codes, a predictor that sees state and level."""
    diffusion = BernoulliDiffusion(NoiseSchedule.named("linear"))
    z = (torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()

    def predictor(z_t, t):
        return 3 * (z_t - 0.4) - z_t.mean(1, keepdim=True) - 0.005 * t.view(-1, 1, 1, 1)

    rows = []
    for threshold in (-1.0, 0.5, 1.0):
        ours, theirs = (noise_generators("ab", 0) for _ in range(2))
        given = diffusion, predictor, z, diffusion.schedule.timesteps(199, 4)
        rows.append(((*given, ours, threshold), (*given, theirs, threshold)))
    return rows


def feature_distance_inputs():
    """Two grids that are not square; anywhere, the same place, and near."""
    a, b = torch.randn(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    return [same(a, b, radius) for radius in (None, 0, 1, 2)]


def redraw_inputs():
    """Two images; a window of half of each, none, everything; a PatchDiff that answers."""
    method = GRAD(GRADConfig.for_profile("ci", channels=1, image_size=16))
    network = next(iter(method.patchdiffs.values()))
    make_answer(network)
    x0, noise = torch.randn(2, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    half = (torch.arange(16) < 8).expand(2, 1, 16, 16).float()
    windows = (half, 0 * half, 1 + 0 * half)
    return [same(method, network, x0.clamp(-1, 1), w, [600, 90, 4], noise) for w in windows]


def pattern_weights_inputs():
    """Shares so far apart that weights are clipped; with and without exponents."""
    shares = torch.tensor([[0.6, 0.3, 0.0999, 0.0001], [0.1, 0.2, 0.3, 0.4]])
    plain = WeightConfig(4, flatten_contrastive=0.0, flatten_normal=0.0, filter_normal=0.0)
    return [same(*pair, c) for pair in (shares, shares.flip(0)) for c in (WeightConfig(4), plain)]


def cross_fit_inputs():
    maps = np.random.default_rng(0).normal(1, 0.2, (11, 4, 5)).astype(np.float32)
    return [same(maps), same(maps, 3)]


TIMES, STRIDES = (0, 300, 999), ((999, 980), (300, 299), (19, -1))
# Target -> a function that returns comparisons: what the lesson's function is called with, and
# what the package's (a method's first argument is its object). An argument with a state, such
# as a generator, needs one object for each side.
GAUSSIAN = "diffad_lite.diffusion.gaussian:GaussianDiffusion."
INPUTS: dict[str, Callable[[], list[tuple[tuple, tuple]]]] = {
    "diffad_lite.diffusion.schedules:make_betas": betas_inputs,
    GAUSSIAN + "add_noise": gaussian_inputs(*[("x", t, "y") for t in TIMES]),
    GAUSSIAN + "predict_x0": gaussian_inputs(*[("x", t, "y") for t in TIMES]),
    GAUSSIAN + "posterior": gaussian_inputs(*[("x", "y", t, s) for t, s in STRIDES]),
    GAUSSIAN + "ddpm_step": gaussian_inputs(*[("x", t, s, "y", "x") for t, s in STRIDES]),
    GAUSSIAN + "ddim_step": gaussian_inputs(*[("x", t, s, "y") for t, s in STRIDES]),
    "diffad_lite.methods.anoddpm:AnoDDPM.trajectory": trajectory_inputs,
    "diffad_lite.methods.diffusionad:DiffusionAD.norm_guidance": norm_guidance_inputs,
    "diffad_lite.methods.glad:GLAD.anomaly_oriented_loss": anomaly_loss_inputs,
    "diffad_lite.methods.mdps:MDPS.guided_noise": guided_noise_inputs,
    "diffad_lite.methods.mdps:MDPS.sample": posterior_sample_inputs,
    "diffad_lite.diffusion.bernoulli:BernoulliDiffusion.posterior": bit_posterior_inputs,
    "diffad_lite.diffusion.bernoulli:BernoulliDiffusion.masked_sample": masked_sample_inputs,
    "diffad_lite.methods.grad:GRAD.redraw": redraw_inputs,
    "diffad_lite.methods.grad:pattern_weights": pattern_weights_inputs,
    "diffad_lite.spaces.features:feature_distance": feature_distance_inputs,
    "diffad_lite.methods.calibration:MapCalibration.cross_fit": cross_fit_inputs,
}
AT_HAND = """\
import math
import numpy as np
import torch
from diffad_lite.diffusion.schedules import *
from diffad_lite.diffusion.gaussian import *
"""


def resolve(target):
    module, _, qualified = target.partition(":")
    found = importlib.import_module(module)
    for part in qualified.split("."):
        found = getattr(found, part)
    return found


def arrays(value):
    """A result as a flat list of arrays: numbers, tensors; sequences, dataclasses, generators."""
    if is_dataclass(value):
        value = [part for part in vars(value).values() if part is not None]
    if isinstance(value, (tuple, list, Iterator)):
        return [array for part in value for array in arrays(part)]
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    return [np.asarray(value, dtype=np.float64)]


def assert_equals_the_package(source, targets, where):
    """Run a cell and hold the functions that it defines against those that it teaches."""
    namespace = {}
    exec(AT_HAND, namespace)
    names = {target: target.rpartition(":")[2].rpartition(".")[2] for target in targets}
    for name in names.values():
        namespace.pop(name, None)  # the package's own would always be equal
    run_cell(source, namespace, where)
    for target, name in names.items():
        if name not in namespace:
            pytest.fail(f"{where} teaches {target}; define a function {name!r} in it")
        if target not in INPUTS:
            pytest.fail(f"{where} teaches {target}; add its inputs to INPUTS in {__file__}")
        for ours, theirs in INPUTS[target]():
            got, expected = arrays(namespace[name](*ours)), arrays(resolve(target)(*theirs))
            assert len(got) == len(expected), target
            for a, b in zip(got, expected, strict=True):
                assert a.shape == b.shape, target
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=target)


@each_master
def test_teaching_cells_equal_the_package(master):
    for number, cell in enumerate(build.read_master(master), 1):
        prefix = "teaches:"
        targets = [t.removeprefix(prefix) for t in build.tags(cell) if t.startswith(prefix)]
        if targets:
            assert_equals_the_package(cell.source, targets, f"<{master.name}, cell {number}>")


RIGHT = """\
def add_noise(schedule, x0, t, eps):
    abar = schedule.alpha_bar(t, x0)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps
"""
ADD_NOISE = "diffad_lite.diffusion.gaussian:GaussianDiffusion.add_noise"


def test_a_teaching_cell_that_is_right_passes():
    assert_equals_the_package(RIGHT, [ADD_NOISE], "<made>")
    betas = "from diffad_lite.diffusion import schedules\nmake_betas = schedules.make_betas"
    assert_equals_the_package(betas, ["diffad_lite.diffusion.schedules:make_betas"], "<made>")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (RIGHT.replace("(1 - abar).sqrt()", "(1 - abar)"), ADD_NOISE, "add_noise"),
        (RIGHT.replace("* eps", "* eps[:1, :, :1]").replace("* x0", "* x0[0]"), ADD_NOISE, "noise"),
        ("x = make_noise = 1", ADD_NOISE, "define a function 'add_noise' in it"),
        (
            "pass",
            "diffad_lite.diffusion.schedules:make_betas",
            "define a function 'make_betas' in it",
        ),
        ("def to_dict(): pass", "diffad_lite.core.config:to_dict", "add its inputs to INPUTS in"),
    ],
)
def test_a_teaching_cell_that_is_wrong_fails(source, target, message):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        assert_equals_the_package(source, [target], "<made>")
