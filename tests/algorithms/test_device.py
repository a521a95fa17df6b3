"""Training on a device that is pretended: nothing is left on the CPU, and nothing else differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch cannot be taught a device in Python",
)
@pytest.mark.slow
def test_training_on_another_device_is_that_on_the_cpu() -> None:
    command = [sys.executable, "-m", "tests.tools.pretended"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == 6
    for *case, difference in found:
        assert difference <= 1e-6, case
