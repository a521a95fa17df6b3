"""The options by name alone: a misspelt one is told before anything that takes seconds is imported.

A test holds the table against the options themselves.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

HELP_ALL = "--help-all"
"""Asks for the page of all options of ``acktr train``."""
HELP = frozenset(("-h", "--help"))
"""Either asks for the page of a command."""

REPEATED: Mapping[str, str] = {
    "--env-kwargs": "--env-kwargs",
    "--wrapper": "--wrappers",
    "--wrappers": "--wrappers",
}
"""Options that may be given several times, and what the parser calls them."""
_LISTS = ("--algos", "--envs", "--labels", "--record", "--seeds")
"""Options of several values, which are given one after another."""


class UsageError(ValueError):
    """A command line that cannot be used; the message is one line."""


def _group(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}" for name in names.split())


_KFAC = """
    lr kl-clip damping structure stat-decay stat-interval momentum weight-decay refresh-interval
    eager-start refresh-delay cold-steps cold-lr cold-max-grad-norm conv-sharing linear-sharing
    small-parameters dense-limit max-factor-size factor-rows float64 fast-products quadratic
    max-failures stat-fraction"""
_CRITIC = "optimizer lr epochs batch-size momentum adam-eps"
_OF_AGENTS = "checkpoint seed device network import"

FLAGS: Mapping[str, tuple[str, ...]] = {
    "train": (
        *_group(
            "",
            """config run-dir label resume stop-at nproc curvature-ranks rank-timeout max-restarts
            network import env algo preset seed total-timesteps env-kwargs wrappers wrapper num-envs
            env-workers env-timeout masks num-steps micro-batch gamma gae-lambda ent-coef vf-coef
            normalize-advantage normalize-observation normalize-parts normalize-reward device
            precision compile eval-freq eval-episodes record checkpoint-freq help-all""",
        ),
        *_group(
            "network.",
            """shared hidden critic-hidden activation critic-activation trunk policy-gain
            log-std-init channels memory memory-width memory-window custom""",
        ),
        *_group(
            "acktr.", "critic-steps critic-optimizer target-kl value-sigma value-fisher lr-schedule"
        ),
        *_group("acktr.actor.", _KFAC),
        *_group("acktr.critic.", _KFAC),
        *_group("acktr.first-order.", _CRITIC),
        *_group("a2c.", "lr lr-schedule rms-alpha rms-eps max-grad-norm"),
        *_group(
            "trpo.",
            """max-kl cg-iterations cg-damping cg-tolerance fisher-fraction backtrack-factor
            backtrack-steps""",
        ),
        *_group("trpo.critic.", _CRITIC),
        *_group(
            "atari.",
            """frame-skip screen-size frame-stack noop-max fire-reset fire-after-life-loss
            life-loss-ends-return clip-reward sticky full-action-space max-frames num-threads
            num-groups reseed-steps""",
        ),
        *_group(
            "pixels.",
            "size frame-stack frame-skip camera shadows multisample blank-start",
        ),
    ),
    "compare": _group(
        "",
        """envs algos seeds workers engine run-dir total-timesteps stop-at eval-episodes env-kwargs
        wrappers wrapper config network import""",
    ),
    "eval": _group("", f"{_OF_AGENTS} episodes num-envs deterministic stochastic json"),
    "record": _group("", f"{_OF_AGENTS} out episodes max-steps"),
    "export": _group("", "checkpoint out network import"),
    "plot": _group("", "out x title published"),
    "report": _group("", "out metric labels baseline resamples references published"),
    "list": _group("", "sort json"),
    "diff": (),
    "presets": _group("", "algo preset import"),
    "card": _group("", "out"),
    "doctor": _group("", "run-dir json"),
}
"""The options of every command, without dashes."""

_LR = "--acktr.actor.lr (--a2c.lr of A2C, --trpo.max-kl of TRPO)"
_SAID_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("n-envs", "num-env", "n-env", "num-processes"), "--num-envs"),
    **dict.fromkeys(("n-steps", "nsteps", "rollout-length", "horizon"), "--num-steps"),
    **dict.fromkeys(
        ("n", "n-timesteps", "num-timesteps", "timesteps", "steps", "total-steps", "num-env-steps"),
        "--total-timesteps",
    ),
    **dict.fromkeys(("env-id", "env-name", "environment", "gym-id", "task"), "--env"),
    **dict.fromkeys(("algorithm", "agent"), "--algo"),
    **dict.fromkeys(("learning-rate", "lr"), _LR),
    **dict.fromkeys(("entropy-coef", "ent-coeff", "entropy"), "--ent-coef"),
    **dict.fromkeys(("value-loss-coef", "vf-coeff", "value-coef"), "--vf-coef"),
    **dict.fromkeys(("discount", "gamma-discount"), "--gamma"),
    **dict.fromkeys(("lam", "lambda"), "--gae-lambda"),
    **dict.fromkeys(("max-kl", "target-kl", "delta"), "--acktr.actor.kl-clip or --trpo.max-kl"),
    **dict.fromkeys(("policy-kwargs", "net-arch", "hidden-sizes"), "--network.hidden 64 64"),
    **dict.fromkeys(
        ("f", "log-dir", "log-folder", "logdir", "output", "out", "save-path"), "--run-dir"
    ),
    **dict.fromkeys(("exp-name", "run-name", "name", "tb-log-name"), "--label"),
    **dict.fromkeys(("save-freq", "save-interval", "checkpoint-interval"), "--checkpoint-freq"),
    **dict.fromkeys(("n-eval-episodes", "num-eval-episodes"), "--eval-episodes"),
    **dict.fromkeys(("eval-interval", "evaluate-every"), "--eval-freq"),
    **dict.fromkeys(("hyperparams", "params", "hyperparameter", "conf-file"), "--config FILE"),
    **dict.fromkeys(("i", "trained-agent", "continue", "load", "restore"), "--resume RUN"),
    **dict.fromkeys(("gym-packages", "import-module"), "--import"),
    **dict.fromkeys(("cuda", "gpu"), "--device cuda"),
    **dict.fromkeys(("mixed-precision", "amp", "bf16"), "--precision bfloat16"),
    **dict.fromkeys(("vec-env", "num-workers", "n-jobs", "num-threads"), "--env-workers"),
    **dict.fromkeys(("frame-stack", "n-stack"), "--atari.frame-stack"),
    **dict.fromkeys(("recurrent", "lstm"), "--network.memory lstm"),
}
"""What an option of Stable-Baselines3, its Zoo, CleanRL or the like is in ``acktr train``."""

_NOT_NEEDED: Mapping[str, str] = {
    **dict.fromkeys(
        ("tensorboard-log", "tensorboard", "tb-log"),
        "TensorBoard's events are always written, to the run's folder: see --run-dir",
    ),
    **dict.fromkeys(
        ("progress", "progress-bar", "verbose", "log-interval"), "progress is always shown"
    ),
    **dict.fromkeys(
        ("render", "capture-video", "video"), "acktr record RUN writes a video afterwards"
    ),
    **dict.fromkeys(("policy",), "the network follows the spaces; --network takes one of your own"),
    **dict.fromkeys(
        ("track", "wandb", "wandb-project-name"),
        "see the recipe for Weights & Biases in scripts/examples/README.md",
    ),
    **dict.fromkeys(
        ("optimize", "optimize-hyperparameters"),
        "see the recipe for Optuna in scripts/examples/README.md",
    ),
    **dict.fromkeys(
        ("torch-deterministic", "deterministic"), "a seed gives the same run as it is: --seed"
    ),
}
"""What to say to one that nothing here corresponds to."""

_RUN_SAYS = "a run is given by its folder alone, such as runs/CartPole-v1/acktr/seed0"
_OF_RUNS: Mapping[str, str] = {
    **dict.fromkeys(("env", "env-id", "algo", "f", "folder", "i", "exp-id", "run-dir"), _RUN_SAYS),
    **dict.fromkeys(
        ("n-eval-episodes", "num-eval-episodes", "eval-episodes", "n-episodes"),
        "did you mean --episodes?",
    ),
    **dict.fromkeys(("load-best", "best"), "did you mean --checkpoint best?"),
    **dict.fromkeys(("n", "n-timesteps"), "did you mean --episodes or, of record, --max-steps?"),
}
"""The same, of commands that play with the agent of a run."""
_PLAYING = ("eval", "record")


def unknown_option(command: str, args: Sequence[str]) -> str | None:
    """One line on the first word that looks like an option and is none of the command's."""
    known = {*FLAGS[command], "help"}
    for arg in _options(args):
        name = arg.partition("=")[0]
        plain = name.lstrip("-").replace("_", "-")
        if not name.startswith("-") or not plain[:1].isalpha() or name == "-h":
            continue  # a value, such as -0.5
        if name.startswith("--") and (plain in known or _positive(plain) in known):
            continue
        return f"unknown option {name}; {_hint(command, plain)}"
    return None


