"""Policies: observations in; distributions over actions, and values, out.

Networks, action distributions, pictures and running normalisation, and the policy that plays.
May import: acktr.compute, acktr.config, acktr.envs, acktr.kfac.
"""

from acktr.policies.distributions import ActionHead, action_head, to_environment
from acktr.policies.images import FrameStore, compute_type, pack
from acktr.policies.networks import (
    ActorCritic,
    SeparateActorCritic,
    SharedActorCritic,
    build_network,
)
from acktr.policies.normalize import ObservationNormalizer, RewardScaler, normalizable
from acktr.policies.policy import Policy

__all__ = [
    "ActionHead",
    "ActorCritic",
    "FrameStore",
    "ObservationNormalizer",
    "Policy",
    "RewardScaler",
    "SeparateActorCritic",
    "SharedActorCritic",
    "action_head",
    "build_network",
    "compute_type",
    "normalizable",
    "pack",
    "to_environment",
]
