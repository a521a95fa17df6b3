"""Environments behind one interface: an id, class or function in; a vector environment out.

May import: Gymnasium, ale-py, MuJoCo and numpy; nothing of acktr, no torch. The way of a step:

    make_vec (factory) -> GuardedVectorEnv (guard): checks, returns and lengths of episodes
                       -> ParallelEnvs (parallel): workers, one here and others in forked processes
                       -> SafeEnv (single): names the environment in errors -> Gymnasium
    Atari: make_vec -> GroupedEnvs (groups) -> AtariEnvs (atari) -> ale-py

Two words for some of the environments: a *group* is stepped together, a *worker* steps its
environments in one process.

`make_vec` returns a `gymnasium.vector.VectorEnv` that keeps these promises:

1. `metadata["autoreset_mode"]` is `AutoresetMode.SAME_STEP`: an episode that ends is reset within
   the same step, and no step is wasted.
2. When an episode ends, `infos["episode"]` holds the arrays `r` (sum of raw rewards), `l` (agent
   steps) and `t` (seconds), valid where `infos["_episode"]` is true. With `record`,
   `infos["recorded"]` holds the numbers that the infos of the last steps have by these keys; one
   that is not there is NaN, with one warning. `is_success` is among them wherever some have it.
3. At the same steps `infos["final_obs"]` is like the observations, with the last observations of
   the episodes where `infos["_final_obs"]` is true, and zeros elsewhere. The masks mark the
   true ends of episodes: `terminated` alone may also mean a lost life.
4. `infos["forced"]`, where present, marks environments that executed FIRE instead of the agent's
   action: such a transition must not be learned from as if it were the agent's choice. In
   training a lost life sets `terminated` while the game and the observations go on.
5. A NaN or infinity in a floating-point observation (in any part of it) or reward, what is none or
   has another shape or type, and an integer that the space does not have, raise `EnvFault` with the
   index of the environment and the step (counted from 1 since construction), and so does an
   exception in an environment, `sys.exit()` too. An exception in `close()` is an `EnvWarning`, and
   so is, once and unless Gymnasium's own environments do it, an observation outside of the bounds
   of its Box.
6. Actions are checked for shape, type, range and finiteness before they are executed. Box actions
   are not clipped. Spaces are those of the environment: Discrete ones keep their start.
7. What else single Gymnasium environments put into their infos is dropped, except action masks:
   where environments have some (see `acktr.envs.masks`), `infos["action_mask"]` of every reset and
   step has those of the observations shown, boolean and checked (num_envs, P), with P the number of
   choices. A mask that is missing, unfit or allows nothing raises `EnvFault`.
8. `env_workers` processes step the environments, this one included unless they are `apart`. Nothing
   else depends on their number. One that dies raises `EnvFault`, and so does a call of one
   environment (making, reset, step, close) that takes longer than `env_timeout` seconds, in this
   process too; the notes of the fault hold where a worker was. No worker outlives this process.
9. Atari games come as `GroupedEnvs`, whose `groups` of `num_groups` or fewer can be stepped one by
   one with `step_async` and `step_wait`, so that a policy can act for one while another is stepped.
   The games are the same for any number; training is not, as it draws the actions of a group at a
   time.
10. `reset(seed=s)` seeds the environments by `env_seeds(s, num_envs)`: neighbouring seeds share no
   environment, and the first k do not depend on the number. The first reset without a seed uses
   the one given to `make_vec`. `close()` may be called twice.
11. `state_dict()` says, in arrays and JSON values, what the environments are in the middle of, for
   any number of workers; after `load_state_dict` in new environments of the same making the next
   steps are the same bit for bit. Where one has no state to save, `state_dict` raises
   `UnsavedError` with its index and the reason: see `acktr.envs.snapshot`. A state from a file is
   not trusted: what does not fit is a ValueError of one line.
12. Around the calls of environments that are not Gymnasium's the process stays as it was: the
   working directory, torch's default dtype and the handlers of SIGINT, SIGTERM, SIGHUP and SIGUSR1
   are set back, `os._exit` raises SystemExit, and draws from the global generators are told, each
   in one `EnvWarning` with the index and the step.
"""

from acktr.envs.episodes import SUCCESS
from acktr.envs.errors import EnvError, EnvFault, EnvWarning, UnsavedError, one_line
from acktr.envs.exchange import SharedTree
from acktr.envs.factory import (
    describe,
    drawer,
    found_masks,
    group_count,
    is_among,
    make_single,
    make_vec,
    tell_statistics,
    workers,
)
from acktr.envs.groups import GroupedEnvs, Stepper
from acktr.envs.guard import GuardedVectorEnv
from acktr.envs.masks import (
    MASK,
    FoundMasks,
    MaskReader,
    Masks,
    MaskSetting,
    MaskSource,
    as_masks,
    choices,
)
from acktr.envs.nested import Arrays, batched, final_rows, flat, nested, parts
from acktr.envs.parallel import thread_ids, usable_cores, worker_count
from acktr.envs.pictures import Channels, Picture, picture, pictures
from acktr.envs.process import CLOSE, ForkedProcess, end_all
from acktr.envs.registry import is_atari, lookup
from acktr.envs.settings import AtariSettings, PixelSettings, Workers
from acktr.envs.source import EnvLike, EnvSource, Wrapper, env_name, is_json, wrapper_name
from acktr.envs.spaces import (
    check_spaces,
    integers,
    space_difference,
    space_facts,
)
from acktr.envs.values import require_like
from acktr.envs.vector import (
    AnyVectorEnv,
    StepResult,
    autoreset_mode,
    check_state,
    env_seeds,
    layers,
    state_method,
)
from acktr.envs.watch import TIMEOUT

__all__ = [
    "CLOSE",
    "MASK",
    "SUCCESS",
    "TIMEOUT",
    "AnyVectorEnv",
    "Arrays",
    "AtariSettings",
    "Channels",
    "EnvError",
    "EnvFault",
    "EnvLike",
    "EnvSource",
    "EnvWarning",
    "ForkedProcess",
    "FoundMasks",
    "GroupedEnvs",
    "GuardedVectorEnv",
    "MaskReader",
    "MaskSetting",
    "MaskSource",
    "Masks",
    "Picture",
    "PixelSettings",
    "SharedTree",
    "StepResult",
    "Stepper",
    "UnsavedError",
    "Workers",
    "Wrapper",
    "as_masks",
    "autoreset_mode",
    "batched",
    "check_spaces",
    "check_state",
    "choices",
    "describe",
    "drawer",
    "end_all",
    "env_name",
    "env_seeds",
    "final_rows",
    "flat",
    "found_masks",
    "group_count",
    "integers",
    "is_among",
    "is_atari",
    "is_json",
    "layers",
    "lookup",
    "make_single",
    "make_vec",
    "nested",
    "one_line",
    "parts",
    "picture",
    "pictures",
    "require_like",
    "space_difference",
    "space_facts",
    "state_method",
    "tell_statistics",
    "thread_ids",
    "usable_cores",
    "worker_count",
    "workers",
    "wrapper_name",
]
