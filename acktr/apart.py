"""A critic that learns in a process of its own while this one collects the next rollout.

With separate networks an action depends on the actor alone, and values are first wanted when the
rollout is complete. So a second core can take the critic's steps in the meantime. The numbers are
those of one process, bit for bit: only the metrics of these steps come with the next update.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from acktr.algorithms import ACKTRLearner, CriticError
from acktr.config import Config
from acktr.envs import (
    CLOSE,
    AnyVectorEnv,
    EnvFault,
    ForkedProcess,
    SharedTree,
    end_all,
    pictures,
    thread_ids,
    workers,
)
from acktr.kfac import KFAC, FactorError
from acktr.rollout import Batch

TOLD_LATER = (
    "train/value_loss",
    "train/trust_scale_critic",
    "train/quadratic_critic",
    "kfac/critic_min_eig",
    "kfac/critic_max_eig",
    "kfac/failures",
)
"""Metrics that are, or count, those of the critic's steps of the update before."""

_LEARN, _SAVE = b"l", b"v"
_DONE, _STEP = 0, 1
"""Places of the batches that are done, and of the steps, in what both processes count."""


class CriticApart:
    """Takes a separate critic's steps in a forked process, see :class:`Elsewhere`.

    The process is forked at the first batch, with critic and optimizer as they are then. Whoever
    asks the critic here for values, or for its state, waits for the steps under way first. What is
    written to its parameters, or to the settings of the optimizer's groups, in between counts as if
    it came after those steps.

    Args:
        learner: Whose critic it is; it learns by K-FAC on the CPU.
        timeout: Seconds that one step may take.
    """

    def __init__(self, learner: ACKTRLearner, timeout: float) -> None:
        assert isinstance(learner.critic, KFAC)
        self._learner, self._optimizer = learner, learner.critic
        self._timeout = timeout
        self._given, self._answer = SharedTree(), SharedTree()
        self._counts = memoryview(mmap.mmap(-1, 16)).cast("q")
        self._process: list[ForkedProcess] = []
        weakref.finalize(self, end_all, self._process)
        self._asked = self._settled = 0
        self._parameters: list[nn.Parameter] = []
        # What they were when they were last alike here and there, and how often each had been
        # written: torch does not count all writes, and a written value may be the one before.
        self._alike: list[tuple[Tensor, int]] = []
        self._trained: list[bool] = []
        self._groups: list[dict[str, Any]] = []
        self._fault: EnvFault | None = None

    def begin(self, batch: Batch, noises: list[Tensor], sigma: float) -> None:
        """Begin to learn from a batch."""
        if self._process and self._changed():
            self.fetch()
            self.drop()
        if not self._process:
            self._fork()
        assert isinstance(batch.observations, Tensor)
        given = {
            "observations": batch.observations,
            "returns": batch.returns,
            "weights": batch.weights,
            "noises": torch.stack(noises),
            "sigma": sigma,
        }
        self._given.put(_arrays(given))
        self._asked += 1
        self._process[0].send(_LEARN)

    def settle(self) -> dict[str, float]:
        """Wait for the steps under way, and take the parameters over.

        Raises:
            FactorError: K-FAC could not go on.
            CriticError: The process failed, hangs or is gone.
        """
        if self._settled == self._asked:
            return {}
        self._wait()
        answer = self._answer.get()
        if "error" in answer:
            self._settled = self._asked
            raise FactorError(answer["error"])
        if "parameters" not in answer:  # a fetch was broken off, whose state can be fetched again
            self._settled = self._asked
            return {}
        for place, (parameter, array) in enumerate(
            zip(self._parameters, answer["parameters"], strict=True)
        ):
            if not self._written(place):
                with torch.no_grad():
                    parameter.copy_(torch.from_numpy(array))
                self._alike[place] = _as_it_is(parameter)
        self._settled = self._asked
        report: dict[str, float] = answer["report"]
        return report

    def fetch(self) -> None:
        """Take the optimizer's state over.

        Raises:
            CriticError: The process failed, hangs or is gone.
        """
        if not self._process:
            return
        self._asked += 1
        self._process[0].send(_SAVE)
        self._wait()
        self._settled = self._asked
        here = _settings(self._optimizer)
        self._optimizer.load_state_dict(_tensors(self._answer.get()["state"]))
        if here != self._groups:
            for group, given in zip(self._optimizer.param_groups, here, strict=True):
                group.update(given)

    def drop(self) -> bool:
        """End the process; the next batch is learned from what is here then."""
        lost = self._fault is not None
        end_all(self._process)
        self._process.clear()
        self._settled = self._asked
        self._fault = None
        return not lost

    def _fork(self) -> None:
        """Begin the process, with what is here."""
        commands = {_LEARN: self._learn, _SAVE: self._save, CLOSE: lambda: None}
        said, counts = "the critic did not end step {} of its life".format, self._counts
        self._parameters = list(self._learner.network.critic.parameters())
        # What the process here keeps must not hold this object, which ends it when it is forgotten.
        self._process.append(
            ForkedProcess("the critic", commands, lambda: max(1, counts[_STEP]), said)
        )
        self._alike = [_as_it_is(parameter) for parameter in self._parameters]
        self._trained = [parameter.requires_grad for parameter in self._parameters]
        self._groups = _settings(self._optimizer)

    def _wait(self) -> None:
        """Wait until the process has done all that it was asked; may be broken off, and repeated.

        Raises:
            CriticError: The process failed, hangs or is gone.
        """
        if self._counts[_DONE] == self._asked:
            return
        try:
            if self._fault is None:
                self._process[0].receive(self._timeout)
        except EnvFault as fault:
            self._fault = fault
        if self._fault is not None:
            raise CriticError(str(self._fault)) from self._fault

    def _written(self, place: int) -> bool:
        """Whether a parameter was written in this process, other than by settling."""
        parameter, (value, version) = self._parameters[place], self._alike[place]
        return parameter._version != version or not torch.equal(parameter, value)

    def _changed(self) -> bool:
        """Whether critic or optimizer were changed in this process."""
        parameters = list(self._learner.network.critic.parameters())
        return (
            len(parameters) != len(self._parameters)
            or any(a is not b for a, b in zip(parameters, self._parameters, strict=True))
            or any(map(self._written, range(len(parameters))))
            or [parameter.requires_grad for parameter in parameters] != self._trained
            or _settings(self._optimizer) != self._groups
        )

    def _learn(self) -> None:
        """In the process: take the critic's steps."""
        self._owned()
        given = _tensors(self._given.get())
        returns = given["returns"]
        batch = Batch(
            given["observations"], returns, returns, returns, values=None, weights=given["weights"]
        )
        try:
            report = self._learner.critic_report(
                batch, self._counted(given["noises"]), given["sigma"]
            )
        except FactorError as error:
            self._answered({"error": str(error)})
        else:
            arrays = [parameter.detach().numpy() for parameter in self._parameters]
            self._answered({"parameters": arrays, "report": report})

    def _counted(self, noises: Tensor) -> Iterator[Tensor]:
        """The noise of each step, which says that it begins."""
        for noise in noises:
            self._counts[_STEP] += 1
            yield noise

    def _save(self) -> None:
        """In the process: give the optimizer's state."""
        self._owned()
        self._answered({"state": _arrays(self._optimizer.state_by_name())})

    def _answered(self, answer: Any) -> None:
        self._answer.put(answer)
        self._counts[_DONE] = self._asked

    def _owned(self) -> None:
        """In the process: nobody else learns for the learner, and it has been asked once more."""
        self._learner.elsewhere = None
        self._asked = self._counts[_DONE] + 1


