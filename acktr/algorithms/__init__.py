"""Algorithms: batches in; new parameters of the network, and metrics, out.

ACKTR, A2C and TRPO, a file each, what they share, and the update alone for loops of one's own.
May import: acktr.rollout, acktr.policies, acktr.kfac, acktr.compute, acktr.config, acktr.tree.
"""

from acktr.algorithms.a2c import A2CLearner
from acktr.algorithms.acktr import ACKTRLearner
from acktr.algorithms.auxiliary import Auxiliary, checked_auxiliary
from acktr.algorithms.critic import CriticError
from acktr.algorithms.learner import Learner
from acktr.algorithms.trpo import TRPOLearner
from acktr.algorithms.update import A2CUpdate, ACKTRUpdate, TRPOUpdate

__all__ = [
    "A2CLearner",
    "A2CUpdate",
    "ACKTRLearner",
    "ACKTRUpdate",
    "Auxiliary",
    "CriticError",
    "Learner",
    "TRPOLearner",
    "TRPOUpdate",
    "checked_auxiliary",
]
