"""Atari against games played independently on a single emulator."""

import tracemalloc

import ale_py
import numpy as np
import pytest
from ale_py import roms
from gymnasium.vector import AutoresetMode

from acktr.envs import AtariSettings, EnvError, EnvFault, describe, env_seeds, make_single, make_vec
from acktr.envs.registry import lookup
from acktr.envs.replay import GameLog

BREAKOUT = "BreakoutNoFrameskip-v4"
NO_NOOPS = AtariSettings(noop_max=0, num_threads=1)


class Emulator:
    """Breakout frame by frame, with FIRE at the start and after a lost life."""

    def __init__(self, seed: int) -> None:
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setInt("random_seed", seed)
        self.ale.loadROM(str(roms.get_rom_path("breakout")))
        self.actions = self.ale.getMinimalActionSet()
        self.start()

    def start(self) -> None:
        self.ale.reset_game()
        self.ale.act(ale_py.Action.FIRE)
        self.press = False
        self.screen = self.ale.getScreenRGB()

    def step(self, action: int) -> tuple[float, bool, bool]:
        """Reward, whether a life was lost in a game that goes on, and whether the game is over."""
        before, reward, screens = self.ale.lives(), 0.0, []
        for _ in range(4):
            reward += self.ale.act(self.actions[1 if self.press else action])
            if self.ale.game_over():
                break
            screens.append(self.ale.getScreenRGB())
        self.screen = np.max(screens[-2:], axis=0) if screens else self.screen
        over = self.ale.game_over()
        self.press = not over and self.ale.lives() < before
        return reward, self.press, over


def play(training: bool, games: int, envs: int = 1) -> dict[str, int]:
    """Play Breakout and compare every step of environment 0 with the emulator."""
    seen = {"lost": 0, "over": 0, "forced": 0}
    vec = make_vec(BREAKOUT, envs, seed=5, training=training, atari=NO_NOOPS)
    emulator = Emulator(env_seeds(5, envs)[0])
    rng = np.random.default_rng(1)
    _, infos = vec.reset()
    lives, total, length, lost = [int(infos["lives"][0])], 0.0, 0, False
    while seen["over"] < games:
        actions = rng.integers(0, 4, envs)
        _, rewards, terminated, truncated, infos = vec.step(actions)
        assert bool(infos["forced"][0]) == lost  # exactly the step after each lost life
        seen["forced"] += int(infos["forced"][0])
        reward, lost, over = emulator.step(int(actions[0]))
        total, length = total + reward, length + 1
        assert rewards[0] == (np.sign(reward) if training else reward)
        assert bool(terminated[0]) == (over or (training and lost))
        assert not truncated.any()
        assert bool(infos.get("_episode", np.zeros(envs, bool))[0]) == over
        assert bool(infos.get("_final_obs", np.zeros(envs, bool))[0]) == over
        seen["lost"] += int(lost)
        if over:
            assert infos["episode"]["r"][0] == total
            assert infos["episode"]["l"][0] == length
            assert infos["episode"]["t"][0] > 0
            assert [*lives, 0] == [5, 4, 3, 2, 1, 0]
            emulator.start()
            lives, total, length = [int(infos["lives"][0])], 0.0, 0
            seen["over"] += 1
        elif lost:
            lives.append(int(infos["lives"][0]))
    vec.close()
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_breakout_equals_the_emulator(training: bool) -> None:
    seen = play(training, games=8, envs=2)
    assert seen["lost"] == 8 * 4 == seen["forced"]
    assert seen["over"] == 8


def test_training_learns_from_signs_but_reports_raw_returns() -> None:
    env_id = "SpaceInvadersNoFrameskip-v4"  # rewards of 5 and more
    train = make_vec(env_id, 2, seed=1, atari=NO_NOOPS)
    test = make_vec(env_id, 2, seed=1, training=False, atari=NO_NOOPS)
    train.reset()
    test.reset()
    rng = np.random.default_rng(0)
    total, over = np.zeros(2), np.zeros(2, bool)
    while not over.any():
        actions = rng.integers(0, 6, 2)
        _, clipped, _, _, infos = train.step(actions)
        _, raw, over, _, _ = test.step(actions)
        np.testing.assert_array_equal(clipped, np.sign(raw))
        total += raw
    assert total.min() >= 5
    np.testing.assert_array_equal(infos["_episode"], over)
    np.testing.assert_array_equal(infos["episode"]["r"][over], total[over])
    train.close()
    test.close()


def life_losses(settings: AtariSettings, steps: int) -> int:
    """Lost lives of a player that never acts."""
    with_noops = make_vec(BREAKOUT, 2, atari=settings)
    with_noops.reset()
    count = 0
    for _ in range(steps):
        _, _, terminated, _, _ = with_noops.step(np.zeros(2, np.int64))
        count += int(terminated.sum())
    with_noops.close()
    return count


