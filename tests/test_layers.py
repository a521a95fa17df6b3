"""Imports follow the data: from the command line down to environments and curvature, never up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

GROUND = {"files", "interrupts", "tree"}
BELOW_TRAIN = {"envs", "kfac", "config", "compute", *GROUND}
LEARNING = {"policies", "rollout", "algorithms"}
RUNS = {"world", "environments", "train", "evaluate", "runs"}
ALLOWED: dict[str, set[str]] = {
    "envs": set(),
    "kfac": set(),
    "files": set(),
    "interrupts": set(),
    "tree": set(),
    "config": {"kfac", "envs", "files"},
    "compute": {"config", "envs", "tree"},
    "policies": {"compute", "config", "envs", "kfac", "tree"},
    "rollout": {"policies", "kfac", "compute", "config", "envs", "tree"},
    "algorithms": {"rollout", "policies", "kfac", "compute", "config", "tree"},
    "environments": {"config", "envs"},
    "apart": {"algorithms", "rollout", "kfac", "config", "envs"},
    "world": {*LEARNING, "kfac", "config"},
    "train": {*LEARNING, "apart", "world", "kfac", "compute", "config", "envs", "tree"},
    "evaluate": {"envs"},
    "given": {"config", "environments", "envs"},
    "export": {"policies", "envs", "environments", "files", "runs", "tree"},
    "listeners": {*BELOW_TRAIN, *RUNS},
    "callbacks": {*BELOW_TRAIN, *RUNS, "apart", "listeners", "policies"},
    "learning": {*BELOW_TRAIN, *RUNS, "callbacks", "given", "listeners", "report"},
    "predictor": {"policies", "export", "envs", "config", "train"},
    "runs": {*LEARNING, *BELOW_TRAIN, "world", "environments", "train", "evaluate"},
    "agent": {
        *LEARNING,
        *BELOW_TRAIN,
        *RUNS,
        "callbacks",
        "export",
        "given",
        "learning",
        "listeners",
        "predictor",
    },
    "public": {"agent", "export", *LEARNING, *BELOW_TRAIN, *RUNS},
    "compare": {*RUNS, *BELOW_TRAIN, "policies"},
    "report": {"runs", "config", "files"},
    "doctor": {"files"},
    "cli": {"doctor", *LEARNING, *BELOW_TRAIN, *RUNS, "agent", "export", "compare", "report"},
}
"""What each part of ``acktr`` may import besides itself; ``acktr`` alone is its version."""

KFAC = (
    {"channel", "checks", "modules", "tensors"},
    {"config", "losses", "state"},
    {"cadence", "linalg", "placement", "ranks", "trust"},
    {"clock", "corrected", "statistics"},
    {"blocks", "fisher"},
    {"guard", "parameter_groups", "region"},
    {"estimator"},
    {"curvature"},
    {"named_optimizer", "preconditioner"},
    {"quadratic"},
    {"optimizer"},
    {"dense", "noisy"},
)
"""The layers of ``acktr.kfac`` from the ground up; each imports from those below it alone."""

FREE_OF = {"kfac": {"gymnasium", "numpy", "ale_py", "mujoco"}, "envs": {"torch"}}
"""What a part must not import from elsewhere."""
INSIDERS = ("scripts.reliability.",)
"""What breaks the inside on purpose, as tests do."""


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The modules that a file imports, with the names that it takes of each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module, tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)


def sources(root: Path) -> dict[str, Path]:
    """The files of the library and of the scripts, by module."""
    acktr = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for folder in ("acktr", "scripts")
        for path in (root / folder).rglob("*.py")
        if "envs" not in path.relative_to(root).parts
    }
    envs = {f"acktr.envs.{path.stem}": path for path in (root / "envs").glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in (acktr | envs).items()}


def part(module: str) -> str:
    """The part of the house that a module belongs to: the second word of its name."""
    return [*module.split("."), ""][1]


def wrong_directions(root: Path) -> list[str]:
    """Imports that go upward, or out of a part that is to stand alone."""
    found = []
    for module, path in sources(root).items():
        here = part(module)
        if not module.startswith("acktr.") or here == "__main__":
            continue
        for target, names in imports(path):
            if target.split(".")[0] in FREE_OF.get(here, set()):
                found.append(f"{module} imports {target}")
            if target.split(".")[0] != "acktr":
                continue
            parts = {part(target)} if target != "acktr" else {*names} - {"__version__"}
            if parts - ALLOWED[here] - {here}:
                found.append(f"{module} imports {target}")
    return found


def wrong_layers(root: Path) -> list[str]:
    """Imports inside of ``acktr.kfac`` that do not go to a lower layer."""
    level = {name: number for number, names in enumerate(KFAC) for name in names}
    found = []
    for module, path in sources(root).items():
        here = module.removeprefix("acktr.kfac.").split(".")[0]
        if not module.startswith("acktr.kfac."):
            continue
        for target, names in imports(path):
            there = [*target.split("."), "", ""][2]
            if not target.startswith("acktr.kfac") or here == there:
                continue
            if level.get(there, len(KFAC)) >= level[here]:
                found.append(f"{module} imports {target} ({', '.join(names)})")
    return found


def published(root: Path, package: str) -> set[str]:
    """The names in the ``__all__`` of a folder of the library."""
    folder = root / "envs" if package == "envs" else root / "acktr" / package
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def side_entrances(root: Path) -> list[str]:
    """Imports from inside of a folder of what its ``__init__`` does not name.

    A folder names objects, or modules whose public names are free to all.
    """
    folders = {path.parent.name for path in (root / "acktr").glob("*/__init__.py")} | {"envs"}
    found = []
    for module, path in sources(root).items():
        for target, names in imports(path):
            there = part(target)
            if not target.startswith("acktr.") or there not in folders or there == part(module):
                continue
            if module in ("acktr", "acktr.__main__") or module.startswith(INSIDERS):
                continue
            rest = target.split(".")[2:]
            asked = rest[:1] or names
            if not set(asked) <= published(root, there) or len(rest) > 1:
                found.append(f"{module} imports {target} ({', '.join(names)})")
            found += [f"{module} imports {target}.{n}" for n in names if n.startswith("_")]
    return found


def test_imports_go_down_only() -> None:
    assert wrong_directions(ROOT) == []


def test_imports_inside_of_kfac_go_down_only() -> None:
    assert wrong_layers(ROOT) == []


def test_folders_are_entered_by_the_door() -> None:
    assert side_entrances(ROOT) == []


def test_every_folder_says_what_comes_in_and_out() -> None:
    for folder in [*(ROOT / "acktr").glob("*/__init__.py"), ROOT / "envs" / "__init__.py"]:
        text = ast.get_docstring(ast.parse(folder.read_text()))
        assert text and len(text) > 60, folder
        assert published(ROOT, folder.parent.name), folder


@pytest.mark.parametrize(
    "place, line, rule",
    [
        ("acktr/kfac/config.py", "from acktr.config import Config", "down"),
        ("acktr/kfac/config.py", "import gymnasium", "down"),
        (
            "acktr/kfac/linalg.py",
            "from acktr.kfac.blocks.tridiagonal import TridiagonalBlock",
            "kfac",
        ),
        ("acktr/kfac/blocks/x.py", "from acktr.kfac.fisher import products", "kfac"),
        ("acktr/kfac/blocks/refresh.py", "from acktr.kfac import KFAC", "kfac"),
        ("envs/seeding.py", "import torch", "down"),
        ("acktr/rollout/x.py", "from acktr.runs.start import start", "down"),
        ("acktr/train.py", "from acktr import agent", "down"),
        ("acktr/train.py", "from acktr.policies.networks import build_network", "door"),
        ("acktr/cli/x.py", "from acktr.runs.start import _hidden", "door"),
        ("scripts/x.py", "from acktr.kfac.linalg import FactorError", "door"),
        ("scripts/x.py", "from acktr.config.schema import build", "door"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, place: str, line: str, rule: str) -> None:
    for module, path in sources(ROOT).items():
        if path.name == "__init__.py" and module.startswith("acktr."):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text())
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    check = {"down": wrong_directions, "door": side_entrances, "kfac": wrong_layers}[rule]
    assert check(tmp_path) == []
    (tmp_path / place).write_text(line + "\n")
    assert len(check(tmp_path)) == 1
