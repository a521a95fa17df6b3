"""Trees of tensors: what is done to each tensor, one or many."""

from __future__ import annotations

import pytest
import torch

from acktr import tree
from acktr.tree import Tree

ALONE = torch.arange(12.0).view(6, 2)
NAMED = {"a": ALONE, "b": torch.arange(6)}


@pytest.mark.parametrize("index", [slice(1, 4), slice(0, None, 2), torch.tensor([5, 0, 0])])
def test_rows_are_those_of_every_tensor(index: slice | torch.Tensor) -> None:
    taken = tree.rows(NAMED, index)
    assert isinstance(taken, dict) and list(taken) == ["a", "b"]
    assert torch.equal(taken["a"], ALONE[index]) and torch.equal(taken["b"], NAMED["b"][index])
    alone = tree.rows(ALONE, index)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, ALONE[index])
    assert tree.length(taken) == tree.length(alone) == len(ALONE[index])


@pytest.mark.parametrize("whole", [ALONE, NAMED])
def test_parts_of_a_tree_make_the_whole_again(whole: Tree) -> None:
    parts = [tree.rows(whole, slice(0, 2)), tree.rows(whole, slice(2, 6))]
    again = tree.concatenate(parts)
    doubled = tree.tree_map(lambda part: 2 * part, again)
    if isinstance(whole, dict):
        assert isinstance(again, dict) and isinstance(doubled, dict)
        assert all(torch.equal(again[name], whole[name]) for name in whole)
        assert all(torch.equal(doubled[name], 2 * whole[name]) for name in whole)
    else:
        assert torch.equal(tree.first(again), whole)
        assert torch.equal(tree.first(doubled), 2 * whole)


def test_what_is_on_the_device_is_not_copied() -> None:
    assert tree.to_device(ALONE, torch.device("cpu")) is ALONE
    moved = tree.to_device(NAMED, torch.device("cpu"))
    assert isinstance(moved, dict) and moved["a"] is ALONE
