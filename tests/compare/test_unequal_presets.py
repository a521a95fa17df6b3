from __future__ import annotations

from pathlib import Path

from acktr.compare.entries import parse_algo
from acktr.compare.grid import make_plans, unequal_presets


class TestUnequalPresets:
    """gamma 0.9999 beside 0.99 is no comparison of algorithms, and is told."""

    @staticmethod
    def lines(run_dir: Path, *algos: str) -> list[str]:
        envs = ["Swimmer-v5", "HalfCheetah-v5"]
        entries = [parse_algo(algo) for algo in algos]
        return unequal_presets(make_plans(envs, entries, (0, 1), run_dir, None, {}))

    def test_an_id_of_which_only_some_have_values_is_named(self, tmp_path: Path) -> None:
        assert self.lines(tmp_path, "acktr", "a2c", "trpo") == [
            "Swimmer-v5: acktr with the preset of this id, a2c, trpo without one: acktr-family"
            " starts from values of the family"
        ]
        assert len(self.lines(tmp_path, "acktr", "acktr-family")) == 1

    def test_equal_ones_are_not(self, tmp_path: Path) -> None:
        assert self.lines(tmp_path, "acktr-family", "a2c") == self.lines(tmp_path, "acktr") == []
