"""The configuration of a training run: frozen dataclasses, checked when constructed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from acktr.config.former import translated
from acktr.config.network import NetworkConfig
from acktr.config.schema import (
    BelowOne,
    Checked,
    ConfigError,
    Count,
    CountOrZero,
    JsonObject,
    Limits,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    build,
    check,
    overlay,
)
from acktr.envs import TIMEOUT, AtariSettings, MaskSetting, PixelSettings
from acktr.files import read_object
from acktr.kfac import KFACConfig, SmallParameters, Structure

Algo = Literal["acktr", "a2c", "trpo"]
Schedule = Literal["constant", "linear"]

Seed = Annotated[int, Limits(0, 2**31 - 2**20 - 1)]


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Checked):
    """A separate critic's fit by a first-order optimizer (TRPO, and ACKTR's ablations)."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with momentum (steepest descent in the Euclidean norm)."""
    lr: Positive = 1e-3
    """Step size, constant."""
    epochs: Count = 10
    """Passes over each batch."""
    batch_size: Count | None = 128
    """Samples per step; None: the whole batch."""
    momentum: BelowOne = 0.9
    """Momentum of SGD."""
    adam_eps: Positive = 1e-5
    """Added to Adam's root."""


@dataclass(frozen=True, kw_only=True)
class A2CConfig(Checked):
    """A2C (Mnih et al. 2016): one RMSprop step per batch."""

    lr: Positive = 7e-4
    """Step size."""
    lr_schedule: Schedule = "linear"
    """Schedule of lr over total_timesteps; the linear one ends at 0."""
    rms_alpha: BelowOne = 0.99
    """Decay of RMSprop's mean square, which starts at 1."""
    rms_eps: Positive = 1e-5
    """Added to the mean square, inside the root."""
    max_grad_norm: Positive = 0.5
    """Largest norm of the gradient over all parameters."""


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(Checked):
    """TRPO (Schulman et al. 2015); the actor and the critic must be separate."""

    max_kl: Positive = 0.01
    """Largest mean KL(old || new) of a step, in nats."""
    cg_iterations: Count = 15
    """Most iterations of conjugate gradient."""
    cg_damping: NonNegative = 0.1
    """Added to the Fisher matrix."""
    cg_tolerance: NonNegative = 1e-10
    """Squared norm of the residual at which conjugate gradient stops."""
    fisher_fraction: PositiveShare = 1.0
    """Part of the batch for Fisher products: every round(1/fraction)-th sample."""
    backtrack_factor: Annotated[float, Limits(0, math.nextafter(1.0, 0.0), above=True)] = 0.8
    """Factor by which the line search shortens the step."""
    backtrack_steps: Count = 10
    """Most steps that the line search tries."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Fit of the critic."""


_RL = KFACConfig.for_rl()


