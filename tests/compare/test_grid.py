from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from acktr.cli.training import parse_train
from acktr.compare import entries
from acktr.compare import status as status_module
from acktr.compare.entries import Entry, Overlay, parse_algo, parse_seeds
from acktr.compare.grid import RunPlan, make_plans, train_args
from acktr.compare.status import State, Status, claimed, status, survey
from acktr.config import Config, ConfigError, from_dict, merge, preset, to_dict
from acktr.envs import EnvError
from acktr.interrupts import Interrupts
from acktr.runs.folder import RunError, RunFolder, locked, run_path
from acktr.runs.start import start

SMALL = {"num_envs": 2, "num_steps": 32, "total_timesteps": 128, "device": "cpu"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plans(run_dir: Path, *seeds: int, **changes: Any) -> list[RunPlan]:
    small = {**SMALL, "eval_episodes": 1, **changes}
    return make_plans(
        ["CartPole-v1"], [Entry("acktr", "acktr")], seeds or (0,), run_dir, None, small
    )


class TestSeeds:
    def test_integers_and_ranges(self) -> None:
        assert parse_seeds(["0-2", "7", "9-9"]) == (0, 1, 2, 7, 9)
        assert parse_seeds([]) == ()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x", "an integer or a range such as 0-4 is needed, not 'x'"),
            ("-1", "not '-1'"),
            ("1.0", "not '1.0'"),
            ("٣", "is needed"),
            ("4-2", "4-2 ends before it begins"),
            ("0-999999999", "more than 10,000"),
        ],
    )
    def test_others_are_refused(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            parse_seeds(["0", text])


class TestAlgo:
    def test_presets(self) -> None:
        assert parse_algo("acktr") == Entry("acktr", "acktr", "default")
        assert parse_algo("acktr-paper") == Entry("acktr-paper", "acktr", "paper")
        assert parse_algo("acktr-default") == Entry("acktr-default", "acktr", "default")

    def test_the_longest_known_name_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(entries, "ALGOS", ("a", "a-b"))
        assert parse_algo("a-paper") == Entry("a-paper", "a", "paper")
        assert parse_algo("a-b") == Entry("a-b", "a-b", "default")
        assert parse_algo("a-b-paper") == Entry("a-b-paper", "a-b", "paper")

    def test_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(entries, "ALGOS", ("acktr", "trpo"))
        file = tmp_path / "some=thing.json"
        for values, label, expected in [
            ({"gamma": 0.9}, "wide", ("acktr", "default")),
            ({"gamma": 0.9}, "trpo-wide", ("trpo", "default")),
            ({"gamma": 0.9}, "trpo-paper", ("trpo", "paper")),
            ({"algo": "trpo", "preset": "paper"}, "acktr", ("trpo", "paper")),
        ]:
            file.write_text(json.dumps(values))
            entry = parse_algo(f"{label}={file}")
            assert (entry.label, entry.algo, entry.preset) == (label, *expected)
            assert entry.overlay == Overlay(file, values)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "must be one of acktr, a2c, trpo, acktr-paper; or LABEL=FILE.json"),
            ("x=", "'x=' must name a file"),
            ("akctr", "'akctr' must be one of acktr, .*did you mean acktr"),
            ("acktr-papr", "preset must be one of default, family, paper, got 'papr'"),
            ("x=none.json", "none.json: cannot read"),
            ("x=list.json", "list.json: must hold a JSON object"),
            ("x=algo.json", "algo.json: algo must be one of .*got \\['acktr'\\]"),
            ("x=preset.json", "preset.json: preset must be one of default, family, paper, got 3"),
        ],
    )
    def test_others_are_refused(
        self, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("list.json").write_text("[]")
        Path("algo.json").write_text('{"algo": ["acktr"]}')
        Path("preset.json").write_text('{"preset": 3}')
        with pytest.raises(ConfigError, match=message):
            parse_algo(text)


class TestPlans:
    def test_seeds_are_the_outer_loop(self, tmp_path: Path) -> None:
        entries = [Entry("acktr", "acktr"), Entry("acktr-paper", "acktr", "paper")]
        found = make_plans(["Hopper-v5", "Ant-v5"], entries, (3, 1), tmp_path)
        assert [str(plan.path.relative_to(tmp_path)) for plan in found] == [
            f"{env}/{label}/seed{seed}"
            for seed in (3, 1)
            for env in ("Hopper-v5", "Ant-v5")
            for label in ("acktr", "acktr-paper")
        ]
        for plan in found:
            name = "paper" if plan.label == "acktr-paper" else "default"
            wanted = preset(plan.config.env, "acktr", name)[0]
            assert plan.config == dataclasses.replace(
                wanted, seed=plan.config.seed, eval_episodes=20
            )
        assert found[0].name == "Hopper-v5 acktr seed 3"
        assert found[0].log == tmp_path / "logs/Hopper-v5/acktr-seed3.log"

    def test_preset_then_common_then_own_then_options(self, tmp_path: Path) -> None:
        common = {"gamma": 0.9, "num_envs": 3, "eval_episodes": 7, "env": "X", "seed": 9}
        common |= {"acktr": {"actor": {"damping": 0.5, "lr": 0.125}}, "total_timesteps": 5}
        own = {"num_envs": 4, "acktr": {"actor": {"lr": 0.5}}, "preset": "paper", "algo": "acktr"}
        entry = Entry("v", "acktr", "paper", Overlay(Path("own"), own))
        changes = {"total_timesteps": 64}
        (plan,) = make_plans(
            ["Hopper-v5"], [entry], (2,), tmp_path, Overlay(Path("all"), common), changes
        )
        wanted = {"gamma": 0.9, "num_envs": 4, "eval_episodes": 7, "total_timesteps": 64}
        actor = {"damping": 0.5, "lr": 0.5}
        base = preset("Hopper-v5", "acktr", "paper")[0]
        assert plan.config == merge(base, {**wanted, "seed": 2, "acktr": {"actor": actor}})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"envs": []}, "envs: at least one"),
            ({"seeds": ()}, "seeds: at least one"),
            ({"entries": []}, "algos: at least one"),
            ({"seeds": (1, 1)}, "two runs for the folder .*seed1"),
            ({"envs": ["a/B-v0", "a_B-v0"]}, "two runs for the folder"),
            ({"seeds": (2**31,)}, "seed must be an integer >= 0 and <= 2146435071"),
            ({"entries": [Entry("../x", "acktr")]}, "label must be"),
            ({"entries": [Entry("p", "acktr", "paper")]}, "no configuration for CartPole-v1"),
            ({"common": Overlay(Path("f.json"), {"gama": 1})}, "f.json: .*did you mean gamma"),
            ({"changes": {"total_timesteps": 0}}, "total_timesteps must be"),
        ],
    )
    def test_bad_grids(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        good: dict[str, Any] = {"envs": ["CartPole-v1"], "seeds": (0,), "run_dir": tmp_path}
        good["entries"] = [Entry("acktr", "acktr")]
        with pytest.raises(ConfigError, match=message):
            make_plans(**{**good, **changes})


def altered(values: dict[str, Any]) -> dict[str, Any]:
    """Every number and switch changed."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found[key] = altered(value)
        elif isinstance(value, bool):
            found[key] = not value
        elif isinstance(value, int):
            found[key] = value + 1
        elif isinstance(value, float):
            found[key] = value / 3 - (0.1 if key == "log_std_init" else 0)
        else:
            found[key] = value
    return found


class TestTrainArgs:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            altered(to_dict(preset("Hopper-v5")[0])),
            {
                "precision": "bfloat16",
                "device": "cuda:1",
                "network": {"hidden": [], "critic_hidden": [5, 6, 7], "activation": "elu"},
                "acktr": {
                    "target_kl": 1e-05,
                    "actor": {"kl_clip": None, "structure": "ekfac"},
                },
                "atari": {"sticky": 0.25},
            },
        ],
    )
    def test_train_reads_back_the_same_configuration(
        self, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        overlay = Overlay(Path("f"), {**changes, "algo": "acktr", "preset": "default"})
        run_dir = Path("-odd") / tmp_path.name
        entry = Entry("some.label", "acktr", "default", overlay)
        (plan,) = make_plans(["Hopper-v5"], [entry], (7,), run_dir)
        args = train_args(plan, False)
        assert args[0] == "train"
        options, _ = parse_train(args[1:])
        assert options.settings == plan.config
        assert options.settings.seed == 7
        assert run_path(options.run_dir, options.settings, options.label) == plan.path

    def test_only_what_differs_is_named(self, tmp_path: Path) -> None:
        (plan,) = plans(tmp_path, 3, num_steps=33)
        assert train_args(plan, False, "mod") == [
            *("train", "--env", "CartPole-v1", "--algo", "acktr", "--preset", "default"),
            *("--label", "acktr", "--seed", "3", "--run-dir", str(tmp_path), "--import", "mod"),
            *("--total-timesteps", "128", "--num-envs", "2", "--num-steps", "33"),
            *("--device", "cpu", "--eval-episodes", "1"),
        ]

    def test_resume(self, tmp_path: Path) -> None:
        (plan,) = plans(tmp_path)
        assert train_args(plan, True) == ["train", "--resume", str(plan.path)]
        assert train_args(plan, True, "m") == [
            *("train", "--resume", str(plan.path), "--import", "m")
        ]
        own = dataclasses.replace(
            plan, config=dataclasses.replace(plan.config, env="tests.tools.toys:X")
        )
        assert train_args(own, True)[-2:] == ["--import", "tests.tools.toys"]

    def test_early_stop(self, tmp_path: Path) -> None:
        plan = dataclasses.replace(plans(tmp_path)[0], stop_at=64)
        assert train_args(plan, True) == ["train", "--resume", str(plan.path), "--stop-at", "64"]
        options, _ = parse_train(train_args(plan, False)[1:])
        assert (options.stop_at, options.settings) == (64, plan.config)


def trained(run_dir: Path, config: Config) -> Path:
    start(config, run_dir, "test", Interrupts(), ["acktr"], lambda folder, config: None)
    return run_path(run_dir, config)


class TestStatus:
    def test_life_of_a_run(self, tmp_path: Path) -> None:
        (plan,) = plans(tmp_path)
        assert status(plan).state is State.NEW
        plan.path.mkdir(parents=True)
        assert status(plan).state is State.NEW
        (plan.path / "checkpoints").mkdir()
        assert status(plan).state is State.NEW
        (plan.path / "curve.png").touch()
        found = status(plan)
        assert found.state is State.STUCK
        assert found.reason == f"{plan.path} holds no run; delete it and start again"
        RunFolder(plan.path).write_config(to_dict(plan.config))
        found = status(plan)
        assert found.state is State.STUCK
        assert found.reason == f"{plan.path} has no checkpoint; delete it and start again"
        (plan.path / "curve.png").unlink()
        assert status(plan).state is State.NEW
        shutil.rmtree(plan.path)
        trained(tmp_path, plan.config)
        assert status(plan) == Status(State.FINISHED, 128)
        shutil.copytree(plan.path / "checkpoints", tmp_path / "kept")
        shutil.rmtree(plan.path / "checkpoints")  # a copy of the numbers only
        assert status(plan) == Status(State.FINISHED, 128)
        shutil.copytree(tmp_path / "kept", plan.path / "checkpoints")
        (plan.path / "eval.csv").unlink()
        assert status(plan) == Status(State.UNFINISHED, 128)
        (plan.path / "eval.csv").write_text("timesteps,mean_reward\n64,1\n")
        assert status(plan) == Status(State.UNFINISHED, 128)
        (plan.path / "checkpoints/last/meta.json").write_text("{}")
        assert status(plan) == Status(State.UNFINISHED, 0)

    def test_evaluation_without_its_checkpoint_is_not_the_end(self, tmp_path: Path) -> None:
        """As when the disk was full for the last checkpoint only."""
        (plan,) = plans(tmp_path)
        (longer,) = plans(tmp_path, total_timesteps=256)
        path = trained(tmp_path, plan.config)
        folder = RunFolder(path)
        folder.write_config(to_dict(longer.config))
        with folder.evaluations.open("a") as file:
            file.write("256,1,0,1,1,1\n")
        assert status(longer) == Status(State.UNFINISHED, 128)

    def test_another_configuration_is_refused(self, tmp_path: Path) -> None:
        (plan,) = plans(tmp_path)
        RunFolder.create(plan.path).write_config(
            to_dict(merge(plan.config, {"acktr": {"actor": {"damping": 0.5}}}))
        )
        with pytest.raises(RunError, match=r"seed0: its acktr.actor.damping is 0.5 but the grid's"):
            status(plan)

    def test_number_of_processes_is_no_other_configuration(self, tmp_path: Path) -> None:
        (plan,) = plans(tmp_path)
        trained(tmp_path, dataclasses.replace(plan.config, env_workers=2))
        assert status(plan) == Status(State.FINISHED, 128)

    def test_damaged_configuration_is_refused(self, tmp_path: Path) -> None:
        (plan,) = plans(tmp_path)
        RunFolder.create(plan.path).config.write_text("{")
        with pytest.raises(RunError, match=r"config\.json: not valid JSON"):
            status(plan)

    def test_run_in_training_is_refused(self, tmp_path: Path) -> None:
        (plan,) = plans(tmp_path)
        RunFolder.create(plan.path)
        with (
            locked(RunFolder(plan.path)),
            pytest.raises(RunError, match="another process is training this run"),
        ):
            status(plan)

    def test_file_in_place_of_the_folder(self, tmp_path: Path) -> None:
        (plan,) = plans(tmp_path)
        plan.path.parent.mkdir(parents=True)
        plan.path.touch()
        with pytest.raises(RunError, match="cannot read: Not a directory"):
            status(plan)


class TestSurvey:
    def test_cells_that_are_left_are_built_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = plans(tmp_path, 0, 1, 2)
        trained(tmp_path, found[0].config)
        checked: list[int] = []
        monkeypatch.setattr(status_module, "check", lambda config, *_: checked.append(config.seed))
        states = [State.FINISHED, State.NEW, State.NEW]
        assert [item.state for item in survey(found)] == states
        assert checked == [1]

    def test_nothing_is_written(self, tmp_path: Path) -> None:
        assert [item.state for item in survey(plans(tmp_path, 0, 1))] == [State.NEW] * 2
        assert os.listdir(tmp_path) == []

    def test_what_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="CartPole-v1 acktr: device must be auto"):
            survey(plans(tmp_path, device="tpu"))
        with pytest.raises(EnvError, match="num_envs must be an integer from 1 to"):
            survey(plans(tmp_path, num_envs=10**6))
        (plan,) = plans(tmp_path)
        values = {**to_dict(plan.config), "env": "CartPol-v1"}
        with pytest.raises(EnvError, match="did you mean 'CartPole-v1'"):
            survey([dataclasses.replace(plan, config=from_dict(values))])


class TestClaim:
    @staticmethod
    def elsewhere(found: Sequence[RunPlan]) -> str:
        """What another process is told that claims the same; nothing if it may have them."""
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with claimed(found):
                    os._exit(0)
            except RunError as error:
                os.write(theirs, str(error).encode())
            finally:
                os._exit(1)
        os.close(theirs)
        with os.fdopen(ours) as file:
            said = file.read()
        os.waitpid(child, 0)
        return said

    def test_run_is_for_one_comparison(self, tmp_path: Path) -> None:
        found = plans(tmp_path, 0, 1, 2)
        with claimed(found[:2]):
            refused = f"{found[1].path}: another acktr compare trains this run"
            assert self.elsewhere(found[1:]) == refused
            assert self.elsewhere(found[2:]) == ""
        assert self.elsewhere(found) == ""

    def test_nothing_is_written_without_runs(self, tmp_path: Path) -> None:
        with claimed([]):
            assert list(tmp_path.iterdir()) == []
