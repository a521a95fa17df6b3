"""Bayes by Backprop: a fully factorised posterior, trained by any torch optimizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from acktr.kfac.blocks.replicas import Replicas
from acktr.kfac.checks import check_integer, check_number
from acktr.kfac.fisher.graph import joined, nodes, uses_of_leaves
from acktr.kfac.modules import check_module
from acktr.kfac.noisy.checkpoints import watched
from acktr.kfac.noisy.posterior import standard_normal
from acktr.kfac.noisy.predictive import Predictive
from acktr.kfac.noisy.prior import check_trainable
from acktr.kfac.state import require_like, with_own_generators
from acktr.kfac.tensors import wide

_LOCAL = [kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Replicas)]
"""Forward passes of layers whose outputs can be drawn in place of their weights."""


def _local_layers(module: nn.Module, trained: Collection[str]) -> dict[str, dict[str, str]]:
    """By path the layers whose outputs can be drawn: their keys, and names in the module.

    Each computes what its type does, of parameters that are its own and no other layer's.
    """
    owners = Counter(id(p) for part in module.modules() for p in part._parameters.values())
    found = {}
    for path, layer in module.named_modules():
        if getattr(layer.forward, "__func__", None) not in _LOCAL:
            continue
        own = {key: p for key, p in layer._parameters.items() if p is not None}
        names = {key: f"{path}.{key}" if path else key for key in own}
        used = {key for key in ("weight", "bias") if getattr(layer, key) is not None}
        alone = all(owners[id(p)] == 1 for p in own.values())
        if set(own) == used and alone and all(name in trained for name in names.values()):
            found[path] = names
    return found


def _hooked(layer: nn.Module) -> bool:
    """Whether hooks run with a layer: they would run on its variances as well.

    What they make of the output, or of the input, is no part of what the layer computes.
    """
    own = layer._forward_hooks, layer._forward_pre_hooks
    backward = layer._backward_hooks, layer._backward_pre_hooks
    everywhere: bool = nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return everywhere or any((*own, *backward))


def _moved(generator: torch.Generator, place: torch.device) -> torch.Generator:
    """A generator of another device, which a number of this one begins."""
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(place).manual_seed(int(seed))


class BayesByBackprop(Predictive, nn.Module):
    """The posterior q = prod N(mu, sigma^2), sigma = softplus(rho), of the weights of a module.

    Blundell et al. 2015, with the KL divergence from the prior N(0, eta) in closed form:

        h = mean loss at w = mu + sigma eps + (lambda / N) KL,
        KL = 1/2 sum [sigma^2 / eta + mu^2 / eta - 1 - log(sigma^2 / eta)].

    The mean is what the module holds. One step::

        posterior = BayesByBackprop(model, data_size=len(data))
        optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-3)
        (loss(posterior(inputs), targets) + posterior.penalty()).backward()
        optimizer.step()

    Args:
        module: The network; all its trainable parameters get noise.
        data_size: N, the number of loss terms in the training set.
        prior_variance: eta.
        kl_weight: lambda.
        initial_rho: rho at first.
        local: Draw the outputs of linear layers and convolutions in place of their weights
            (Kingma et al. 2015), each sample of a batch by itself; gradients are less noisy.
            Weights of other layers are drawn as they are, and so are those that layers share or
            that a pass uses without a call of the layer, as attention does its last projection,
            and those of layers with hooks.
        seed: Seed of the generators of noise.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        data_size: int,
        prior_variance: float = 1.0,
        kl_weight: float = 1.0,
        initial_rho: float = -3.0,
        local: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("data_size (the loss terms of the whole training set)", data_size, 1)
        check_number("prior_variance", prior_variance, open_low=True)
        check_number("kl_weight", kl_weight)
        check_number("initial_rho", initial_rho, -math.inf)
        self.module, self.data_size = module, data_size
        self.prior_variance, self.kl_weight, self.local = prior_variance, kl_weight, local
        check_module(module)
        check_trainable(module)
        self._names = [n for n, p in module.named_parameters() if p.requires_grad]
        means = [module.get_parameter(name) for name in self._names]
        self._inside = False
        self._looked: set[str] = set()
        self._layers = _local_layers(module, self._names) if local else {}
        """By path the layers whose outputs are drawn, with the names of their parameters."""
        self.rho = nn.ParameterList([torch.full_like(mean, initial_rho) for mean in means])
        place = means[0].device
        self.noise = torch.Generator(place).manual_seed(seed)
        self.evaluation = torch.Generator(place).manual_seed(seed + 1)

    def deviations(self) -> dict[str, Tensor]:
        """The standard deviation sigma = softplus(rho) by name, with its graph."""
        return {n: functional.softplus(rho) for n, rho in zip(self._names, self.rho, strict=True)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output at one sample of the weights, with a graph to mu and rho.

        The first pass of a network with layers that are used in another way than by a call runs
        twice, since only the pass shows it.

        Raises:
            ValueError: A part of the pass, or all of it, is inside of torch.utils.checkpoint.
        """
        deviations = self.deviations()
        while True:
            output, calls = self._run(deviations, args, kwargs)
            elsewhere = self._used_elsewhere(output, calls)
            if not elsewhere:
                return output
            for path in elsewhere:  # from now on its weights are drawn
                del self._layers[path]

    def _run(
        self, deviations: dict[str, Tensor], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, list[Any]]]:
        """One pass, and by path the nodes of the calls of every layer whose outputs are drawn."""
        layers = {path: self.module.get_submodule(path) for path in self._layers}
        calls: dict[str, list[Any]] = {p: [] for p, layer in layers.items() if not _hooked(layer)}
        apart = {name for path in calls for name in self._layers[path].values()}
        with ExitStack() as stack:
            for path in calls:
                own = self._layers[path]
                variances = {key: deviations[name].square() for key, name in own.items()}
                hook = partial(self._add_noise, variances, calls, path)
                handle = layers[path].register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            whole = {name: s for name, s in deviations.items() if name not in apart}
            weights = self._sample(whole, self.noise)
            means = [self.module.get_parameter(name) for name in apart]
            mode = stack.enter_context(watched(self.module, [*weights.values(), *means]))
            output = functional_call(self.module, weights, args, kwargs)
        if mode is not None:
            mode.check(output)
        return output, calls

    def _used_elsewhere(self, output: Any, calls: dict[str, list[Any]]) -> list[str]:
        """Paths of layers whose weights the pass may have used at their mean, outside of calls."""
        uncalled = [path for path in calls if not calls[path]]
        new = calls.keys() - self._looked
        total = joined(output) if new and not uncalled else None
        if total is None:
            return uncalled
        self._looked |= new
        uses, reached = uses_of_leaves(total), set(nodes(total))
        return [
            path
            for path, made in calls.items()
            for own in [self._layers[path].values()]
            for count in [sum(node in reached for node in made)]
            if any(uses[id(self.module.get_parameter(name))] > count for name in own)
        ]

    def _sample(
        self, deviations: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {
            name: self.module.get_parameter(name)
            + deviation * standard_normal(generator, deviation)
            for name, deviation in deviations.items()
        }

    def _add_noise(
        self,
        variances: dict[str, Tensor],
        calls: dict[str, list[Any]],
        path: str,
        layer: nn.Module,
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Tensor,
    ) -> Tensor:
        """Add N(0, sigma^2 a^2) to the output of a layer at the mean."""
        if self._inside:  # the call below
            return output
        calls[path].append(output.grad_fn)
        squares = tuple(a.square() for a in args), {key: a.square() for key, a in kwargs.items()}
        self._inside = True
        try:  # a sum of w a has the variance that the same sum of sigma^2 and a^2 gives
            variance: Tensor = functional_call(layer, variances, *squares)
        finally:
            self._inside = False
        # In half precision the bound is zero, at which a root has no finite derivative.
        deviation = wide(variance).clamp(min=1e-30).sqrt().to(output.dtype)
        return output + deviation * standard_normal(self.noise, output)

    # --- generators -------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BayesByBackprop:
        """Move or cast all tensors; noise comes from generators of the device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        place = self.rho[0].device
        if place not in (self.noise.device, torch.device("meta")):
            self.noise, self.evaluation = _moved(self.noise, place), _moved(self.evaluation, place)
        return self

    def get_extra_state(self) -> Tensor:
        """The states of both generators, in :meth:`state_dict`, with which a run goes on."""
        return torch.stack([self.noise.get_state(), self.evaluation.get_state()])

    def set_extra_state(self, state: Any) -> None:
        """Restore :meth:`get_extra_state`; ValueError if it does not fit.

        Generators of another kind of device cannot go on here, and one's own stay.
        """
        own = list(self.get_extra_state())
        given = list(state) if isinstance(state, Tensor) and state.dim() else state
        given = with_own_generators(given, own)
        require_like(given, own, "BayesByBackprop generators")
        for generator, stream in zip((self.noise, self.evaluation), given, strict=True):
            generator.set_state(stream.cpu().clone())  # torch reads a row as if it were the first

    # --- what the posterior knows -----------------------------------------------------------------

    def kl(self) -> Tensor:
        """KL(q || prior) in nats, with its graph."""
        parts = []
        for name, deviation in self.deviations().items():
            mean, ratio = self.module.get_parameter(name), deviation.square() / self.prior_variance
            parts.append((ratio + mean.square() / self.prior_variance - 1 - ratio.log()).sum())
        return 0.5 * torch.stack(parts).sum()

    def penalty(self) -> Tensor:
        """(lambda / N) KL(q || prior), to be added to a mean loss."""
        return self.kl_weight / self.data_size * self.kl()

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One sample of the weights by name."""
        return self._sample(self.deviations(), generator or self.evaluation)

    @torch.no_grad()
    def posterior_std(self) -> dict[str, Tensor]:
        """Standard deviation of every weight by name."""
        return self.deviations()
