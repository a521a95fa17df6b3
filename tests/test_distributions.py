"""The distributions: what they contain, and that they work beside a foreign ``envs`` package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta as b; b.{}(sys.argv[1])"
SCRIPT = """
import envs, acktr, acktr.envs
assert envs.MINE and acktr.envs is not envs
agent = acktr.ACKTR("CartPole-v1").learn(64)
agent.close()
print(acktr.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that succeeds, without this process's PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checkout(place: Path, *, links: bool = True) -> Path:
    """A copy of this checkout; without links git writes a file that holds the link's target."""
    for folder in ("acktr", "envs", "scripts", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, place / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    (place / "results").mkdir()
    (place / "results" / "README.md").write_text("results")
    if not links:
        (place / "acktr" / "envs").unlink()
        (place / "acktr" / "envs").write_text("../envs")
    return place


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a distribution by setuptools, without a network."""
    out.mkdir(exist_ok=True)
    run(sys.executable, "-c", BUILD.format(f"build_{kind}"), out, cwd=source)
    (made,) = out.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def environment(place: Path, distribution: Path) -> Path:
    """An environment with nothing but a distribution, and what it needs from this one."""
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    (own,) = place.glob("lib/python*/site-packages")
    dependencies = place / "dependencies"
    dependencies.mkdir()
    for folder in (Path(path) for path in sys.path if path.endswith("-packages")):
        for entry in folder.iterdir():  # acktr itself may be among them
            if (
                not entry.name.startswith(("acktr", "__"))
                and not (dependencies / entry.name).exists()
            ):
                (dependencies / entry.name).symlink_to(entry)
    (own / "dependencies.pth").write_text(str(dependencies))
    flags = ("--quiet", "--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation")
    run(sys.executable, "-m", "pip", "--python", python, "install", *flags, distribution, cwd=place)
    return place / "bin"


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path
    """Built from the sdist."""
    foreign: Path
    """A project that has a package envs of its own."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    place = tmp_path_factory.mktemp("distributions")
    sdist = build("sdist", checkout(place / "checkout"), place / "sdist")
    with tarfile.open(sdist) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4
        archive.extractall(place / "unpacked", **safe)  # type: ignore[arg-type]
    (source,) = (place / "unpacked").iterdir()
    wheel = build("wheel", source, place / "wheel")
    (place / "foreign" / "envs").mkdir(parents=True)
    (place / "foreign" / "envs" / "__init__.py").write_text("MINE = True\n")
    (place / "foreign" / "script.py").write_text(SCRIPT)
    return Built(sdist, wheel, place / "foreign")


def test_the_wheel_has_the_library_and_nothing_else(built: Built) -> None:
    library = {
        path.relative_to(ROOT): path.read_bytes()
        for path in (ROOT / "acktr").rglob("*")
        if path.suffix in (".py", ".typed", ".csv") or path.name == "FORMULAS.md"
    }
    library |= {
        Path("acktr", "envs", path.name): path.read_bytes() for path in (ROOT / "envs").glob("*.py")
    }
    inside = {Path(name): text for name, text in contents(built.wheel).items()}
    meta = {path: inside.pop(path) for path in [*inside] if ".dist-info" in path.parts[0]}
    assert inside == library
    assert [text for path, text in meta.items() if path.name == "top_level.txt"] == [b"acktr\n"]


def test_the_sdist_has_no_more_than_it_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        top = {path.split("/")[1] for path in archive.getnames() if "/" in path}
    described = {"LICENSE", "README.md", "PKG-INFO", "pyproject.toml", "setup.cfg", "MANIFEST.in"}
    assert top == {"acktr", "envs", "acktr.egg-info", *described}


def test_a_checkout_without_links_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    wheel = build("wheel", checkout(tmp_path / "checkout", links=False), tmp_path / "wheel")
    assert contents(wheel) == contents(built.wheel)


@pytest.mark.slow
def test_use_beside_a_foreign_package(built: Built, tmp_path: Path) -> None:
    """By a script, by the module and by the program, in the folder that has it."""
    programs = environment(tmp_path / "venv", built.wheel)
    foreign = built.foreign
    home = Path(run(programs / "python", "script.py", cwd=foreign).strip())
    assert home.is_relative_to(tmp_path / "venv")
    train = ("train", "--env", "CartPole-v1", "--total-timesteps", "64", "--run-dir", tmp_path)
    run(programs / "python", "-m", "acktr", *train, "--eval-episodes", "1", cwd=foreign)
    trained = tmp_path / "CartPole-v1" / "acktr" / "seed0"
    assert "return" in run(programs / "acktr", "eval", trained, "--episodes", "1", cwd=foreign)


@pytest.mark.parametrize("links", [True, False])
def test_an_editable_install(links: bool, built: Built, tmp_path: Path) -> None:
    """Of a checkout with the link ``acktr/envs``, and of one where it is a file of text."""
    source = checkout(tmp_path / "checkout", links=links)
    wheel = build("editable", source, tmp_path / "wheel")
    programs = environment(tmp_path / "venv", wheel)
    code = "import envs, acktr.envs as ours; assert envs.MINE; print(ours.make_vec, ours.__file__)"
    home = run(programs / "python", "-c", code, cwd=built.foreign).split()[-1]
    assert Path(home).resolve() == (source / "envs" / "__init__.py").resolve()
