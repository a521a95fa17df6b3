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
from typing import Any

from scripts.peers.errors import PeerError
from scripts.peers.settings import Settings, read_settings

OURS = {"sb3-a2c": "a2c", "sb3-trpo": "trpo"}
"""Our algorithm that a peer is compared with."""

_RUN = ("env", "algo", "preset", "seed", "total_timesteps", "device")
_RHYTHM = ("eval_freq", "eval_episodes", "checkpoint_freq", "atari")
_SAME_RESULTS = ("env_workers", "micro_batch", "compile")
"""Settings that results do not depend on."""
_SECTIONS = ("acktr", "a2c", "trpo")
_ROLLOUT = ("num_envs", "num_steps", "gamma", "gae_lambda")
_NORMALIZE = ("normalize_advantage", "normalize_observation", "normalize_reward")
_CG_TOLERANCE = 1e-10
_POLICY_GAIN = 0.01
_LARGEST = 1e9


class _Section:
    """An object of the configuration whose keys must all be used up."""

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, Mapping):
            raise PeerError(f"configuration: {path.rstrip('.') or 'it'} must be an object")
        self._left = dict(values)
        self._path = path

    def take(self, name: str) -> Any:
        """A value that the peer can have."""
        if name not in self._left:
            raise PeerError(f"configuration: {self._path}{name} is missing")
        return self._left.pop(name)

    def number(self, name: str) -> float:
        """A number to calculate with."""
        value = self.take(name)
        if type(value) not in (int, float) or abs(value) > _LARGEST:
            raise PeerError(f"configuration: {self._path}{name} must be a number, got {value!r}")
        return float(value)

    def several(self, *names: str) -> dict[str, Any]:
        """Values that the peer has under the same names."""
        return {name: self.take(name) for name in names}

    def section(self, name: str) -> _Section:
        """An object within."""
        return _Section(self.take(name), f"{self._path}{name}.")

    def only(self, name: str, *allowed: object) -> None:
        """A value that the peer has built in."""
        value = self.take(name)
        if not any(type(value) is type(one) and value == one for one in allowed):
            wanted = " or ".join(str(one) for one in allowed)
            raise PeerError(
                f"stable-baselines3 cannot express {self._path}{name} = {value!r}, only {wanted}"
            )

    def ignore(self, *names: str) -> None:
        """Values without influence on what is learnt here."""
        for name in names:
            self._left.pop(name, None)

    def end(self) -> None:
        """Refuse what is left, which nobody has looked at."""
        if self._left:
            name = next(iter(self._left))
            raise PeerError(f"cannot translate {self._path}{name}: unknown to this script")


def translate(peer: str, config: Mapping[str, Any], kl_parts: int) -> Settings:
    """Settings with which a peer does what a run of ours with this configuration does.

    Args:
        peer: sb3-a2c or sb3-trpo.
        config: JSON values of a run's config.json.
        kl_parts: Numbers over which the peer averages what is one KL: the action's dimensions.

    Raises:
        PeerError: The run is not of the same algorithm, or has a setting that the peer cannot
            express; one line that names it.
    """
    if peer not in OURS:
        raise PeerError(f"{peer} has no counterpart here: there are {', '.join(OURS)}")
    run = _Section(config)
    own = OURS[peer]
    if config.get("algo") != own:
        raise PeerError(f"{peer} is compared with a run of {own}, not of {config.get('algo')!r}")
    run.ignore(*_RUN, *_RHYTHM, *_SAME_RESULTS, *(name for name in _SECTIONS if name != own))
    run.only("precision", "auto", "float32")
    if "env_backend" in config:  # configurations before it have Gymnasium's
        run.only("env_backend", "gymnasium")
    values: dict[str, Any] = run.several(*_ROLLOUT, *_NORMALIZE)
    values["network"] = _network(run.section("network"))
    part = _a2c(run) if own == "a2c" else _trpo(run, values, kl_parts)
    run.end()
    return read_settings(peer, values | part)


def _network(network: _Section) -> dict[str, Any]:
    network.only("shared", False)
    network.only("policy_gain", _POLICY_GAIN)
    found = network.several("hidden", "critic_hidden", "activation", "log_std_init")
    network.only("critic_activation", found["activation"])
    network.end()
    return found | {"ortho_init": True}


def _a2c(run: _Section) -> dict[str, Any]:
    loss = run.several("ent_coef", "vf_coef")
    own = run.section("a2c")
    loss["max_grad_norm"] = own.take("max_grad_norm")
    optimizer = own.several("lr", "lr_schedule")
    optimizer |= {"name": "rmsprop_tf", "eps": own.take("rms_eps"), "alpha": own.take("rms_alpha")}
    own.end()
    return {"optimizer": optimizer, "algorithm": loss}


def _trpo(run: _Section, values: Mapping[str, Any], kl_parts: int) -> dict[str, Any]:
    run.only("ent_coef", 0.0, 0)
    run.ignore("vf_coef")  # of a shared network's loss
    own = run.section("trpo")
    own.only("cg_tolerance", _CG_TOLERANCE)
    own.only("fisher_fraction", 1.0, 1)
    critic = own.section("critic")
    critic.only("optimizer", "adam")
    critic.ignore("momentum")  # of SGD
    optimizer = {"name": "adam", "lr": critic.take("lr"), "lr_schedule": "constant"}
    optimizer |= {"eps": critic.take("adam_eps"), "alpha": None}
    batch_size = critic.take("batch_size")
    if batch_size is None:
        batch_size = _integer(values, "num_envs") * _integer(values, "num_steps")
    step = {
        "target_kl": own.number("max_kl") / kl_parts,
        "cg_max_steps": own.take("cg_iterations"),
        "cg_damping": own.number("cg_damping") / kl_parts,
        "line_search_shrinking_factor": own.take("backtrack_factor"),
        "line_search_max_iter": own.take("backtrack_steps"),
        "n_critic_updates": critic.take("epochs"),
        "batch_size": batch_size,
    }
    critic.end()
    own.end()
    return {"optimizer": optimizer, "algorithm": step}


def _integer(values: Mapping[str, Any], name: str) -> int:
    value = values[name]
    if type(value) is not int:
        raise PeerError(f"configuration: {name} must be an integer, got {value!r}")
    return value
