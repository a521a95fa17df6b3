"""What training needs of a machine, looked at with the standard library alone.

Packages may be missing, hang or end the process, so they are tried in child processes with a time
limit, and never imported here.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import math
import operator
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from acktr.files import reason, write_atomic

if sys.platform != "win32":
    import resource

_PINS = """
torch==2.13.0 numpy==2.4.6 gymnasium==1.4.0 ale-py==0.12.1 mujoco==3.17.0 tensorboard==2.21.0
safetensors==0.8.0 tyro==1.0.17 matplotlib==3.11.2 rich==15.0.0 imageio==2.38.1
imageio-ffmpeg==0.8.1
"""
TESTED: dict[str, str] = dict(pin.split("==") for pin in _PINS.split())
"""Versions that the package was tested with: those of constraints.txt, which is not installed."""

_SIMULATORS = ("numpy", "gymnasium", "ale-py", "mujoco")
_IMPORTS = {
    "tensorboard": "tensorboard.summary.writer.record_writer",
    "imageio-ffmpeg": "imageio_ffmpeg; imageio_ffmpeg.get_ffmpeg_exe()",
}
"""What is imported of a package where its name alone would tell too little."""
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)")
_COMPARISON = re.compile(r"(>=|==|<)\s*([\d.]+)$")
_COMPARE = {">=": operator.ge, "==": operator.eq, "<": operator.lt}
_FEATURES = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512-BF16": "avx512_bf16", "AMX": "amx_tile"}
_CPUINFO = Path("/proc/cpuinfo")
_SHARED = Path("/dev/shm")
_NVIDIA = Path("/proc/driver/nvidia")

# A child gets the module path of this process and its seconds, says values to standard output as
# lines of JSON behind a mark (libraries may write there too), and its last error in one line.
_MARK = "acktr-doctor:"
_PRELUDE = f"""
import json, os, signal, sys
getattr(signal, "alarm", id)(int(sys.argv[2]))  # the parent may be killed before
sys.path[:] = json.loads(sys.argv[1])
def line(error): return type(error).__name__ + ": " + " ".join(str(error).split())
def say(value): print("\\n{_MARK}" + json.dumps(value), flush=True)
sys.excepthook = lambda kind, error, trace: print(line(error), file=sys.stderr)
"""
_IMPORT = """
try: import {module}
except BaseException as error: say([{name!r}, line(error)])
else: say([{name!r}, ""])
"""
_TORCH = """
import torch
threads, cores, gpus, failure = torch.get_num_threads(), None, [], ""
os.environ.pop("OMP_NUM_THREADS", None)
try:
    from acktr.envs.parallel import usable_cores
    cores = usable_cores()
