"""Rollouts: a policy and environments in; batches of samples out.

Stepping, recording, advantages (GAE) and the split of batches into parts.
May import: acktr.policies, acktr.compute, acktr.config, acktr.envs.
"""

from acktr.rollout.collector import Batch, Collector, NonFiniteError, gae, make_batch
from acktr.rollout.microbatch import MicroBatch, add_means, micro_batches, outputs_of
from acktr.rollout.recorder import Rollout

__all__ = [
    "Batch",
    "Collector",
    "MicroBatch",
    "NonFiniteError",
    "Rollout",
    "add_means",
    "gae",
    "make_batch",
    "micro_batches",
    "outputs_of",
]
