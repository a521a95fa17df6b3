"""Policies: observations in; distributions over actions, and values, out.

Networks, action distributions, pictures and running normalisation, and the policy that plays.
May import: acktr.compute, acktr.config, acktr.envs, acktr.kfac, acktr.tree.
"""

from acktr.policies.build import ChannelsWarning, build_network
from acktr.policies.contract import (
    ActorCritic,
    NetworkSource,
    Outputs,
    SeparateActorCritic,
    as_outputs,
    mode,
    network_name,
    with_network,
)
from acktr.policies.distributions import ActionHead, action_head, to_environment
from acktr.policies.images import FrameStore, compute_type, pack
from acktr.policies.inputs import Given, prepared
from acktr.policies.memory import Recurrent
from acktr.policies.merged import MergedMoments
from acktr.policies.networks import (
    SharedActorCritic,
    stored_pictures,
)
from acktr.policies.normalize import (
    Normalizer,
    ObservationNormalizer,
    PartNormalizer,
    RewardScaler,
    observation_normalizer,
    pooling,
)
from acktr.policies.own import own_network, tell_given, tell_other
from acktr.policies.parameters import (
    copied_parameters,
    free_deviation,
    replace_parameters,
    require_fitting,
    require_saveable,
    saved_parameters,
)
from acktr.policies.policy import Policy
from acktr.policies.probability import action_probability, log_probability
from acktr.policies.probe import check_network
from acktr.policies.sizes import require_size
from acktr.policies.straight import straight

__all__ = [
    "ActionHead",
    "ActorCritic",
    "ChannelsWarning",
    "FrameStore",
    "Given",
    "MergedMoments",
    "NetworkSource",
    "Normalizer",
    "ObservationNormalizer",
    "Outputs",
    "PartNormalizer",
    "Policy",
    "Recurrent",
    "RewardScaler",
    "SeparateActorCritic",
    "SharedActorCritic",
    "action_head",
    "action_probability",
    "as_outputs",
    "build_network",
    "check_network",
    "compute_type",
    "copied_parameters",
    "free_deviation",
    "log_probability",
    "mode",
    "network_name",
    "observation_normalizer",
    "own_network",
    "pack",
    "pooling",
    "prepared",
    "replace_parameters",
    "require_fitting",
    "require_saveable",
    "require_size",
    "saved_parameters",
    "stored_pictures",
    "straight",
    "tell_given",
    "tell_other",
    "to_environment",
    "with_network",
]
