"""The comparison of sequence modules: cells that start alike, tasks, and the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from acktr.kfac import KFACConfig
from scripts.supervised import sequences
from scripts.supervised.sequences import CELLS, LENGTH, MAKERS, TASKS, Model


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cell", CELLS)
def test_all_models_of_a_cell_start_as_one_function(task: str, cell: str) -> None:
    batch = MAKERS[task](6, torch.Generator().manual_seed(0))
    found = []
    for made_of in ("module", "unknown", "linear"):
        torch.manual_seed(0)
        head = Model(task, cell, made_of)
        found.append(head(batch.tokens, batch.lengths))
    assert found[0].shape[: batch.targets.dim()] == batch.targets.shape
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_the_tasks_are_what_they_say() -> None:
    batch = MAKERS["memory"](50, torch.Generator().manual_seed(1))
    assert torch.equal(batch.tokens[:, 0] - 1, batch.targets)
    assert torch.equal((batch.tokens > 0).sum(1), batch.lengths)
    assert int(batch.lengths.min()) == LENGTH // 2 and int(batch.lengths.max()) == LENGTH
    batch = MAKERS["brackets"](50, torch.Generator().manual_seed(1))
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        text = ""
        for token, target in zip(tokens, targets, strict=True):
            text += " ([)]"[token]
            while "()" in text or "[]" in text:
                text = text.replace("()", "").replace("[]", "")
            assert "([".find(text[-1:] or " ") + 1 == target


def test_the_command_keeps_finished_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["--out", str(tmp_path), "--updates", "2", "--tasks", "memory", "--seeds", "0"]
    assert sequences.main([*line, "--cells", "gru", "--rows", "module"]) == 0
    kept = (tmp_path / "runs.csv").read_text()
    assert kept.startswith("task,cell,made_of,seed,update,accuracy,cpu_ms\nmemory,gru,module,0,2,")
    made: list[sequences.Spec] = []
    train = sequences.train

    def noted(spec: sequences.Spec, *tell: sequences.Tell) -> sequences.Rows:
        made.append(spec)
        return train(spec, *tell)

    monkeypatch.setattr(sequences, "train", noted)
    everything = [*line, "--cells", "gru", "attention", "--rows", "module", "unknown, gradient"]
    assert sequences.main(everything) == 0
    assert len(made) == 3
    assert (tmp_path / "runs.csv").read_text().startswith(kept)
    shown = capsys.readouterr().out
    assert shown.endswith((tmp_path / "summary.md").read_text())
    assert "| memory | attention | unknown, gradient | " in shown


@pytest.mark.parametrize("what", ["updates", "kfac.kl_clip", "test"])
def test_runs_of_other_settings_are_not_taken_for_these(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    line = ["--out", str(tmp_path), "--tasks", "memory", "--seeds", "0", "--rows", "module"]
    line += ["--cells", "gru", "--updates"]
    assert sequences.main([*line, "1"]) == 0
    other = replace(sequences.KFAC_CONFIG, kl_clip=1.0)
    monkeypatch.setattr(sequences, "KFAC_CONFIG", other if "kfac" in what else KFACConfig())
    monkeypatch.setattr(sequences, "TEST", 10 if what == "test" else sequences.TEST)
    assert sequences.main([*line, "2" if what == "updates" else "1"]) == 2
    assert f"seed0.csv: made with {what} " in capsys.readouterr().err
