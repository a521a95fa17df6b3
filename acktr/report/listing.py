"""Runs at a glance: a row for each, what sets two apart, and a card of one."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acktr.config import ConfigError, from_dict, preset, to_dict
from acktr.files import flat, read_object
from acktr.report.results import Result, read_result
from acktr.report.tables import cell, markdown, number
from acktr.runs.folder import RunFolder

MARK = "<!-- written by acktr card -->"
"""Line by which a card is known, so that nothing else is overwritten."""

_NAMESPACES = ("ALE/", "Pixels/")
_ANY = "an environment without a preset of its own"

_OWN = ("env", "algo", "preset", "seed", "device")
"""Settings that are in a run's name, or do not set it apart from its preset."""


@dataclass(frozen=True)
class Row:
    """A run at a glance."""

    run: str
    """Its folder, or its name in an archive."""
    env: str
    label: str
    seed: int
    finished: bool
    """Whether it made all its steps and was evaluated."""
    steps: int
    """Environment steps made."""
    total_steps: int
    planned: int
    """Steps it was to make when it began; others than ``total_steps`` if a resume changed them."""
    last100: float | None
    """Mean return of the last 100 training episodes."""
    evaluation: float | None
    """Mean return of the last evaluation."""
    best: float | None
    """Mean return of the best evaluation."""
    minutes: float | None
    """Minutes of training."""
    changed: Mapping[str, Any] | None
    """Settings that are not the preset's; None where the preset is not known."""
    replanned: str | None
    """From which length it was lengthened or shortened, in words."""


def row(run: Path, named: bool = True) -> Row:
    """A run at a glance.

    Args:
        run: Its folder.
        named: Whether it goes by its folder, or else (as one in an archive) by ENV/LABEL/seedN.

    Raises:
        RunError, ValueError: A file of it is damaged; one line.
    """
    result = read_result(run, with_curve=False)
    means = [mean for _, mean in result.evaluations]
    return Row(
        run=str(run) if named else result.name,
        env=result.env,
        label=result.label,
        seed=result.seed,
        finished=result.finished,
        steps=result.steps,
        total_steps=result.total_steps,
        planned=result.planned,
        last100=result.last100,
        evaluation=means[-1] if means else None,
        best=max(means, default=None),
        minutes=result.minutes,
        changed=changed(result.config),
        replanned=result.replanned,
    )


