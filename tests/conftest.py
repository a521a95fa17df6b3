"""One torch thread: two would wait for each other on a busy machine, a hundred times as long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile fails at the first call of what it returned, as without a C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException

    def unable(*_args: Any, **_kwargs: Any) -> Any:
        def call(*_tensors: Any) -> Any:
            raise TorchDynamoException("no working compiler\nlong explanation")

        return call

    monkeypatch.setattr(torch, "compile", unable)