except ImportError: pass
try:
    for index in range(torch.cuda.device_count()):
        torch.ones(1, device=f"cuda:{index}").item()
        about = torch.cuda.get_device_properties(index)
        gpus.append(f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
except Exception as error: failure = line(error)
say({"threads": threads, "cores": cores or os.cpu_count(), "gpus": gpus, "failure": failure,
     "cuda": torch.version.cuda})
"""
_ATARI = """
from ale_py import ALEInterface, roms
count = sum(roms.get_rom_path(name) is not None for name in roms.get_all_rom_ids())
say(f"{count} ROMs")
game = ALEInterface()
game.loadROM(roms.get_rom_path("breakout"))
game.act(0)
say("Breakout runs")
"""
_MUJOCO = """
import gymnasium
env = gymnasium.make("InvertedPendulum-v5")
env.reset(seed=0)
env.step(env.action_space.sample())
say("InvertedPendulum-v5 steps")
"""
_WORKERS = """
from acktr.envs import make_vec
envs = make_vec("Pendulum-v1", 2, env_workers=2 if sys.platform == "linux" else 1)
envs.reset()
envs.step(envs.action_space.sample())
envs.close()
say("an environment in another process, over shared memory, steps")
"""
_DRAW = """
from acktr.envs.rendering import choose_backend
backend = choose_backend()
import gymnasium
env = gymnasium.make("InvertedPendulum-v5", render_mode="rgb_array")
env.reset(seed=0)
height, width, _ = env.render().shape
say(f"MUJOCO_GL={backend} draws a picture of {width} x {height}")
"""


@dataclass(frozen=True)
class Finding:
    """What was seen of one thing, and what to do about it."""

    name: str
    status: Literal["ok", "warning", "problem"]
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class Trial:
    """What a child process said, and in one line why it failed, or nothing."""

    said: tuple[Any, ...]
    failure: str


def attempt(program: str, limit: float = 90.0) -> Trial:
    """Run a Python program in a process, which is ended with its children after so many seconds."""
    words = (json.dumps(sys.path), str(math.ceil(limit) + 5))
    command = [sys.executable, "-c", _PRELUDE + program, *words]
    pipe, late, out, err = subprocess.PIPE, False, b"", b""
    try:
        with subprocess.Popen(
            command, 0, None, subprocess.DEVNULL, pipe, pipe, start_new_session=True
        ) as process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired as error:
                late, out = True, error.output or b""
            finally:
                if process.poll() is None:
                    # Its children go with it; Windows knows no groups.
                    getattr(os, "killpg", os.kill)(process.pid, 9)
    except OSError as error:
        return Trial((), f"no process can be started: {reason(error)}")
    lines = [text.strip() for text in out.decode(errors="replace").splitlines()]
    said = tuple(json.loads(x.removeprefix(_MARK)) for x in lines if x.startswith(_MARK))
    if late:
        return Trial(said, f"not done after {limit:g} s")
    if process.returncode < 0:
        return Trial(said, f"the process was ended: {signal.strsignal(-process.returncode)}")
    complaints = err.decode(errors="replace").strip().splitlines() or ["it did not say why"]
    return Trial(said, complaints[-1][:300] if process.returncode else "")


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparisons: 2.13.0+cpu is (2, 13)."""
    digits = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in digits[0].split(".")] if digits else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def satisfied(version: str, wanted: str) -> bool:
    """Whether a version is one of those wanted, such as >=1.2,<2; other forms hold always."""
    parts = [_COMPARISON.match(part.strip()) for part in wanted.split(",")]
    return all(_COMPARE[p[1]](release(version), release(p[2])) for p in parts if p)


def requirements(lines: Iterable[str]) -> dict[str, str]:
    """The versions wanted by package, of requirements as metadata has them, without the extras."""
    found = (_REQUIREMENT.match(line) for line in lines if "extra ==" not in line)
    return {match[1]: match[2].strip(" ()") for match in found if match}


def broken_imports(names: Iterable[str], limit: float = 180.0) -> dict[str, str]:
    """Why some of the packages cannot be imported; each that ends its process is passed over."""
    rest, broken = list(names), dict[str, str]()
    while rest:
        modules = {name: _IMPORTS.get(name, name.replace("-", "_")) for name in rest}
        program = "".join(_IMPORT.format(name=n, module=m) for n, m in modules.items())
        trial = attempt(program, limit)
        for name, why in trial.said:
            rest.remove(name)
            broken |= {name: why} if why else {}
        if rest:
            broken[rest.pop(0)] = trial.failure or "its import ends the process"
    return broken


