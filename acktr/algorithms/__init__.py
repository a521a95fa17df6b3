"""Algorithms: batches in; new parameters of the network, and metrics, out.

ACKTR, A2C and TRPO, a file each, and what they share.
May import: acktr.rollout, acktr.policies, acktr.kfac, acktr.compute, acktr.config, acktr.tree.
"""

from acktr.algorithms.a2c import A2CLearner
from acktr.algorithms.acktr import ACKTRLearner
from acktr.algorithms.learner import Learner
from acktr.algorithms.trpo import TRPOLearner

__all__ = [
    "A2CLearner",
    "ACKTRLearner",
    "Learner",
    "TRPOLearner",
]
