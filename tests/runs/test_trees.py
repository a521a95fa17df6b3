"""Trees as bytes: what is taken, what is refused, and at which bounds."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from acktr.files import DEEPEST
from acktr.runs import trees
from acktr.runs.trees import decode, encode


@pytest.mark.parametrize(
    "tree",
    [
        {"a": {"b": {"c": {"d": {"e": 1}}}}},
        {"a": [[[[1]]]]},
        {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5},
        {"a": [1, 2], "b": {"c": 3}},
    ],
    ids=["dicts", "lists", "commas", "all"],
)
def test_values_are_counted_by_their_commas_and_brackets(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these has five."""
    monkeypatch.setattr(trees, "MOST_VALUES", 6)
    assert decode(encode(tree, "t")[0], {}) == tree
    monkeypatch.setattr(trees, "MOST_VALUES", 5)
    with pytest.raises(TypeError, match=r"^t: more than 5 values; use arrays for many numbers$"):
        encode(tree, "t")


def nested(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"a": 1}
    for _ in range(depth - 1):
        tree = {"a": tree}
    return tree


def test_depth_is_bounded() -> None:
    assert decode(encode(nested(DEEPEST), "t")[0], {}) == nested(DEEPEST)
    with pytest.raises(TypeError, match=f"more than {DEEPEST} dicts and lists within each other$"):
        encode(nested(DEEPEST + 1), "t")


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({1: 2}, "t/a: key 1 must be a str without $ at its beginning"),
        ({"$b": 2}, "t/a: key '$b' must be a str without $ at its beginning"),
        (1 << 256, "t/a: an integer of more than 256 bits cannot be saved"),
        (1j, "t/a: a complex cannot be saved"),
        ([1, {2}], "t/a/1: a set cannot be saved"),
        ({"b/c": {3}}, "t/a/b%2Fc: a set cannot be saved"),
        (torch.zeros(2, dtype=torch.complex64), "t/a: a torch.strided torch.complex64 tensor"),
        (torch.zeros(2).to_sparse(), "t/a: a torch.sparse_coo torch.float32 tensor cannot be"),
        (torch.zeros(2, device="meta"), "t/a: a torch.strided torch.float32 tensor cannot be"),
        (np.array(["x"]), "t/a: an array of <U1 cannot be saved"),
        (np.zeros(2, complex), "t/a: an array of complex128 cannot be saved"),
    ],
)
def test_what_cannot_be_saved_is_named_with_its_place(node: object, said: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(said)}"):
        encode({"a": node}, "t")


def test_the_largest_integers_are_saved() -> None:
    tree = {"a": (1 << 256) - 1, "b": -(1 << 256) + 1, "c": np.int64(-3), "d": np.float32(0.5)}
    assert decode(encode(tree, "t")[0], {}) == {**tree, "c": -3, "d": 0.5}


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"[1]", "not an object"), (b'{"a": {"$what": 1}}', "an unknown tag")],
)
def test_bytes_that_nobody_wrote_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        decode(data, {})


def test_arrays_of_another_byte_order_come_back_in_that_of_the_machine() -> None:
    data, tensors = encode({"a": np.arange(3, dtype=">i4"), "b": torch.ones(2).expand(3, 2)}, "t")
    assert tensors.keys() == {"t/a", "t/b"} and tensors["t/b"].is_contiguous()
    found = decode(data, tensors)
    assert found["a"].tolist() == [0, 1, 2] and found["b"].shape == (3, 2) and not tensors
