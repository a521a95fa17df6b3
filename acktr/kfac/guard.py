"""What would make K-FAC wrong in silence: another module, no statistics, several processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from acktr.kfac.blocks.entries import EntriesBlock
from acktr.kfac.blocks.kronecker import KroneckerBlock
from acktr.kfac.blocks.projections import ProjectionLayout
from acktr.kfac.blocks.registry import Block, StatBlock, UnsupportedParameterWarning, caller_level
from acktr.kfac.blocks.rules import RuleLayout
from acktr.kfac.config import KFACConfig
from acktr.kfac.fisher.graph import uses_of_leaves
from acktr.kfac.linalg import FactorError
from acktr.kfac.losses.base import OutputLoss
from acktr.kfac.modules import check_module
from acktr.kfac.ranks import Ranks, bits_of, layout, processes
from acktr.kfac.statistics.capture import Capture
from acktr.kfac.statistics.outputs import tensors

_MOST_FORMS = 256
"""Forms of steps that are kept before a look, which waits for the device."""
_PROCESSES = 256
"""Most processes or micro-batches by which a program is thought to divide gradients."""
_LEAST_DAMPING = 0.01
"""Damping from which half precision has done no harm."""
_OWN_FORWARD = (ProjectionLayout, RuleLayout)
"""Layers whose forward pass may take a weight any number of times."""


class NoStatisticsWarning(UserWarning):
    """A layer whose curvature was never observed follows its plain gradient."""


def check_ranks(ranks: Ranks | None) -> None:
    """Raise ValueError in one of several processes of torch.distributed that share nothing.

    Also in that which decomposes for the others.
    """
    if ranks is not None and ranks.serves:
        raise ValueError(
            "this process decomposes for the others and has no K-FAC: acktr.kfac.serve(ranks)"
        )
    if ranks is None and (size := processes()) > 1:
        raise ValueError(
            f"K-FAC's factors are of this rank's samples alone, so that the {size} ranks would"
            " become different models: use one process, or KFAC(model, ranks=acktr.kfac.Ranks())"
            " and averaged gradients"
        )


def check_loss(loss: object) -> None:
    """Raise ValueError for an object that is no loss, naming what it lacks."""
    if isinstance(loss, OutputLoss) and not isinstance(loss, type):
        return
    members = [name for name in vars(OutputLoss) if name == "__call__" or name[0] != "_"]
    lacking = [name for name in members if isinstance(loss, type) or not hasattr(loss, name)]
    raise ValueError(
        "loss must be an OutputLoss such as CategoricalLoss() or GaussianLoss(),"
        f" got {loss!r:.100}, which lacks {', '.join(lacking)}"
    )


def check_capture(captured: object) -> None:
    """Raise ValueError for what is no record of a pass."""
    if not isinstance(captured, Capture):
        raise ValueError(
            "captured must be the record of a forward pass, that of `with optimizer.capture() as"
            f" captured`, got {type(captured).__name__}"
        )


def _identities(module: nn.Module) -> list[Any]:
    """What tells whether the parameters of a module are the same as before, in little time."""
    return [
        (id(parameter), parameter.dtype, parameter.device, parameter.requires_grad)
        for part in module.modules()
        for parameter in part._parameters.values()
        if parameter is not None
    ]


class _Kept(NamedTuple):
    """A gradient that was preconditioned."""

    name: str
    grad: Tensor
    before: Tensor
    """A copy."""
    version: int
    """How often torch had seen it change."""
    look: bool
    """Whether it is still to be seen that nothing divided it."""


class Guard:
    """Compares a module with what it was at construction, and names layers without statistics.

    Args:
        module: The network.
        named: The parameters that K-FAC steps, by name.
        everything: Whether they are all that are trainable.
        ranks: Who has the other shares of every batch; None for one process.

    Raises:
        ValueError: K-FAC cannot have blocks of the module, or there are several ranks without
            ``ranks``.
    """

    def __init__(
        self,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        *,
        everything: bool,
        ranks: Ranks | None = None,
    ) -> None:
        check_module(module)
        self._ranks = ranks
        self.check_ranks()
        self._module = module
        self._named = named
        self._kinds = {name: (p.dtype, p.device) for name, p in named.items()}
        self._everything = everything
        self._present = _identities(module)
        self._told: set[str] = set()
        self._kept: _Kept | None = None
        self._looks = 3
        self._outside_checked = False
        self._skipped = 0
        self._forms: list[Tensor] = []

    def check_ranks(self) -> None:
        """Raise ValueError where several processes would become different models."""
        check_ranks(self._ranks)

    def check_settings(self, blocks: Sequence[Block], config: KFACConfig, seed: int) -> None:
        """Raise ValueError, on all ranks, unless they were constructed alike, and can be."""
        if self._ranks is not None:
            kinds = [(type(block).__name__, block.names) for block in blocks]
            what = kinds, layout(self._named.items()), config, seed
            device = next(self._module.parameters()).device
            self._ranks.check_equal("modules, settings or seeds", what, device)
            if self._ranks.helped and config.structure == "tridiagonal":
                raise ValueError(
                    "structure=tridiagonal refreshes at once and by itself: a process for the"
                    " curvature would have nothing to do"
                )

    @torch.no_grad()
    def check_gradients(self, turn: int) -> None:
        """Raise ValueError, on all ranks, unless their step, parameters and gradients are the same.

        Args:
            turn: Number of the step.
        """
        if self._ranks is None or self._ranks.size == 1:
            return
        own = list(self._named.values())
        given = [p.grad.to_dense() if p.grad is not None else None for p in own]
        rows = self._ranks.gather([float(turn), bits_of(own), bits_of(given)], own[0].device)
        pairs = (
            ("parameters", 1, "Ranks.start()"),
            ("gradients", 2, "Ranks.average(model, n)"),
        )
        for rank, row in enumerate(rows):
            if row[0] != rows[0][0]:
                raise ValueError(
                    f"rank {rank} is at step {row[0]:g} and rank 0 at step {rows[0][0]:g}: every"
                    " rank must make the same calls, and all end where one of them fails"
                )
            for what, place, remedy in pairs:
                if row[place] != rows[0][place]:
                    raise ValueError(
                        f"rank {rank} has other {what} than rank 0, so that the ranks would become"
                        f" different models: {remedy} makes them the same, and so does"
                        " DistributedDataParallel"
                    )

    def count_skipped(self, quadratic: Tensor) -> None:
        """Count the steps in a row that were skipped for their q, most often without a look."""
        self._forms.append(quadratic)
        if len(self._forms) >= _MOST_FORMS:
            self._look()

    def _look(self) -> None:
        if self._forms:
            finite = torch.stack(self._forms).reshape(len(self._forms), -1).isfinite().all(1)
            for good in finite.tolist():
                self._skipped = 0 if good else self._skipped + 1
            self._forms.clear()

    def check_skipped(self, limit: int) -> None:
        """Raise FactorError after that many steps in a row."""
        self._look()
        if self._skipped >= limit:
            raise FactorError(
                f"{self._skipped} steps in a row were skipped, as their gradient was NaN or Inf"
                " (look at targets and loss, or lower lr or kl_clip)"
            )

    def check_parameters(self) -> None:
        """Raise ValueError when the parameters are not those of the construction any more."""
        if _identities(self._module) == self._present:
            return
        present = dict(self._module.named_parameters())
        for name, parameter in self._named.items():
            if present.get(name) is not parameter:
                raise ValueError(
                    f"parameter {name!r} was replaced or removed after K-FAC was constructed:"
                    " construct it again, after the last change of the module"
                )
            if (parameter.dtype, parameter.device) != self._kinds[name]:
                kind, device = self._kinds[name]
                raise ValueError(
                    f"parameter {name!r} was {kind} on {device} when K-FAC was constructed and is"
                    f" {parameter.dtype} on {parameter.device} now: move the module first, then"
                    " construct K-FAC (load_state_dict takes the former state over)"
                )
        if self._everything and len(present) > len(self._named):
            for name, parameter in present.items():
                if parameter.requires_grad and name not in self._named:
                    raise ValueError(
                        f"parameter {name!r} became trainable after K-FAC was constructed, which"
                        " would never move it: construct it again, after the last change"
                    )

    def keep(self, names: Iterable[str], scaled: bool) -> None:
        """Remember the smallest preconditioned gradient, to be compared.

        Args:
            names: Of those that were preconditioned.
            scaled: Whether a GradScaler divides them after.
        """
        name = min(names, key=lambda name: self._named[name].numel())
        grad = self._named[name].grad
        assert grad is not None
        look = not scaled and self._looks > 0  # each waits for the device
        self._looks -= look
        self._kept = _Kept(name, grad, grad.clone(), grad._version, look)

    def check_new(self) -> None:
        """Raise ValueError when the gradients are those that were preconditioned before."""
        kept = self._kept
        if (
            kept is not None
            and self._named[kept.name].grad is kept.grad
            and kept.grad._version == kept.version  # what follows waits for the device
            and torch.equal(kept.grad, kept.before)
        ):
            raise ValueError(
                f"precondition() was called twice on one gradient, that of {kept.name!r}: call it"
                " once, between backward() and the optimizer's step(); where several optimizers"
                " share it, set all gradients to None before backward()"
            )

    def check_kept(self) -> None:
        """Raise ValueError when a GradScaler divided gradients that were preconditioned before.

        Nothing else divides all of a tensor by one large power of two: a number of processes or of
        micro-batches, by which a program may divide, is small.
        """
        if self._kept is None or not self._kept.look:
            return
        grad, before = self._kept.grad, self._kept.before
        self._kept = self._kept._replace(look=False)
        ratio = (before[grad != 0] / grad[grad != 0]).double()
        scale = float(ratio.max()) if len(ratio) else 1.0
        if scale > _PROCESSES and math.frexp(scale)[0] == 0.5 and float(ratio.min()) == scale:
            raise ValueError(
                f"gradients were divided by {scale:g} after precondition() had taken them, as"
                " GradScaler.step does: call scaler.unscale_(optimizer) before it, or"
                " precondition(..., grad_scaler=scaler)"
            )

    def warn_unseen(self, blocks: Collection[StatBlock], gradients: Mapping[str, Tensor]) -> None:
        """Warn once of blocks with gradients that no observed batch has reached yet."""
        unseen = [
            name
            for block in blocks
            if not block.history.observed
            for name in block.names
            if name in gradients and name not in self._told
        ]
        if not unseen:
            return
        self._told.update(unseen)
        begun = any(b.history.started for b in blocks if not b.history.observed)
        steps = "they keep the curvature of the start" if begun else "plain gradient steps"
        warnings.warn(
            f"no statistics of {', '.join(unseen)}: {steps}. Nothing that observe()"
            " was given reached them: was it called before the step, with the output of a forward"
            " pass inside capture() that runs these layers as modules (not F.linear on a weight,"
            " nor a block compiled and called before), and with every output that has a loss?",
            NoStatisticsWarning,
            stacklevel=caller_level(),
        )

    def warn_outside(self, blocks: Iterable[StatBlock], captured: Capture, scalar: Tensor) -> None:
        """Warn of weights that the graph of the first batch uses outside of their layers."""
        if self._outside_checked:
            return
        self._outside_checked = True
        uses = uses_of_leaves(scalar)
        outside = [
            block.layer.weight_name
            for block in blocks
            if isinstance(block, KroneckerBlock | EntriesBlock)
            and not isinstance(block.layer.layout, _OWN_FORWARD)
            for calls in [sum(len(captured.layers[path].calls) for path in block.paths)]
            if 0 < calls < uses.get(id(self._named[block.layer.weight_name]), 0)
        ]
        if outside:
            warnings.warn(
                f"{', '.join(outside)} is also used outside of its layer, as in F.linear: its block"
                " has the curvature of the layer's uses alone. With a module for every use, which"
                " may share the parameter (head.weight = embedding.weight), it would have all",
                UnsupportedParameterWarning,
                stacklevel=caller_level(),
            )

    def warn_average(self, captured: Capture, output: object) -> None:
        """Warn once when a second output of one forward pass is observed by itself."""
        outputs = [id(leaf) for leaf in tree_flatten(output)[0]]
        if captured.outputs not in (None, outputs) and "" not in self._told:
            self._told.add("")
            warnings.warn(
                "two outputs of one forward pass were observed one after the other, and their"
                " curvatures averaged: for the sum of their losses give observe() both at once,"
                " with SumLoss",
                stacklevel=caller_level(),
            )
        captured.outputs = outputs

    def warn_rounded(self, captured: Capture, damping: float) -> None:
        """Warn once of a small damping where a pass is computed in half precision, as by autocast.

        The rounding of gradients is a step of its own, which the inverse makes long in directions
        of little curvature.
        """
        if damping >= _LEAST_DAMPING or "<rounded>" in self._told:
            return
        self._told.add("<rounded>")
        halves = (torch.bfloat16, torch.float16)
        outputs = (part for _, part in tensors(captured.returned))
        if any(part.dtype in halves for part in outputs) and not any(
            kind in halves for kind, _ in self._kinds.values()
        ):
            warnings.warn(
                f"the module computes in half precision, whose rounding a damping of {damping:g}"
                " makes long steps of: training may diverge (KFACConfig(damping=0.1) is safe, so is"
                " kl_clip=0.1)",
                stacklevel=caller_level(),
            )

    def warn_positions(self, captured: Capture, log_likelihood: Tensor) -> None:
        """Warn once when an own likelihood is summed over positions, which may or may not be in Z.

        A sum does not tell whether the objective is its mean over N samples or over N T positions.
        """
        outputs = [part for _, part in tensors(captured.returned) if part.requires_grad]
        wide = [part for part in outputs if part.shape[1:-1].numel() > 1]
        if not wide or "<positions>" in self._told:
            return
        self._told.add("<positions>")
        reached = torch.autograd.grad(log_likelihood, wide, retain_graph=True, allow_unused=True)
        shapes = [tuple(p.shape) for p, g in zip(wide, reached, strict=True) if g is not None]
        if shapes:
            warnings.warn(
                f"update_curvature takes a likelihood of outputs {shapes[0]} for one of"
                f" {shapes[0][0]} samples: for an objective that is a mean over all positions, as"
                f" torch's cross_entropy, give samples={math.prod(shapes[0][:-1])} (samples="
                f"{shapes[0][0]} says that it is right)",
                stacklevel=caller_level(),
            )
