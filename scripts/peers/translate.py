"""The settings of a peer that is to equal our own A2C or TRPO, from our configuration.

sb3-contrib's TRPO takes the mean KL over samples and action dimensions, not the mean over samples
of the joint distribution's KL (stable-baselines3 2.9.2, common/distributions.py, kl_divergence: no
sum for diagonal Gaussians). With A dimensions its bound is A times ours, its Fisher matrix 1/A of
it. Bound and damping divided by A make the same step: x = (F/A + c/A I)^-1 g is A times ours, and
sqrt(2 (delta/A) / x^T (F/A + c/A I) x) x is ours.

What stays different, because the libraries define it so (ours first):

- advantages are standardised by the population's deviation, there by the sample's;
- the mean KL of TRPO's line search is KL(old || new), there KL(new || old), and equal to the bound
  is enough, there it must be below; conjugate gradient starts at 0, there at noise of 1e-4;
- running statistics start empty, there with 1e-4 samples of mean 0 and variance 1; there they
  already hold the observation that follows when the value of an episode's or a batch's last one is
  taken;
- random numbers: the environments' seeds are the same, weights and action noise are not.

The same are: gains of the orthogonal start, Gaussian actions clipped to the bounds, the reward's
running scale, bootstrapping at time limits, lambda-returns as targets, no clipping of values, the
weight of the mean squared value error, and the step size of every update (see models.linear).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from acktr.config import Config
from acktr.files import flat
from scripts.common import ScriptError

OURS = {"sb3-a2c": "a2c", "sb3-trpo": "trpo"}
"""Our algorithm that a peer is compared with."""

_SHARED = (
    *("num_envs", "num_steps", "gamma", "gae_lambda"),
    *("normalize_advantage", "normalize_observation", "normalize_reward"),
    *("network.hidden", "network.critic_hidden", "network.activation", "network.log_std_init"),
)
"""Settings of the same name and meaning."""
_FROM = {
    "a2c": {
        "optimizer.lr": "a2c.lr",
        "optimizer.lr_schedule": "a2c.lr_schedule",
        "optimizer.eps": "a2c.rms_eps",
        "optimizer.alpha": "a2c.rms_alpha",
        "algorithm.ent_coef": "ent_coef",
        "algorithm.vf_coef": "vf_coef",
        "algorithm.max_grad_norm": "a2c.max_grad_norm",
    },
    "trpo": {
        "optimizer.lr": "trpo.critic.lr",
        "optimizer.eps": "trpo.critic.adam_eps",
        "algorithm.target_kl": "trpo.max_kl",
        "algorithm.cg_max_steps": "trpo.cg_iterations",
        "algorithm.cg_damping": "trpo.cg_damping",
        "algorithm.line_search_shrinking_factor": "trpo.backtrack_factor",
        "algorithm.line_search_max_iter": "trpo.backtrack_steps",
        "algorithm.n_critic_updates": "trpo.critic.epochs",
        "algorithm.batch_size": "trpo.critic.batch_size",
    },
}
"""A peer's other settings, and which of ours they are."""
_FIXED: dict[str, dict[str, Any]] = {
    "a2c": {"optimizer.name": "rmsprop_tf"},
    "trpo": {
        "optimizer.name": "adam",
        "optimizer.lr_schedule": "constant",
        "optimizer.alpha": None,
    },
}
_WITHOUT_INFLUENCE = {
    *("env", "algo", "preset", "seed", "total_timesteps", "device"),  # of the run
    *("eval_freq", "eval_episodes", "checkpoint_freq"),
    *("env_timeout", "env_workers", "micro_batch", "compile"),  # the same results with any value
    "record",
    *("pixels", "network.channels", "network.trunk"),  # of pictures, which peers are not given
    *("network.memory_width", "network.memory_window"),  # of a memory, which is refused
}
_UNUSED = {
    "a2c": {"acktr", "trpo", "atari"},
    # The last two are of a shared network's loss, and of SGD.
    "trpo": {"acktr", "a2c", "atari", "vf_coef", "trpo.critic.momentum"},
}
_BUILT_IN: dict[str, dict[str, tuple[object, ...]]] = {
    "a2c": {},
    "trpo": {
        "ent_coef": (0.0,),
        "trpo.cg_tolerance": (1e-10,),
        "trpo.fisher_fraction": (1.0,),
        "trpo.critic.optimizer": ("adam",),
    },
}
"""Values that the peers have and that cannot be set, beside those in :func:`_refuse`."""


def translate(peer: str, config: Config, kl_parts: int) -> dict[str, Any]:
    """Settings with which a peer does what a run of ours with this configuration does.

    Args:
        peer: sb3-a2c or sb3-trpo.
        config: Of our run.
        kl_parts: Numbers over which the peer averages what is one KL: the action's dimensions.

    Returns:
        JSON values of the peer's settings.

    Raises:
        ScriptError: The run is not of the same algorithm, or has a setting that the peer cannot
            express; one line that names it.
    """
    own = OURS[peer]
    if config.algo != own:
        raise ScriptError(f"{peer} is compared with a run of {own}, not of {config.algo!r}")
    ours = flat(asdict(config))
    _refuse(own, ours)
    theirs = {name: ours[name] for name in _SHARED} | {"network.ortho_init": True}
    theirs |= _FIXED[own] | {name: ours[source] for name, source in _FROM[own].items()}
    if own == "trpo":
        theirs["algorithm.target_kl"] /= kl_parts
        theirs["algorithm.cg_damping"] /= kl_parts
        theirs["algorithm.batch_size"] = (
            theirs["algorithm.batch_size"] or config.num_envs * config.num_steps
        )
    settings: dict[str, Any] = {}
    for name, value in theirs.items():
        group, _, key = name.rpartition(".")
        (settings.setdefault(group, {}) if group else settings)[key] = value
    return settings


def _refuse(own: str, ours: dict[str, Any]) -> None:
    """Refuse what the peer cannot express, and what nobody has thought of here."""
    built_in = _BUILT_IN[own] | {
        "precision": ("auto", "float32"),
        "network.shared": (False,),
        "network.policy_gain": (0.01,),
        "network.memory": ("none",),
        "network.custom": (None,),
        "wrappers": ((),),
        "masks": ("auto", None),
        "normalize_parts": (None,),
        "network.critic_activation": (ours["network.activation"],),
    }
    known = {*_WITHOUT_INFLUENCE, *_SHARED, *_FROM[own].values(), *_UNUSED[own]}
    for name, value in ours.items():
        if name in built_in:
            if value not in built_in[name]:
                wanted = " or ".join(str(one) for one in built_in[name])
                raise ScriptError(
                    f"stable-baselines3 cannot express {name} = {value!r}, only {wanted}"
                )
        elif not known & {name, name.partition(".")[0]}:
            raise ScriptError(f"cannot translate {name}: unknown to this script")