def test_fire_launches_the_ball() -> None:
    assert life_losses(AtariSettings(num_threads=1), 110) >= 8
    assert life_losses(AtariSettings(num_threads=1, fire_after_life_loss=False), 110) == 2
    assert life_losses(AtariSettings(num_threads=1, fire_reset=False), 110) == 0


def test_life_loss_continues_the_game_or_ends_nothing() -> None:
    settings = AtariSettings(num_threads=1, life_loss_ends_return=False)
    vec = make_vec(BREAKOUT, 1, atari=settings)
    _, infos = vec.reset()
    forced = 0
    while infos["lives"][0] > 2:
        obs, _, terminated, _, infos = vec.step(np.zeros(1, np.int64))
        forced += int(infos["forced"][0])
        assert not terminated.any()
        assert (obs[0].reshape(4, -1).sum(1) > 0).all() or forced == 0  # the stack is not cleared
    assert forced == 2
    vec.close()


@pytest.mark.parametrize(("env_id", "fires"), [("FreewayNoFrameskip-v4", False), (BREAKOUT, True)])
def test_which_games_need_fire(env_id: str, fires: bool) -> None:
    vec = make_vec(env_id, 1, atari=NO_NOOPS)
    (games,) = vec.groups
    assert games._press_fire is fires
    vec.close()


def rollout(env_id: str, seed: int, settings: AtariSettings) -> bytes:
    vec = make_vec(env_id, 3, atari=settings)
    rng = np.random.default_rng(0)
    obs, _ = vec.reset(seed=seed)
    parts = [obs.tobytes()]
    for _ in range(60):
        obs, rewards, terminated, _, _ = vec.step(rng.integers(0, 4, 3))
        parts += [obs.tobytes(), rewards.tobytes(), terminated.tobytes()]
    vec.close()
    return b"".join(parts)


@pytest.mark.parametrize("env_id", [BREAKOUT, "ALE/Breakout-v5"])
def test_determinism(env_id: str) -> None:
    one = rollout(env_id, 3, AtariSettings(num_threads=1))
    assert one == rollout(env_id, 3, AtariSettings(num_threads=2))
    assert one != rollout(env_id, 4, AtariSettings(num_threads=1))


def test_seed_of_make_vec_is_that_of_the_first_reset_only() -> None:
    settings = AtariSettings(num_threads=1)
    vec = make_vec(BREAKOUT, 4, seed=9, atari=settings)
    first, again = vec.reset()[0], vec.reset()[0]
    explicit = vec.reset(seed=9)[0]
    np.testing.assert_array_equal(first, explicit)
    assert vec.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert (again != first).any()
    vec.close()


def test_sticky_comes_from_the_id_unless_set() -> None:
    assert describe(BREAKOUT)["sticky"] == 0.0
    assert describe("ALE/Breakout-v5")["sticky"] == 0.25
    assert describe("BreakoutNoFrameskip-v0")["sticky"] == 0.25
    assert describe("ALE/Breakout-v5", AtariSettings(sticky=0.0))["sticky"] == 0.0
    plain = rollout(BREAKOUT, 0, AtariSettings(num_threads=1))
    assert plain == rollout("ALE/Breakout-v5", 0, AtariSettings(num_threads=1, sticky=0))
    assert plain != rollout("ALE/Breakout-v5", 0, AtariSettings(num_threads=1))


def test_description_says_what_training_does() -> None:
    facts = describe("ALE/SpaceInvaders-v5", training=True)
    assert facts["game"] == "space_invaders"
    assert facts["autoreset_mode"] == "SameStep"
    assert facts["clip_reward"] is True
    evaluation = describe("ALE/SpaceInvaders-v5", training=False)
    assert evaluation["clip_reward"] is False
    assert evaluation["life_loss_ends_return"] is False


def test_time_limit_truncates_with_final_observation() -> None:
    short = make_vec(BREAKOUT, 2, atari=AtariSettings(noop_max=0, max_frames=40, num_threads=1))
    long = make_vec(BREAKOUT, 2, atari=NO_NOOPS)
    short.reset(seed=0)
    long.reset(seed=0)
    for step in range(1, 11):
        obs, _, terminated, truncated, infos = short.step(np.zeros(2, np.int64))
        expected = long.step(np.zeros(2, np.int64))[0]
        assert not terminated.any()
        assert (truncated == (step == 10)).all()
    assert infos["_final_obs"].all()
    assert infos["_episode"].all()
    assert (infos["episode"]["l"] == 10).all()
    # ale-py draws the very last frame of a truncated game from an incomplete pair of screens.
    np.testing.assert_array_equal(infos["final_obs"][:, :3], expected[:, :3])
    assert (obs[:, :3] == 0).all()  # a new game: only the newest frame is filled
    short.close()
    long.close()


