"""The settings of a peer that is to equal our own A2C or TRPO, from a run's config.json.

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

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from acktr.config import Config
from acktr.files import flat
from scripts.common import ScriptError

OURS = {"sb3-a2c": "a2c", "sb3-trpo": "trpo"}
"""Our algorithm that a peer is compared with."""

_WITHOUT_INFLUENCE = {
    *("env", "algo", "preset", "seed", "total_timesteps", "device"),  # of the run
    *("eval_freq", "eval_episodes", "checkpoint_freq"),
    *("env_workers", "micro_batch", "compile"),  # the same results with any value
}
_SHARED = {
    *("num_envs", "num_steps", "gamma", "gae_lambda"),
    *("normalize_advantage", "normalize_observation", "normalize_reward"),
}
_NETWORK = {"hidden", "critic_hidden", "activation", "log_std_init"}
_TRANSLATED = {
    "a2c": {"ent_coef", "vf_coef"}
    | {f"a2c.{n}" for n in ("lr", "lr_schedule", "rms_alpha", "rms_eps", "max_grad_norm")},
    "trpo": {"trpo.max_kl", "trpo.cg_iterations", "trpo.cg_damping"}
    | {"trpo.backtrack_factor", "trpo.backtrack_steps"}
    | {f"trpo.critic.{n}" for n in ("lr", "epochs", "batch_size", "adam_eps")}
    | {"vf_coef", "trpo.critic.momentum"},  # of a shared network's loss, and of SGD
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
    values = asdict(config)
    _refuse(own, values)
    shared = {name: values[name] for name in _SHARED}
    shared["network"] = {name: values["network"][name] for name in _NETWORK}
    shared["network"]["ortho_init"] = True
    return shared | (_a2c(config) if own == "a2c" else _trpo(config, kl_parts))


def _refuse(own: str, values: Mapping[str, Any]) -> None:
    """Refuse what the peer cannot express, and what nobody has thought of here."""
    built_in = {
        "precision": ("auto", "float32"),
        "network.shared": (False,),
        "network.policy_gain": (0.01,),
        "network.critic_activation": (values["network"]["activation"],),
        **_BUILT_IN[own],
    }
    known = _WITHOUT_INFLUENCE | _SHARED | _TRANSLATED[own] | {f"network.{n}" for n in _NETWORK}
    others = {"acktr", "a2c", "trpo", "atari"} - {own}
    for name, value in flat(values).items():
        if name in built_in:
            if value not in built_in[name]:
                wanted = " or ".join(str(one) for one in built_in[name])
                raise ScriptError(
                    f"stable-baselines3 cannot express {name} = {value!r}, only {wanted}"
                )
        elif name not in known and name.partition(".")[0] not in others:
            raise ScriptError(f"cannot translate {name}: unknown to this script")


def _a2c(config: Config) -> dict[str, Any]:
    own = config.a2c
    return {
        "optimizer": {
            "name": "rmsprop_tf",
            "lr": own.lr,
            "lr_schedule": own.lr_schedule,
            "eps": own.rms_eps,
            "alpha": own.rms_alpha,
        },
        "algorithm": {
            "ent_coef": config.ent_coef,
            "vf_coef": config.vf_coef,
            "max_grad_norm": own.max_grad_norm,
        },
    }


def _trpo(config: Config, kl_parts: int) -> dict[str, Any]:
    own, critic = config.trpo, config.trpo.critic
    return {
        "optimizer": {
            "name": "adam",
            "lr": critic.lr,
            "lr_schedule": "constant",
            "eps": critic.adam_eps,
            "alpha": None,
        },
        "algorithm": {
            "target_kl": own.max_kl / kl_parts,
            "cg_max_steps": own.cg_iterations,
            "cg_damping": own.cg_damping / kl_parts,
            "line_search_shrinking_factor": own.backtrack_factor,
            "line_search_max_iter": own.backtrack_steps,
            "n_critic_updates": critic.epochs,
            "batch_size": critic.batch_size or config.num_envs * config.num_steps,
        },
    }