def changed(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of a config.json that are not its preset's; None where there is no such preset.

    No module is imported: the presets of environments in modules are those of their namespace.
    """
    try:
        stored = from_dict(config)
        theirs = _preset(_known_env(stored.env), stored.algo, stored.preset)
    except ConfigError:
        return None
    ours = flat(to_dict(stored))
    others = [name for name in ours | theirs if name not in _OWN]
    return {name: ours.get(name) for name in others if ours.get(name) != theirs.get(name)}


def _known_env(env: str) -> str:
    """An environment's id for its preset: without the module, if nobody has imported that."""
    module, colon, name = env.rpartition(":")
    if not colon or module in sys.modules:
        return env
    # A name alone is any environment's: in a module, CartPole-v1 is not Gymnasium's.
    return name if name.startswith(_NAMESPACES) else _ANY


@functools.cache
def _preset(env: str, algo: str, name: str) -> dict[str, Any]:
    """The settings of a preset, which many runs of a table have in common."""
    return flat(to_dict(preset(env, algo, name)[0]))


def rows_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    head = ["run", "steps", "last 100", "evaluation", "best", "minutes", "changed from the preset"]
    body = []
    for each in rows:
        part = "" if each.finished else f" ({each.steps / max(each.total_steps, 1):.0%})"
        settings = "unknown"
        if each.changed is not None:
            settings = ", ".join(f"{name}={value}" for name, value in each.changed.items())
        if each.replanned:
            settings = f"{settings}; {each.replanned}" if settings else each.replanned
        numbers = map(_number, (each.last100, each.evaluation, each.best, each.minutes))
        body.append([each.run, f"{each.steps:,}{part}", *numbers, settings])
    return aligned_text(head, body, words=(0, 6))


def aligned_text(
    head: Sequence[str], body: Sequence[Sequence[str]], words: Sequence[int] = (0,)
) -> str:
    """A table as text, words on the left of their columns and numbers on the right."""
    lines = [head, *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = []
    for line in lines:
        cells = (
            text.ljust(width) if column in words else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def rows_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(each) for each in rows])


def differences(one: Path, other: Path) -> list[tuple[str, str, str]]:
    """Settings and versions in which two runs, or files of settings, differ; their values.

    Raises:
        RunError, ValueError: A file is missing or damaged; one line.
    """
    ours, theirs = _known(one), _known(other)
    return [
        (name, _value(ours, name), _value(theirs, name))
        for name in ours | theirs
        if _value(ours, name) != _value(theirs, name)
    ]


def _value(side: Mapping[str, Any], name: str) -> str:
    return json.dumps(side[name]) if name in side else "-"


def _known(path: Path) -> dict[str, Any]:
    """Settings of a run or a file, and the versions of a run."""
    if path.is_file():
        return flat(read_object(path))
    folder = RunFolder.open(path)
    versions = read_object(folder.versions) if folder.versions.exists() else {}
    return flat(folder.read_config()) | {f"versions.{k}": v for k, v in versions.items()}


def card(run: Path) -> str:
    """A page about a run in the form of model cards: what it is, its scores, how to use it.

    Raises:
        RunError, ValueError: A file of it is damaged; one line.
    """
    result = read_result(run, with_curve=False)
    settings = changed(result.config)
    lines = [
        *_front_matter(result),
        "",
        MARK,
        "",
        f"# {cell(result.algo.upper())} in {cell(result.env)}",
    ]
    lines += ["", f"Trained by acktr for {result.steps:,} of"]
    skip = result.frame_skip
    each = f", each of them {skip} of the environment behind the pictures" if skip > 1 else ""
    each += f", {result.replanned}" if result.replanned else ""
    lines += [f"{result.total_steps:,} environment steps{each}, seed {result.seed}.", ""]
    scores = [["mean of the last 100 training episodes", _number(result.last100)]]
    for steps, mean in result.evaluations[-1:]:
        scores.append([f"evaluation at step {steps:,}", _number(mean)])
    lines.append(markdown(["return", "mean"], scores))
    if settings:
        lines.append("Settings besides the preset:\n")
        rows = [[cell(name), cell(json.dumps(value))] for name, value in settings.items()]
        lines.append(markdown(["setting", "value"], rows, left=2))
    versions = [[cell(name), cell(value)] for name, value in result.versions.items()]
    if versions:
        lines.append(markdown(["made with", "version"], versions, left=2))
    lines += ["```python", f"from acktr import {result.algo.upper()}", ""]
    lines += [f'agent = {result.algo.upper()}.load("checkpoints/last")  # in this folder', "```"]
    return "\n".join(lines) + "\n"


def _front_matter(result: Result) -> list[str]:
    """What the Hugging Face Hub reads; JSON texts are YAML."""
    env = json.dumps(result.env)
    lines = ["---", "library_name: acktr", "tags:", f"- {env}", "- reinforcement-learning"]
    lines += ["- deep-reinforcement-learning", f"- {json.dumps(result.algo)}"]
    if result.final is not None:
        value = json.dumps(f"{result.final.mean:.2f} +/- {result.final.std:.2f}")
        kind = "reinforcement-learning"
        lines += ["model-index:", f"- name: {json.dumps(result.algo)}", "  results:", "  - task:"]
        lines += [
            f"      type: {kind}",
            f"      name: {kind}",
            "    dataset:",
            f"      name: {env}",
        ]
        lines += [f"      type: {env}", "    metrics:", "    - type: mean_reward"]
        lines += [f"      value: {value}", "      name: mean_reward", "      verified: false"]
    return [*lines, "---"]


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else number(value)
