"""What ``import acktr`` gives, and the program's first moments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import acktr

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_there() -> None:
    assert set(acktr.__all__) <= set(dir(acktr))
    for name in acktr.__all__:
        assert getattr(acktr, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'acktr' has no attribute 'PPO'"):
        acktr.PPO  # noqa: B018
    with pytest.raises(ImportError, match="PPO"):
        from acktr import PPO  # noqa: F401


def test_the_package_alone_is_imported_without_torch() -> None:
    """And an optimizer is built without torch's compiler, whose import takes a second."""
    code = (
        "import sys, acktr; assert 'torch' not in sys.modules;"
        "from acktr import kfac; assert 'gymnasium' not in sys.modules;"
        "assert acktr.KFAC is kfac.KFAC;"
        "import torch; kfac.KFAC(torch.nn.Linear(2, 1));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["INT", "TERM"]
)
def test_a_signal_during_the_imports(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """As by Ctrl-C in the first seconds: one line, no traceback, nothing on the disk."""
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    text = f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(5)\n"
    (tmp_path / "stub" / "torch" / "__init__.py").write_text(text)
    (tmp_path / "here").mkdir()
    paths = os.pathsep.join([str(tmp_path / "stub"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "acktr", "train", "--env", "CartPole-v1"],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "acktr: stopped\n")
    assert not list((tmp_path / "here").iterdir())
