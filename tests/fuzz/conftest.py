"""Fixtures of the fuzz tests."""

import os
import subprocess
import sys

import pytest

if os.name == "nt":  # signals, links and limits here are those of POSIX
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def audited() -> None:
    """Install the audit hook of the sandbox, once in each process."""
    from fuzzing import audit

    sys.addaudithook(audit)


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """Forks of one process, in which ``diffad`` can be interrupted or killed."""
    from children import ENVIRONMENT, SERVER, Children

    command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True) as server:
        yield Children(server, tmp_path_factory.mktemp("children"))
        server.stdin.close()
