"""How the tests share the processor: the whole suite in a process per core, each on one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

_MOST_PROCESSES = 8

# Two threads would wait for each other on a busy machine, a hundred times as long. The variable is
# for the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in several processes where pytest-xdist is; ``-n 0`` keeps it in one.

    Some files alone, which are named, stay in one process: they are done before others would start.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not whole or hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist"):
        return
    if config.option.numprocesses is None and not config.option.usepdb:
        known = hasattr(os, "sched_getaffinity")  # not on every system
        cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
        config.option.numprocesses = min(cores, _MOST_PROCESSES)
        config.option.dist = "worksteal"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile fails at the first call of what it returned, as without a C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException

    def unable(*_args: Any, **_kwargs: Any) -> Any:
        def call(*_tensors: Any) -> Any:
            raise TorchDynamoException("no working compiler\nlong explanation")

        return call

    monkeypatch.setattr(torch, "compile", unable)


@pytest.fixture(autouse=True)
def exact_float32(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU torch rounds the factors of float32 convolutions to 10 bits (TF32) by default.

    Tests that compare with the CPU, or with other kernels, would fail by it.
    """
    before = torch.backends.cudnn.allow_tf32
    if request.node.get_closest_marker("gpu") is not None:
        torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