def _installed(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def check_python(wanted: str) -> Finding:
    """Python itself."""
    version = platform.python_version()
    if satisfied(version, wanted):
        return Finding("python", "ok", version)
    return Finding("python", "problem", f"{version}, where {wanted} is needed", "install another")


def check_package(name: str, wanted: str, broken: Mapping[str, str]) -> Finding:
    """One package: that it is there, neither too old nor newer than tested, and can be imported."""
    version, tested = _installed(name), TESTED.get(name, "")
    install = f'pip install "{name}{wanted}"'
    if version is None:
        return Finding(name, "problem", "not installed", install)
    if not satisfied(version, wanted):
        return Finding(name, "problem", f"{version}, where {wanted} is needed", install)
    if name in broken:
        again = f"pip install --force-reinstall {name}=={tested or version}"
        if name == "mujoco" and "MUJOCO_GL" in os.environ:  # a wrong one breaks the import
            again = f"unset MUJOCO_GL (now {os.environ['MUJOCO_GL']}) and try again"
        return Finding(name, "problem", f"{version} cannot be used: {broken[name]}", again)
    if tested and release(version)[:2] > release(tested)[:2]:
        back = f"should something fail: pip install {name}=={tested}"
        return Finding(name, "warning", f"{version}, newer than tested ({tested})", back)
    return Finding(name, "ok", version)


def check_place(run_dir: Path) -> Iterator[Finding]:
    """Write access and space where runs go to; nothing is left there."""
    place, other = run_dir.absolute(), "choose another place with --run-dir DIR"
    while not place.exists() and place != place.parent:
        place = place.parent
    probe, start = place / f".acktr-doctor-{secrets.token_hex(4)}", time.monotonic()
    try:
        write_atomic(probe, bytes(1 << 16))
        probe.unlink()
        seen = f"64 KiB are on the disk after {(time.monotonic() - start) * 1000:.0f} ms"
        yield Finding("run folder", "ok", f"{place}: {seen}")
    except OSError as error:
        yield Finding("run folder", "problem", f"{place}: {reason(error)}", other)
    free = shutil.disk_usage(place).free / 1e9
    needed = f"a run with pictures may keep 0.5 GB; {other}"
    yield _graded("free space", free, 0.1, 2.0, f"{free:,.1f} GB", needed)


def check_processor() -> Finding:
    """Instructions that torch is much faster with."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    if flags is None:
        return Finding("processor", "ok", f"{platform.machine()}; its features are not known")
    seen = " ".join(name for name, flag in _FEATURES.items() if flag in flags)
    if not {"avx512_bf16", "amx_tile"}.intersection(flags):
        seen += " without AVX512-BF16 or AMX: networks for pictures compute in float32, slower"
    slow = "without AVX2 all of torch is several times slower; take another machine or a GPU"
    return _warning_if("avx2" not in flags, "processor", seen, slow)


def check_torch(trial: Trial) -> Iterator[Finding]:
    """Threads and GPU, by what torch says."""
    if trial.failure:
        yield Finding("threads", "problem", trial.failure, "install torch again")
        return
    about, asked = trial.said[0], os.environ.get("OMP_NUM_THREADS", "not set")
    threads, cores, gpus = about["threads"], about["cores"], about["gpus"]
    seen = f"{threads} of torch, cores for this process {cores}, OMP_NUM_THREADS {asked}"
    unfit = threads > cores or not re.fullmatch(r"not set|[1-9]\d*(,[1-9]\d*)*", asked)
    waits = f"export OMP_NUM_THREADS={cores}; threads without a core wait for each other"
    yield _warning_if(unfit, "threads", seen, waits)
    seen = about["failure"] or "; ".join(gpus) or "none; training runs on the processor"
    if not gpus and not about["failure"] and _NVIDIA.exists():
        why = "torch cannot use it" if about["cuda"] else "this torch has no CUDA"
        seen = f"there is an NVIDIA driver, but {why}"
    unfit = bool(about["failure"]) or (not gpus and _NVIDIA.exists())
    fit = "install a torch that fits the driver (pytorch.org), or train with --device cpu"
    yield _warning_if(unfit, "GPU", seen, fit)


def check_system() -> Iterator[Finding]:
    """Limits, shared memory and the encodings of the streams."""
    if sys.platform != "win32":
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = sys.maxsize if files == resource.RLIM_INFINITY else files
        yield _graded("open files", files, 64, 512, f"at most {files}", "ulimit -n 4096")
    if sys.platform == "linux":
        free = shutil.disk_usage(_SHARED).free / 1e6 if _SHARED.exists() else 0.0
        few = "only environments with shared memory of their own need more (docker --shm-size)"
        yield _warning_if(free < 60, "/dev/shm", f"{free:,.0f} MB free", few)
    streams = {"output": sys.stdout, "errors": sys.stderr}
    names = {name: getattr(stream, "encoding", None) or "?" for name, stream in streams.items()}
    names["file names"] = sys.getfilesystemencoding()
    seen = ", ".join(f"{name} {encoding}" for name, encoding in names.items())
    other = any(not re.fullmatch("utf-?8", encoding, re.I) for encoding in names.values())
    yield _warning_if(other, "text", seen, "export PYTHONUTF8=1, and unset PYTHONIOENCODING")


def _warning_if(unfit: bool, name: str, seen: str, advice: str) -> Finding:
    return Finding(name, "warning", seen, advice) if unfit else Finding(name, "ok", seen)


def _graded(name: str, value: float, low: float, enough: float, seen: str, advice: str) -> Finding:
    """A problem below the first number, a warning below the second."""
    if value < low:
        return Finding(name, "problem", seen, advice)
    return _warning_if(value < enough, name, seen, advice)


def check_trial(name: str, trial: Trial, advice: str, needed: bool = True) -> Finding:
    """Whether a child did what it was to do; what is not needed for training is a warning."""
    said = "; ".join(str(value) for value in trial.said)
    if trial.failure:
        seen = f"{said}; {trial.failure}" if said else trial.failure
        return Finding(name, "problem" if needed else "warning", seen, advice)
    return Finding(name, "ok", said)


def _packages() -> Iterator[Finding]:
    """Python and the packages that training needs."""
    try:
        wanted = requirements(metadata.requires("acktr") or ())
        yield check_python(metadata.metadata("acktr")["Requires-Python"] or "")
    except metadata.PackageNotFoundError:
        wanted = dict.fromkeys(TESTED, "")
        seen = "not installed, so that the versions that it needs are not known"
        yield Finding("acktr", "warning", seen, "pip install . in its folder")
    broken = broken_imports(name for name in wanted if _installed(name) is not None)
    for name, versions in wanted.items():
        yield check_package(name, versions, broken)


def _steps(run_dir: Path) -> list[tuple[str, tuple[str, ...], Callable[[], Iterable[Finding]]]]:
    """The checks in order, each with the packages without which it is left out."""
    again, simulated = "pip install --force-reinstall", ("gymnasium", "mujoco")
    drawing = "only videos and pictures of MuJoCo need it: apt install libegl1 libopengl0"

    def trial(name: str, program: str, advice: str, needed: bool = True) -> list[Finding]:
        return [check_trial(name, attempt(program), advice, needed)]

    return [
        ("packages", (), _packages),
        ("Atari", ("ale-py",), lambda: trial("Atari", _ATARI, f"{again} ale-py")),
        ("MuJoCo", simulated, lambda: trial("MuJoCo", _MUJOCO, f"{again} mujoco")),
        ("workers", _SIMULATORS, lambda: trial("workers", _WORKERS, "train with --env-workers 1")),
        ("drawing", _SIMULATORS, lambda: trial("drawing", _DRAW, drawing, needed=False)),
        ("threads", ("torch",), lambda: check_torch(attempt(_TORCH))),
        ("processor", (), lambda: [check_processor()]),
        ("run folder", (), lambda: check_place(run_dir)),
        ("system", (), check_system),
    ]


def examine(run_dir: Path) -> Iterator[Finding]:
    """Look at one thing after the other; what cannot be looked at is a warning."""
    unusable: set[str] = set()
    for name, needs, check in _steps(run_dir):
        lacks = ", ".join(package for package in needs if package in unusable)
        if lacks:
            yield Finding(name, "warning", f"not looked at, as it needs {lacks}")
            continue
        try:
            for finding in check():
                if finding.status == "problem":
                    unusable.add(finding.name)
                yield finding
        except Exception as error:  # whatever is wrong here, the other things are looked at
            yield Finding(name, "warning", f"cannot be looked at: {type(error).__name__}: {error}")
