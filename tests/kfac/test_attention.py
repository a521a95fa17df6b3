"""Fisher products and steps of attention are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    dense_fisher,
    fisher_gram,
)
from acktr.kfac.fisher.products import output_tangents
from tests.tools.kfac import (
    build,
    plain_config,
    randn,
    set_gradients,
)
from tests.tools.product_cases import close, directions, filled


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x)[:, None].chunk(3, -1)
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.last(found[:, 0].mean(1))
        return out


def test_attention_has_exact_fisher_products() -> None:
    model, x = filled(Attention()), randn(4, 5, 8)
    matrix, vectors = directions(model, 2)
    fisher = dense_fisher(model, (x,), CategoricalLoss())
    close(fisher_gram(model, (x,), CategoricalLoss(), vectors), matrix @ fisher @ matrix.mT)
    step = 1e-5
    shifted = [filled(Attention()) for _ in range(2)]
    for sign, other in zip((1, -1), shifted, strict=True):
        for name, parameter in other.named_parameters():
            parameter.data.add_(vectors[0][name], alpha=sign * step)
    _, (tangent,) = output_tangents(model, (x,), vectors[:1])
    up, down = (other(x).detach() for other in shifted)
    torch.testing.assert_close(tangent, (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_layer_takes_exact_steps(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    model = build(layer, nn.Linear(8, 3)).train(training)
    config = plain_config(quadratic="exact", small_parameters="gradient")
    optimizer = KFAC(model, config, step_rule="quadratic_model")
    fast = torch.backends.mha.get_fastpath_enabled()
    for _ in range(2):
        with optimizer.capture() as captured:
            output = model(randn(4, 5, 8))
        optimizer.observe(captured, output, CategoricalLoss())
        set_gradients(model)
        optimizer.step()
        assert optimizer.last_step is not None
        assert float(optimizer.last_step.quadratic) > 0
    assert torch.backends.mha.get_fastpath_enabled() is fast