@dataclass(frozen=True, kw_only=True)
class SampledKFACConfig(KFACConfig):
    """K-FAC whose factors are computed from a part of each batch.

    Its defaults are those of :meth:`acktr.kfac.KFACConfig.for_rl`; settings that are left out of
    a file keep them, whatever the defaults of supervised learning become.
    """

    lr: float = _RL.lr
    kl_clip: float | None = 0.001
    damping: float = _RL.damping
    structure: Structure = _RL.structure
    stat_decay: float = _RL.stat_decay
    stat_interval: int = _RL.stat_interval
    momentum: float = _RL.momentum
    refresh_interval: int = _RL.refresh_interval
    eager_start: bool = _RL.eager_start
    refresh_delay: int | None = _RL.refresh_delay
    small_parameters: SmallParameters = _RL.small_parameters
    max_factor_size: int | None = _RL.max_factor_size
    factor_rows: int | None = _RL.factor_rows
    float64: bool = _RL.float64
    fast_products: bool = _RL.fast_products
    quadratic: Literal["kronecker", "exact"] = "kronecker"
    stat_fraction: Annotated[float, Limits(1e-6, 1)] = 1.0
    """Part of the batch that the factors are computed from: every round(1/fraction)-th sample.

    ACKTR measures the KL of a step, train/approx_kl, on as many samples.
    """

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ACKTRConfig(Checked):
    """ACKTR (Wu et al. 2017): K-FAC steps for actor and critic."""

    actor: SampledKFACConfig = field(default_factory=SampledKFACConfig)
    """K-FAC of the actor, or of the whole network when the trunk is shared."""
    critic: SampledKFACConfig = field(default_factory=SampledKFACConfig)
    """K-FAC of a separate critic (Gauss-Newton metric)."""
    critic_steps: Count = 1
    """K-FAC steps of a separate critic on each batch."""
    critic_optimizer: Literal["kfac", "first_order"] = "kfac"
    """Gauss-Newton steps by K-FAC, or (the paper's ablations) the first-order fit below."""
    first_order: CriticConfig = field(
        default_factory=lambda: CriticConfig(epochs=50, batch_size=None)
    )
    """A separate critic's fit without K-FAC: Adam, or SGD for the Euclidean norm."""
    target_kl: Positive | None = None
    """KL per update to which the actor's lr adapts by factors of 1.5, in place of the schedule."""
    value_sigma: Positive | Literal["adaptive"] = 1.0
    """Standard deviation of the critic's Gaussian observation model, whose Fisher is 1/sigma^2;
    adaptive: the running root mean square of R - V before each update (adaptive Gauss-Newton)."""
    value_fisher: bool = True
    """Whether the value is part of a shared network's Fisher; without it the Fisher is the
    policy's, and the value's gradient is divided by the damping where the policy's is 0."""
    lr_schedule: Schedule = "linear"
    """Schedule of the actor's lr over total_timesteps."""


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Everything that defines a training run; :meth:`for_env` has an environment's preset."""

    env: str
    """Environment id, for example HalfCheetah-v5, PongNoFrameskip-v4 or module:Id-v0."""
    algo: Algo = "acktr"
    """Algorithm."""
    preset: str = "default"
    """Preset that the values started from: default (tuned here) or paper (as published)."""
    seed: Seed = 0
    """Seed of environments, networks and sampling."""
    total_timesteps: Count = 1_000_000
    """Environment steps to train for, summed over the parallel environments."""
    env_kwargs: JsonObject = field(default_factory=dict, hash=False)
    """Arguments of the environment, as gymnasium.make takes them."""
    wrappers: tuple[str, ...] = ()
    """Wrappers around each environment as module:Name, the innermost first."""
    num_envs: Count = 8
    """Parallel environments."""
    env_workers: Count | Literal["auto"] = "auto"
    """Processes that step them, without influence on results; auto: for MuJoCo one per core; 1: the
    one that trains, where others than Gymnasium's have one of their own otherwise. With several a
    separate critic of ACKTR learns in one more, while the next rollout is collected."""
    env_timeout: Positive = TIMEOUT
    """Seconds that making, resetting, stepping or closing one environment may take."""
    masks: MaskSetting = "auto"
    """Action masks: from the method action_masks, from info or observation; auto: what is there."""
    num_steps: Count = 32
    """Steps of each environment per update."""
    micro_batch: Count | None = None
    """Most samples whose activations an update of acktr or a2c keeps; None: the whole batch's."""
    gamma: Share = 0.99
    """Discount factor."""
    gae_lambda: Share = 1.0
    """Lambda of generalised advantage estimation; 1 gives n-step returns."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    vf_coef: NonNegative = 0.25
    """Weight of the mean squared value error in a shared network's loss."""
    normalize_advantage: bool = False
    """Standardise advantages over the batch."""
    normalize_observation: bool = False
    """Standardise observations by running statistics, clipped to +-10."""
    normalize_parts: tuple[str, ...] | None = None
    """Parts of Dict and Tuple observations to standardise; None: all vectors, but not masks of 0
    and 1."""
    normalize_reward: bool = False
    """Divide rewards by the running deviation of the discounted return, clipped to +-10."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type of convolutional networks; auto: bfloat16 where the hardware is fast at it."""
    compile: bool = False
    """Compile acting (on CUDA into a CUDA graph) and update of ACKTR and A2C by torch.compile."""
    eval_freq: CountOrZero = 0
    """Steps between evaluations during training; 0: only at the end."""
    eval_episodes: Count = 10
    """Episodes of each evaluation, the one at the end included."""
    record: tuple[str, ...] = ()
    """Keys of the infos of episodes' last steps whose numbers are logged with the episodes."""
    checkpoint_freq: Count = 100_000
    """Steps between checkpoints; one is always written at the end or when stopped."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Networks."""
    acktr: ACKTRConfig = field(default_factory=ACKTRConfig)
    """Settings of ACKTR."""
    a2c: A2CConfig = field(default_factory=A2CConfig)
    """Settings of A2C."""
    trpo: TRPOConfig = field(default_factory=TRPOConfig)
    """Settings of TRPO."""
    atari: AtariSettings = field(default_factory=AtariSettings)
    """Atari protocol; ignored by other environments."""
    pixels: PixelSettings = field(default_factory=PixelSettings)
    """What is seen of Pixels/ environments; ignored by others."""

    @classmethod
    def for_env(cls, env: str, algo: str = "acktr", preset: str = "default") -> Config:
        """The preset of an environment, which ``Config(env=...)`` is not.

        Raises:
            ConfigError: Unknown algorithm or preset, or no published values for this environment.
        """
        from acktr.config import presets  # which is made of this class

        return presets.preset(env, algo, preset)[0]

    def __post_init__(self) -> None:
        if not self.env:
            raise ConfigError("env must be an environment id such as HalfCheetah-v5, got nothing")
        super().__post_init__()
        if not all(map(_is_module_name, self.wrappers)):
            raise ConfigError(f"wrappers must be names as module:Name, got {self.wrappers!r:.80}")
        if not all(map(_is_column, self.record)) or len(set(self.record)) < len(self.record):
            raise ConfigError(
                "record must be keys of infos, each once, printable and other than the columns r,"
                f" l, t and step; got {self.record!r:.80}"
            )
        if self.num_envs * self.num_steps < 2:
            raise ConfigError("num_envs * num_steps must be at least 2")
        if self.algo == "trpo" and self.micro_batch is not None:
            raise ConfigError("trpo takes whole batches: micro_batch must be null")
        if self.algo == "trpo" and self.network.shared:
            raise ConfigError("trpo needs a separate critic: network.shared must be false")
        if self.algo == "acktr":
            self._check_critic()
        if self.network.memory != "none":
            check_recurrent(self)

    def _check_critic(self) -> None:
        """Refuse settings of ACKTR's critic that would change nothing."""
        if self.network.shared and self.acktr.critic_optimizer != "kfac":
            raise ConfigError(
                "acktr.critic_optimizer applies to a separate critic: network.shared must be false"
            )
        if not self.network.shared and not self.acktr.value_fisher:
            raise ConfigError(
                "acktr.value_fisher=false leaves the value out of a shared network's Fisher:"
                " network.shared must be true"
            )
        if self.acktr.value_sigma != "adaptive":
            return
        if self.acktr.critic_optimizer != "kfac":
            raise ConfigError(
                "acktr.value_sigma=adaptive is for K-FAC's critic: acktr.critic_optimizer must be"
                " kfac"
            )
        if self.network.shared and not self.acktr.value_fisher:
            raise ConfigError(
                "acktr.value_sigma=adaptive scales the value's part of a shared network's Fisher:"
                " acktr.value_fisher must be true"
            )