def given_twice(args: Sequence[str]) -> str | None:
    """One line on the first option that is given again: the values before would be forgotten."""
    words = (arg.partition("=")[0].replace("_", "-") for arg in _options(args))
    names = [word for word in words if word.startswith("--")]
    names = [f"--{_positive(name[2:])}" for name in names if name not in REPEATED]
    for name in names:
        if names.count(name) > 1:
            once = "all its values once" if name in _LISTS else "it once"
            return f"{name} is given {names.count(name)} times: give {once}"
    return None


def _options(args: Sequence[str]) -> Sequence[str]:
    """The words among which are options: those behind ``--`` are none."""
    return args[: args.index("--")] if "--" in args else args


def _positive(name: str) -> str:
    """The name without the ``no-`` that switches it off."""
    group, dot, last = name.rpartition(".")
    return f"{group}{dot}{last.removeprefix('no-')}"


def _hint(command: str, name: str) -> str:
    """What was meant, as far as that is plain; a far guess is worse than none."""
    if command == "train" and name in _NOT_NEEDED:
        return _NOT_NEEDED[name]
    if command in _PLAYING and name in _OF_RUNS:
        return _OF_RUNS[name]
    if command == "train" and name in _SAID_ELSEWHERE:
        return f"did you mean {_SAID_ELSEWHERE[name]}?"
    known = FLAGS[command]
    same = [each for each in known if each.rpartition(".")[2] == name]
    begun = [each for each in known if len(name) > 2 and each.startswith(name)]
    near = (
        same or (begun if len(begun) <= 3 else []) or difflib.get_close_matches(name, known, 1, 0.8)
    )
    if near:
        *others, last = (f"--{each}" for each in near)
        return f"did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    page = f"acktr {command} {HELP_ALL if command == 'train' else '--help'}"
    return f"{page} lists all there are"


