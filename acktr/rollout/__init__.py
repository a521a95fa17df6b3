"""Rollouts: a policy and environments in; batches of samples out.

Stepping, recording, advantages (GAE) and the split of batches into parts.
May import: acktr.policies, acktr.kfac, acktr.compute, acktr.config, acktr.envs, acktr.tree.
"""

from acktr.rollout.acting import Acting
from acktr.rollout.buffer import Batch, Rollout, gae, make_batch
from acktr.rollout.collector import Collector, NonFiniteError
from acktr.rollout.microbatch import MicroBatch, add_means, micro_batches, outputs_of, parts_of
from acktr.rollout.shares import Moments, Share, absent, together

__all__ = [
    "Acting",
    "Batch",
    "Collector",
    "MicroBatch",
    "Moments",
    "NonFiniteError",
    "Rollout",
    "Share",
    "absent",
    "add_means",
    "gae",
    "make_batch",
    "micro_batches",
    "outputs_of",
    "parts_of",
    "together",
]
