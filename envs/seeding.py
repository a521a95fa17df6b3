"""Seeds of parallel environments."""

from __future__ import annotations

import numpy as np

from acktr.envs.settings import EnvError

MAX_SEED = 2**32 - 1


def check_seed(seed: object) -> int:
    """Return `seed` as an int.

    Raises:
        EnvError: not an integer from 0 to 2^32 - 1.
    """
    if (
        isinstance(seed, bool)
        or not isinstance(seed, int | np.integer)
        or not 0 <= seed <= MAX_SEED
    ):
        raise EnvError(f"the seed must be an integer from 0 to {MAX_SEED}, got {seed!r}")
    return int(seed)


def env_seeds(seed: int, num_envs: int) -> list[int]:
    """Seeds of the environments of a vector, each from 0 to 2^31 - 1.

    They are drawn from a `numpy.random.SeedSequence`, so that runs with neighbouring seeds share
    no environment, and the first k do not depend on `num_envs`.
    """
    words = np.random.SeedSequence(check_seed(seed)).generate_state(num_envs)
    return [int(word) >> 1 for word in words]
