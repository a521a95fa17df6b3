"""Settings of noisy K-FAC say the same in any order, as ranks compare how they are written."""

from __future__ import annotations

from typing import Any

import pytest

from acktr.kfac import NoisyConfig

NAMES = ["head.weight", "body.0", "norm", "body.1.bias", ""]


@pytest.mark.parametrize("given", [NAMES, NAMES[::-1], set(NAMES), (*NAMES, "norm")])
def test_the_order_of_deterministic_names_does_not_matter(given: Any) -> None:
    """That of a set is another one in every process."""
    config = NoisyConfig(deterministic=given)
    assert config.deterministic == tuple(sorted(NAMES))
    assert repr(config) == repr(NoisyConfig(deterministic=NAMES))


def test_the_order_of_prior_variances_does_not_matter() -> None:
    variances = {name: 0.1 + place for place, name in enumerate(NAMES)}
    turned = dict(reversed(variances.items()))
    config = NoisyConfig(prior_variance=turned)
    assert config.prior_variance == variances
    assert repr(config) == repr(NoisyConfig(prior_variance=variances))
    turned["norm"] = 9.0  # the settings are frozen
    assert config.prior_variance == variances


def test_variances_of_what_is_no_name_are_refused() -> None:
    with pytest.raises(ValueError, match="the keys of prior_variance must be a list of names"):
        NoisyConfig(prior_variance={1: 0.5})  # type: ignore[dict-item]