@contextmanager
def apart(learner: Any, config: Config, envs: AnyVectorEnv) -> Iterator[None]:
    """Let a separate critic learn in a process of its own within this context, where it may.

    That is where environments have processes, too (``env_workers`` above 1), and on the CPU one
    process learns two built-in networks of vectors by K-FAC. Afterwards all is in this process.

    Raises:
        CriticError: The process failed, hangs or is gone. The critic is lost with it: from then on
            the learner has no state but one that is loaded.
    """
    if not isinstance(learner, ACKTRLearner) or not can_be_apart(learner, config, envs):
        yield
        return
    if isinstance(learner.elsewhere, CriticApart):  # of training that is suspended, or was lost
        _home(learner, learner.elsewhere)
    critic: Any = learner.network.critic  # torch has not typed all of its hooks
    elsewhere = CriticApart(learner, config.env_timeout)
    learner.elsewhere = elsewhere
    settle = _Settle(learner)
    with ExitStack() as stack:
        stack.callback(critic.register_forward_pre_hook(settle).remove)
        stack.callback(critic.register_state_dict_pre_hook(settle).remove)
        try:
            yield
        except GeneratorExit:  # whoever iterated has had enough
            _home(learner, elsewhere)
            raise
        except BaseException:
            with suppress(CriticError, FactorError):  # the first error counts
                _home(learner, elsewhere)
            raise
        _home(learner, elsewhere)


