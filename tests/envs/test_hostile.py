"""Environments that misbehave are named, whatever they do and wherever they are."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from acktr.envs import EnvError, EnvFault, make_vec
from tests.tools.hostile import ENV_ID, FAULTS, HostileEnv

TIMEOUT = 0.4
DEADLY = ("crash", "kill")


def outcome(deed: str, workers: int, apart: bool) -> tuple[list[str], list[str]]:
    """The errors and the warnings of playing ten steps in three environments."""
    HostileEnv.made = 0
    errors: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vec: Any = None
        try:
            vec = make_vec(
                ENV_ID,
                3,
                env_kwargs={"deed": deed},
                env_workers=workers,
                env_timeout=TIMEOUT,
                apart=apart,
            )
            vec.reset(seed=0)
            for _ in range(10):
                vec.step(np.zeros(3, np.int64))
        except (EnvError, EnvFault) as error:
            errors.append(str(error))
        finally:
            if vec is not None:
                vec.close()
    return errors, [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("workers", "apart"), [(1, False), (3, False), (1, True)], ids=["here", "workers", "apart"]
)
@pytest.mark.parametrize("deed", FAULTS)
def test_each_fault_is_named(deed: str, workers: int, apart: bool) -> None:
    fault = FAULTS[deed]
    if deed in DEADLY and workers == 1 and not apart:
        pytest.skip("nothing in a process survives its end")
    if deed == "hang in close" and (workers > 1 or apart):
        pytest.skip("takes the five seconds that a process has to end")
    before = os.getcwd(), torch.get_default_dtype(), signal.getsignal(signal.SIGTERM), os._exit
    started = time.monotonic()
    errors, told = outcome(deed, workers, apart)
    after = os.getcwd(), torch.get_default_dtype(), signal.getsignal(signal.SIGTERM), os._exit
    assert after == before
    assert time.monotonic() - started < 3.0
    lines = told if fault.goes_on else errors
    assert errors == [] or not fault.goes_on
    assert any(re.search(fault.said, line) for line in lines), (errors, told)
    assert not any("\n" in line for line in lines)
