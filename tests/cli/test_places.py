"""Training in places that are not kind: encodings, settings of libraries, memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.command_line import environment

TRAIN = "train --env CartPole-v1 --algo a2c --num-envs 2 --num-steps 16 --total-timesteps 64"
SMALL = (*TRAIN.split(), "--eval-episodes", "1", "--device", "cpu")


def acktr(
    here: Path, *words: str, limit: int | None = None, **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run it in another process, with at most ``limit`` MiB of address space."""
    code = "import sys; from acktr.cli.main import main; sys.exit(main())"
    if limit is not None:
        setting = f"import resource; resource.setrlimit(resource.RLIMIT_AS, 2 * [{limit} << 20]);"
        code = f"{setting} {code}"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=here,
        env=environment(OMP_NUM_THREADS="1", **variables),
        capture_output=True,
        check=False,
        timeout=300,
    )


def test_ascii_streams_and_the_settings_of_a_user(tmp_path: Path) -> None:
    """A folder that the streams cannot name, no such back end, and text by LaTeX."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: nosuch\n")
    done = acktr(
        tmp_path,
        *(*SMALL, "--run-dir", "übung日本"),
        PYTHONIOENCODING="ascii:strict",
        MPLBACKEND="nonsense",
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert rb"\xfcbung\u65e5\u672c/CartPole-v1/a2c/seed0" in done.stdout
    assert (tmp_path / "übung日本/CartPole-v1/a2c/seed0/curve.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
@pytest.mark.parametrize("limit", [300, 700, 900])
def test_too_little_memory_is_one_line(tmp_path: Path, limit: int) -> None:
    """Between these limits torch, while it is loaded, ends the process by abort().

    At 500 MiB it does so (torch 2.13.0, before a line of ours has run), which nothing in Python
    can catch.
    """
    done = acktr(tmp_path, *SMALL, limit=limit)
    said = done.stderr.decode()
    assert done.returncode in (0, 1, 2) and said.count("Traceback") == 0, said
    if done.returncode == 2:
        assert said.splitlines()[-1].startswith("acktr: error: ")