def _home(learner: ACKTRLearner, elsewhere: CriticApart) -> None:
    """End the process, and let the learner's critic learn here again; Ctrl-C waits for that.

    Raises:
        FactorError: K-FAC could not go on in the last steps; all is here nevertheless.
        CriticError: The process failed, hangs or is gone; the critic is lost.
    """
    if learner.elsewhere is not elsewhere:  # other training has fetched it since
        return
    try:
        _fetched(learner, elsewhere)
    except KeyboardInterrupt:
        _fetched(learner, elsewhere)
        raise


def _fetched(learner: ACKTRLearner, elsewhere: CriticApart) -> None:
    failed = None
    try:
        learner.settle()
    except FactorError as error:
        failed = error
    elsewhere.fetch()
    elsewhere.drop()
    learner.elsewhere = None
    if failed is not None:
        raise failed


class _Settle:
    """A hook that waits for the critic; a copy, which is another network's, waits for nothing."""

    def __init__(self, learner: ACKTRLearner | None = None) -> None:
        self._learner = learner

    def __call__(self, *_: Any) -> None:
        if self._learner is not None:
            self._learner.settle()

    def __reduce__(self) -> tuple[type[_Settle], tuple[()]]:
        return _Settle, ()


def can_be_apart(learner: ACKTRLearner, config: Config, envs: AnyVectorEnv) -> bool:
    """Whether a learner's critic may learn in a process of its own, see :func:`apart`."""
    network, ranks = learner.network, learner.ranks
    alone = ranks is None or (ranks.size == 1 and not ranks.helped)
    plain = not (network.shared or network.own or network.recurrent or network.modal)
    delayed = config.acktr.actor.refresh_delay or config.acktr.critic.refresh_delay
    return (
        workers(envs) > 1
        and alone
        # Neither CUDA nor, once it has seen a device, torch's autograd go on in a fork.
        and thread_ids() is not None
        and torch.cuda.device_count() == 0
        and isinstance(learner.critic, KFAC)
        and plain
        and not (learner.auxiliary or config.compile or delayed)
        and learner.generator.device.type == "cpu"
        and isinstance(envs.single_observation_space, gymnasium.spaces.Box)
        and not pictures(envs.single_observation_space, config.network.channels)
        and not list(network.critic.buffers())
    )


def _as_it_is(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """A parameter's value, and how often it was written."""
    return parameter.detach().clone(), parameter._version


def _settings(optimizer: KFAC) -> list[dict[str, Any]]:
    """The settings of the optimizer's groups."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _arrays(node: Any) -> Any:
    """A tree with arrays in place of tensors."""
    if isinstance(node, dict):
        return {key: _arrays(each) for key, each in node.items()}
    if isinstance(node, list | tuple):
        return [_arrays(each) for each in node]
    return node.detach().numpy() if isinstance(node, Tensor) else node


def _tensors(node: Any) -> Any:
    """Inverse of :func:`_arrays`; tensors lie in torch's own memory."""
    if isinstance(node, dict):
        return {key: _tensors(each) for key, each in node.items()}
    if isinstance(node, list):
        return [_tensors(each) for each in node]
    return torch.from_numpy(node).clone() if isinstance(node, np.ndarray) else node