def test_single_game_equals_evaluation_and_renders_the_screen() -> None:
    vec = make_vec("ALE/Breakout-v5", 2, training=False, atari=NO_NOOPS)
    single = make_single("ALE/Breakout-v5", atari=NO_NOOPS)
    expected, _ = vec.reset(seed=4)
    obs, info = single.reset(seed=4)
    np.testing.assert_array_equal(obs, expected[0])
    rng = np.random.default_rng(2)
    over, forced = False, 0
    while not over:
        action = int(rng.integers(4))
        expected, rewards, terminated, truncated, infos = vec.step(np.array([action, 0]))
        obs, reward, ended, cut, info = single.step(action)
        over = ended or cut
        np.testing.assert_array_equal(obs, (infos["final_obs"] if over else expected)[0])
        assert (reward, ended, cut) == (rewards[0], terminated[0], truncated[0])
        assert info["forced"] == infos["forced"][0]
        forced += info["forced"]
    assert forced == 4
    with pytest.raises(EnvFault, match="reset"):
        single.step(0)
    vec.close()
    single.close()
    single.close()


def test_rendered_frames_are_the_emulators() -> None:
    single = make_single(BREAKOUT, atari=NO_NOOPS)
    emulator = Emulator(env_seeds(0, 1)[0])
    single.reset(seed=0)
    rng = np.random.default_rng(3)
    for _ in range(40):
        action = int(rng.integers(4))
        single.step(action)
        emulator.step(action)
        frame = single.render()
        np.testing.assert_array_equal(frame, emulator.screen)
    assert single.metadata["render_fps"] == 15
    single.close()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.array([0, 4]), "action 4 of environment 1 is not in range"),
        (np.array([-1, 0]), "action -1 of environment 0"),
        (np.array([0]), r"shape \(2,\)"),
        (np.array([0.0, 1.0]), "must be integers, got float64"),
    ],
)
def test_invalid_actions_do_not_reach_the_emulator(actions: object, message: str) -> None:
    vec = make_vec(BREAKOUT, 2, atari=NO_NOOPS)
    vec.reset()
    with pytest.raises(EnvFault, match=message):
        vec.step(actions)
    vec.step(np.array([0, 3], np.int32))  # still usable
    vec.close()
    vec.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frame_skip", 0),
        ("frame_skip", True),
        ("frame_skip", 4.0),
        ("screen_size", 0),
        ("frame_stack", 0),
        ("noop_max", -1),
        ("sticky", 1.5),
        ("sticky", 1.0),
        ("sticky", -0.1),
        ("sticky", float("nan")),
        ("sticky", "0.25"),
        ("max_frames", 0),
        ("max_frames", 2**31),
        ("num_threads", -1),
        ("num_groups", 0),
        ("clip_reward", 1),
        ("fire_reset", None),
    ],
)
def test_bad_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(EnvError, match=f"atari.{name} must be .*, got") as caught:
        AtariSettings(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_envs", [0, -1, 1.0, True, 10**9])
@pytest.mark.parametrize("env_id", [BREAKOUT, "CartPole-v1"])
def test_bad_num_envs(env_id: str, num_envs: object) -> None:
    with pytest.raises(EnvError, match="num_envs must be an integer from 1"):
        make_vec(env_id, num_envs)


@pytest.mark.parametrize("env_id", [BREAKOUT, "CartPole-v1"])
def test_bad_seeds(env_id: str) -> None:
    with pytest.raises(EnvError, match=r"seed must be .*, got -1"):
        make_vec(env_id, 1, seed=-1)
    vec = make_vec(env_id, 1)
    with pytest.raises(EnvError, match=r"seed must be .*, got 4294967296"):
        vec.reset(seed=2**32)
    vec.reset(seed=2**32 - 1)
    vec.close()


def test_damaged_or_missing_rom_is_refused(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    with pytest.raises(EnvError, match=f"ROM of {BREAKOUT} cannot be used"):
        make_vec(BREAKOUT, 1)


def test_registered_game_that_is_no_rom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lookup(BREAKOUT).kwargs, "game", "nosuchgame")
    with pytest.raises(EnvError, match="'nosuchgame'"):
        make_vec(BREAKOUT, 1)


def test_atari_cannot_be_rendered_in_parallel() -> None:
    with pytest.raises(EnvError, match="single"):
        make_vec(BREAKOUT, 1, render_mode="rgb_array")
    with pytest.raises(EnvError, match="'rgb_array', got 'human'"):
        make_single(BREAKOUT, render_mode="human")


def test_the_log_of_actions_is_in_one_piece() -> None:
    """Small objects that stay among large ones that go keep memory from being used again."""
    log = GameLog(4, None, 10_000)
    log.begin(np.ones(4, bool), np.arange(4))
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        for number in range(1000):
            log.add(np.full(4, number % 5), np.zeros(4, bool))
        grown = tracemalloc.take_snapshot().compare_to(before, "filename")
    finally:
        tracemalloc.stop()
    assert sum(each.count_diff for each in grown) < 50
    assert log.state_dict()["actions"][:6].tolist() == [[k % 5] * 4 for k in range(6)]
