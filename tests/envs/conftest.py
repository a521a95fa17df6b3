from __future__ import annotations

import pytest

from acktr.envs import EnvError, rendering


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips where MuJoCo cannot draw; what the choice sets is undone."""
    monkeypatch.setenv("MUJOCO_GL", "")
    try:
        rendering.choose_backend()
    except EnvError:
        pytest.skip("no EGL and no OSMesa here")