def check_recurrent(config: Config) -> None:
    """Refuse what networks with a memory cannot do.

    Raises:
        ConfigError: One line.
    """
    if config.algo == "trpo":
        raise ConfigError("trpo does not take networks with a memory: use acktr or a2c")
    if config.algo == "acktr" and config.acktr.critic_optimizer != "kfac":
        raise ConfigError(
            "a critic with a memory learns by K-FAC: acktr.critic_optimizer must be kfac"
        )
    if config.compile:
        raise ConfigError("networks with a memory are not compiled: compile must be false")


def _is_module_name(name: str) -> bool:
    return name.count(":") == 1 and all(name.split(":"))


def _is_column(name: str) -> bool:
    return name.isprintable() and name not in ("", "r", "l", "t", "step")


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON values."""
    return dataclasses.asdict(config)


def read_settings(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file of settings, which :func:`merge` checks.

    Raises:
        ConfigError: It cannot be read, is larger than 1 MiB or is no JSON object.
    """
    try:
        return read_object(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def from_dict(values: Any) -> Config:
    """The configuration of :func:`to_dict`, or part of one.

    Raises:
        ConfigError: An unknown key (with a suggestion), a wrong type or a value out of range.
    """
    return _overlaid({}, values)


def merge(config: Config, values: Any) -> Config:
    """The configuration with part of it replaced, nested settings one by one, env_kwargs whole.

    Raises:
        ConfigError: As :func:`from_dict`.
    """
    return _overlaid(to_dict(config), values)


def _overlaid(base: Mapping[str, Any], values: Any) -> Config:
    if not isinstance(values, Mapping):
        raise ConfigError("configuration: the file must be an object of settings")
    given = translated(values, base)
    merged = overlay(base, given)
    if "env_kwargs" in given:  # one setting, whose value happens to be an object
        merged["env_kwargs"] = given["env_kwargs"]
    config: Config = build(Config, merged)
    return config
