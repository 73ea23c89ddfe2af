"""Fixtures of the fuzz tests."""

import os
import sys

import pytest

if os.name == "nt":  # signals, links and limits here are those of POSIX
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def audited() -> None:
    """Install the audit hook of the sandbox, once in each process."""
    from fuzzing import audit

    sys.addaudithook(audit)
