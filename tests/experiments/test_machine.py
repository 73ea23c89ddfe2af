"""The doctor's lines about GPUs."""

import pytest
import torch

from diffad_lite.experiments.machine import run_checks
from diffad_lite.training import processes


@pytest.mark.parametrize(
    ("available", "line"),
    [
        (True, "[OK] GPU: Apple's (mps) is not used, as it has no float64, which the noise"),
        (False, "[OK] GPU: none, CPU is used"),
    ],
)
def test_the_doctor_says_why_an_apple_gpu_is_not_used(available, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available)
    assert processes.device() == torch.device("cpu")
    (said,) = (str(check) for check in run_checks() if "GPU" in check.what)
    assert said.startswith(line)
