"""Orders as tasks of a Ray cluster."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acktr.compare.orders import LOST, Order, Task, attend
from acktr.config import ConfigError
from acktr.files import blanked
from acktr.interrupts import STOPPED


class RayTask:
    """An order that Ray has.

    Args:
        ray: The package.
        order: The order.
    """

    def __init__(self, ray: Any, order: Order) -> None:
        self._ray = ray
        remote = ray.remote(num_cpus=1, num_gpus=order.gpus, max_retries=0)(attend)
        self._result = remote.remote(order)

    def ended(self) -> tuple[int, str] | None:
        """As :class:`acktr.compare.orders.Task`."""
        ready, _ = self._ray.wait([self._result], timeout=0)
        if not ready:
            return None
        try:
            code, line = self._ray.get(self._result)
        except self._ray.exceptions.TaskCancelledError:
            return -signal.SIGTERM, "stopped"
        except self._ray.exceptions.RayError as error:
            return LOST, f"lost by Ray: {blanked(str(error)):.300}"
        return int(code), str(line)

    def cancel(self) -> None:
        """As :class:`acktr.compare.orders.Task`."""
        self._ray.cancel(self._result, force=False)


@contextmanager
def tasks(run_dir: Path) -> Iterator[Callable[[Order], Task]]:
    """What hands orders to the cluster that ``RAY_ADDRESS`` names, or that runs on this machine.

    Raises:
        ConfigError: There is no Ray, or no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError('the engine ray needs its package: pip install "acktr[ray]"') from error
    handlers = {number: signal.getsignal(number) for number in STOPPED}
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # whatever a cluster that is not there comes to
        raise ConfigError(
            f"no Ray cluster: {blanked(str(error)):.300}; start one by ray start --head, or name"
            " it in RAY_ADDRESS"
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray has its own
            signal.signal(number, handler)
    try:
        yield lambda order: RayTask(ray, order)
    finally:
        ray.shutdown()
