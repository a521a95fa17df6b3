"""Noisy K-FAC: a variational posterior of the weights by natural gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Never

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.rules import Rules
from acktr.kfac.blocks.skip import Skip
from acktr.kfac.checks import check_integer, refuse_settings
from acktr.kfac.fisher.extent import sizes
from acktr.kfac.guard import check_loss
from acktr.kfac.losses.base import OutputLoss, with_weights
from acktr.kfac.losses.sources import Source
from acktr.kfac.modules import check_module
from acktr.kfac.named_optimizer import NamedOptimizer
from acktr.kfac.noisy.config import NoisyConfig
from acktr.kfac.noisy.contexts import Contexts
from acktr.kfac.noisy.curvature import NoisyCurvature
from acktr.kfac.noisy.posterior import standard_normal
from acktr.kfac.noisy.predictive import Predictive
from acktr.kfac.noisy.prior import check_trainable
from acktr.kfac.parameter_groups import make_groups
from acktr.kfac.ranks import Ranks
from acktr.kfac.statistics.capture import Capture
from acktr.kfac.tensors import accumulation_type, wide
from acktr.kfac.trust import Named, trust_scale


class NoisyKFAC(Predictive, NamedOptimizer):
    """Variational inference by natural gradients with Kronecker-factored curvature.

    The posterior of the weights is q = N(mu, (lambda / N) (F + gamma_in I)^-1), gamma_in =
    lambda / (N eta), with F the running Fisher of one loss term at weights drawn from q (Zhang,
    Sun, Duvenaud & Grosse 2018; Bae, Zhang & Grosse 2018). The module holds mu; inside of
    :meth:`sampled_params` it holds a sample. One update::

        with optimizer.sampled_params(train=True) as captured:
            output = model(inputs)
            optimizer.observe(captured, output, loss)
            loss(output, targets).backward()
        optimizer.step()

    Several such contexts before a step are several weight samples, or micro-batches, of it: their
    gradients and statistics are averaged over the loss terms that observe() was given. Each begins
    with empty gradients. The step is

        V = grad h(w) + gamma_in w,   m <- rho m + (1 - rho) V,   omega <- rho omega + 1 - rho,
        mu <- mu - lr (F + (gamma_in + gamma_ex) I)^-1 m / omega.

    Args:
        module: The network.
        config: Settings.
        data_size: N, the number of loss terms in the training set (not in a batch): what the mean
            of the objective would be over if the batch were all data.
        layers: How layers of one's own become rows, by their type.
        skip: Layers without a block of their own, see :class:`acktr.kfac.Preconditioner`.
        seed: Seed of the generators of noise and of targets.
        ranks: The processes that have the other shares of every batch, at the same weights; their
            gradients are averaged inside of every context. None for one process.
        settings: There are none: they belong into the config.

    Raises:
        ValueError: A setting does not fit the module.
        TypeError: There is no such argument.
    """

    curvature: NoisyCurvature
    _step_supports_amp_scaling = True
    """A GradScaler calls :meth:`step` also where it finds Inf, so that contexts are forgotten."""

    def __init__(
        self,
        module: nn.Module,
        config: NoisyConfig | None = None,
        *,
        data_size: int,
        layers: Rules | None = None,
        skip: Skip = (),
        seed: int = 0,
        ranks: Ranks | None = None,
        **settings: Never,
    ) -> None:
        refuse_settings(self, settings, NoisyConfig)
        check_integer("data_size (the loss terms of the whole training set)", data_size, 1)
        check_module(module)
        check_trainable(module)
        self.module, self.data_size = module, data_size
        self.config = config or NoisyConfig()
        self.curvature = NoisyCurvature(module, self.config, data_size, layers, skip, seed, ranks)
        self.posterior = self.curvature.posterior
        own, named = self.curvature.config, self.curvature.named
        options = {"lr": own.lr, "momentum": own.momentum, "weight_decay": 0.0}
        super().__init__(make_groups(named, own, None), options)
        self.blocks, self.close = self.curvature.blocks, self.curvature.close
        self._capture: Capture | None = None
        self._open = False
        self._contexts = Contexts(named)

    # --- samples ----------------------------------------------------------------------------------

    @contextmanager
    def sampled_params(
        self, *, train: bool = False, generator: torch.Generator | None = None
    ) -> Iterator[Capture | None]:
        """Context in which the module holds a sample of the weights.

        The mean is put back afterwards, bit for bit, also after an exception, which forgets the
        contexts since the last step. Whatever is changed in the weights inside is lost.

        Args:
            train: Whether what happens inside is for the next step. Then it yields the record of
                forward passes that :meth:`observe` takes, and backward() must be called inside;
                a context without it gives no gradient, and takes none from the mean of others.
            generator: Source of the noise; by default an own one, of training or of evaluations.

        Raises:
            ValueError: It was opened inside of another one, or the module was changed.
        """
        self._check_closed("sampled_params()")
        source = generator or (self.curvature.noise if train else self.curvature.evaluation)
        with ExitStack() as stack:
            if train:
                self.zero_grad()
                self._capture = stack.enter_context(self.curvature.capture())
            else:  # a capture checks them itself
                self.curvature.check_parameters()
            noise = self._noise(source)
            names, self._open = list(noise), True
            parameters: list[Tensor] = [self._named[name] for name in names]
            means = [parameter.detach().clone() for parameter in parameters]
            try:
                with torch.no_grad():
                    for parameter, mean, drawn in zip(
                        parameters, means, noise.values(), strict=True
                    ):
                        torch.add(mean, drawn, out=parameter)
                yield self._capture
            except BaseException:
                self.forget()
                raise
            finally:
                self._open, self._capture = False, None
                with torch.no_grad():
                    for parameter, mean in zip(parameters, means, strict=True):
                        parameter.copy_(mean)
        if train:
            self._contexts.close(noise)

    def observe(
        self,
        captured: Capture | None,
        output: Any,
        loss: OutputLoss[Any],
        *,
        source: Source | None = None,
        weights: Any = None,
        target: Any = None,
        present: Any = None,
    ) -> None:
        """Fold one batch into the curvature at the sampled weights.

        Arguments and errors are those of :meth:`acktr.kfac.Preconditioner.observe`; the parts of a
        batch are joined by :meth:`step`.

        Raises:
            ValueError: It is called outside of the context, or the loss is a sum over the batch.
        """
        self._check_record(captured)
        assert captured is not None
        check_loss(loss)
        if loss.reduction == "sum":
            raise ValueError(
                'NoisyKFAC needs a loss with reduction="mean": a sum has no Fisher of one term, and'
                " the noise would be wrong by the size of the batch"
            )
        bound = with_weights(loss, output, weights, target, empty=self.curvature.region.shared)
        terms = self.curvature.terms_of_all(sizes(bound, output)[0])
        if self._steps == 0 and terms is not None and terms > self.data_size:
            raise ValueError(
                f"data_size={self.data_size} is less than the {terms:g} loss terms of this batch:"
                " it is the number of those in the whole training set"
            )
        given: dict[str, Any] = {"weights": weights, "target": target, "present": present}
        self.curvature.observe(captured, output, loss, source=source, last=False, **given)
        self._contexts.observe(terms)

    def update_curvature(
        self, captured: Capture | None, log_likelihood: Tensor, *, samples: int | None = None
    ) -> None:
        """As :meth:`observe`, for a loss of one's own: see :class:`acktr.kfac.Preconditioner`."""
        self._check_record(captured)
        assert captured is not None
        self.curvature.update_curvature(captured, log_likelihood, samples=samples, last=False)
        lengths = captured.sizes()
        terms = samples or (max(lengths) if len(lengths) == 1 else None)
        self._contexts.observe(self.curvature.terms_of_all(terms))

    def _noise(self, generator: torch.Generator) -> Named:
        with torch.no_grad():
            return self.posterior.draw(partial(standard_normal, generator))

    def forget(self) -> None:
        """Forget the contexts since the last step, which begins anew."""
        self._contexts.forget()
        self.curvature.forget()

    def _check_closed(self, what: str) -> None:
        if self._open:
            raise ValueError(f"{what} inside of sampled_params(): leave that context first")

    def _check_ready(self, what: str) -> None:
        """Raise ValueError unless the module holds the mean, in the parameters that it had."""
        self._check_closed(what)
        self.curvature.check_parameters()

    def _check_record(self, captured: Capture | None) -> None:
        if self._capture is None or captured is not self._capture:
            raise ValueError(
                "the record is that of a context that is closed, or of none: observe() belongs"
                " inside of `with optimizer.sampled_params(train=True) as captured`"
            )

    # --- step -------------------------------------------------------------------------------------

    @property
    def kl_weight(self) -> float:
        """The present weight lambda of the KL divergence."""
        return self.posterior.weight

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move the mean, by the contexts since the last step.

        A step in which a GradScaler found Inf forgets them, and moves nothing.

        Raises:
            FactorError: A factor could not be decomposed ``max_failures`` times in a row.
            ValueError: There was no context, or none with a backward pass.
        """
        if closure is not None:
            raise ValueError("NoisyKFAC takes no closure: use sampled_params(train=True)")
        self._check_closed("step()")
        # What a GradScaler tells an optimizer that scales gradients back itself.
        if bool(getattr(self, "found_inf", False)):
            self.forget()
            return
        scale = getattr(self, "grad_scale", None)
        gradients = self.curvature.gradients(factor=1.0 if scale is None else 1 / float(scale))
        if not self._contexts.count or not gradients:
            raise ValueError(
                "step() needs sampled_params(train=True) with a backward pass before it"
            )
        if any(self._each("weight_decay").values()):
            raise ValueError("the weight decay of NoisyKFAC is its prior: set prior_variance")
        if self.curvature.observing:
            if self._contexts.observed:
                self.curvature.fold()
            else:
                self.curvature.warn_forgotten()
        self.curvature.prepare()
        self._move(gradients)
        self.forget()
        self._count(self._steps + 1)

    def _count(self, steps: int) -> None:
        super()._count(steps)
        self.posterior.weight = self.config.weight(steps)

    def _fresh(self, parameter: Tensor) -> Named:
        """With the weight of the average, which is less than 1 while it is short."""
        kind = accumulation_type(parameter)
        weight = torch.zeros((), dtype=kind, device=parameter.device)
        return {**super()._fresh(parameter), "momentum_weight": weight}

    def _move(self, gradients: Named) -> None:
        self._add_prior(gradients)
        total = torch.stack([wide(gradient).sum() for gradient in gradients.values()]).sum()
        finite = torch.isfinite(total)
        momenta = self._each("momentum")
        for name, gradient in gradients.items():
            momentum = momenta[name]
            if momentum > 0:
                average = self._momentum(name)
                weight: Tensor = self.state[self._named[name]]["momentum_weight"]
                for mean, new in ((average, gradient), (weight, torch.ones_like(weight))):
                    mean.lerp_(new.where(finite, mean), 1 - momentum)
                some = weight.clamp(min=torch.finfo(weight.dtype).tiny)  # 0 before any gradient
                gradients[name] = (average / some).to(average.dtype)
        steps = self.curvature.direction(gradients)
        scale = finite.to(total.dtype)
        if self.config.kl_clip is not None:
            products = [(wide(gradients[name]) * step).sum() for name, step in steps.items()]
            total = torch.stack(products).sum()
            scale = scale * trust_scale(total, self.lr, self.config.kl_clip)
        rates = self._each("lr")
        for name, step in steps.items():
            move = torch.where(scale == 0, 0.0, step * scale).to(step.dtype)
            self._named[name].sub_(move, alpha=rates[name])
        self.curvature.advance(total)

    def _add_prior(self, gradients: Named) -> None:
        """Add gamma_in w, at the mean over the contexts of the sampled weights w."""
        for block in self.posterior.prior.sampled:
            damping = self.posterior.damping(block.name)
            for name in block.names:
                if name in gradients:
                    weight: Tensor = self._named[name]
                    drawn = self._contexts.noise(name)
                    weight = weight if drawn is None else weight + drawn
                    pulled = self.posterior.unpadded(name, weight)
                    gradients[name] = gradients[name].add(pulled, alpha=damping)

    # --- what the posterior knows -----------------------------------------------------------------

    @torch.no_grad()
    def draw(self, generator: torch.Generator | None = None) -> Named:
        """One sample of the weights by name; those without noise are the module's."""
        self._check_ready("draw()")
        noise = self._noise(generator or self.curvature.evaluation)
        named = self.module.named_parameters()
        return {n: p + noise[n] if n in noise else p.detach() for n, p in named}

    def posterior_std(self) -> Named:
        """Standard deviation of every weight with noise, by name."""
        self.curvature.check_parameters()
        with torch.no_grad():
            return self.posterior.deviations()

    def kl(self) -> Tensor:
        """KL(q || prior) in nats."""
        self._check_ready("kl()")
        with torch.no_grad():
            return self.posterior.kl()

    # --- state ------------------------------------------------------------------------------------

    def load_by_name(self, state: Any) -> None:
        """Restore :meth:`state_by_name`; ValueError and no change if it does not fit."""
        self._check_closed("load_state_dict()")
        super().load_by_name(state)
        self.forget()