def with_named_env(args: Sequence[str]) -> list[str]:
    """The words of ``train`` where the first may be an environment's id by itself.

    Raises:
        UsageError: There are two.
    """
    if not args or args[0].startswith("-"):
        return list(args)
    if len(args) > 1 and not args[1].startswith("-"):
        raise UsageError(
            f"one environment is trained in, got {args[0]} and {args[1]}; acktr compare --envs has"
            " several, and --network takes a network of your own"
        )
    for word, following in zip(args, [*args[1:], ""], strict=True):
        if word == "--env" or word.startswith("--env="):
            other = following if word == "--env" else word.partition("=")[2]
            raise UsageError(f"one environment is trained in, got {args[0]} and {other}")
    return ["--env", *args]


TRAIN_HELP = """\
usage: acktr train ENV [OPTIONS]           for example: acktr train HalfCheetah-v5 --seed 1
       acktr train --resume RUN [--total-timesteps N]

Train an agent with the settings of the environment's preset, laid over by --config and by options.

what to train:
  --env ID                 environment, such as CartPole-v1, ALE/Pong-v5, module:Id (as ENV)
  --algo NAME              acktr, a2c or trpo (acktr)
  --preset NAME            default; family, without values for ENV alone; paper, as published
  --config FILE            settings: all or part of a config.json
  --network MODULE:NET     network of your own
  --import MODULE          module that registers the environment
  --env-kwargs KEY=VALUE   arguments of the environment; --wrapper MODULE:NAME around it

how long, and on what:
  --total-timesteps N      environment steps, such as 1e6 (the preset's)
  --seed N                 of environments, network and actions (0)
  --stop-at N              steps at which to stop early, on the schedule of all
  --num-envs N             parallel environments (the preset's)
  --device NAME            auto, cpu, cuda or cuda:N (auto)

what is kept:
  --run-dir DIR            folder of all runs (runs); this one is RUN_DIR/ENV/LABEL/seedN
  --label NAME             in place of the algorithm's name, to keep variants apart
  --eval-freq N            steps between evaluations (0: only at the end)
  --checkpoint-freq N      steps between checkpoints (100,000; Atari 500,000)
  --resume RUN             go on with a run

  --help-all               all settings with the defaults of ENV; --help-all acktr.actor a group
"""
