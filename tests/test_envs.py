import warnings

import cloudpickle
import gymnasium
import pytest
from environments import CountingEnv, Recorder
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from ppo.envs import make_env, resolve_env
from ppo.errors import EnvCreationError, PPOError


def make_all(source):
    envs = [factory() for factory in source.factories]
    assert all(isinstance(env, gymnasium.Env) for env in envs)
    for env in envs:
        env.close()
    return envs


# --- ids


def test_an_id_gives_as_many_environments_as_asked():
    source = resolve_env("CartPole-v1", 3)
    envs = make_all(source)
    assert len(envs) == len(set(map(id, envs))) == 3
    assert {env.spec.id for env in envs} == {"CartPole-v1"}
    assert source.copyable
    assert source.instance is source.vector is None


def test_env_kwargs_reach_the_environment():
    source = resolve_env("Pendulum-v1", 2, env_kwargs={"g": 3.5, "max_episode_steps": 7})
    for env in make_all(source):
        assert env.unwrapped.g == 3.5
        assert env.spec.max_episode_steps == 7


def test_the_factory_of_an_id_works_where_the_id_was_never_registered():
    """A worker started by spawn has not run the script that registered it."""
    gymnasium.register("RegisteredByAScript-v0", entry_point=CountingEnv, max_episode_steps=5)
    try:
        (factory,) = resolve_env("RegisteredByAScript-v0", 1, env_kwargs={"length": 3}).factories
        sent = cloudpickle.dumps(factory)
    finally:
        del gymnasium.registry["RegisteredByAScript-v0"]
    env = cloudpickle.loads(sent)()
    assert env.unwrapped.length == 3
    assert env.spec.max_episode_steps == 5


def test_env_kwargs_without_an_id_are_refused():
    for env in (CountingEnv, CountingEnv(), [CountingEnv]):
        with pytest.raises(ValueError, match="env_kwargs are for environment ids"):
            resolve_env(env, 1, env_kwargs={"length": 3})


@pytest.mark.parametrize(
    "env_id", ["CartPoel-v1", "CartPole-v99", "no_such_module:Env-v0", "", "not an id!"]
)
def test_a_wrong_id_is_an_error_at_the_door(env_id):
    with pytest.raises(EnvCreationError, match=f"unknown environment id '{env_id}'"):
        resolve_env(env_id, 1)


@pytest.mark.parametrize("env_id", ["CartPoel-v1", "no_such_module:Env-v0"])
def test_a_wrong_id_cannot_be_made(env_id):
    with pytest.raises(EnvCreationError, match=f"'{env_id}'.*registered"):
        make_env(env_id)


def test_a_wrong_keyword_is_named():
    with pytest.raises(EnvCreationError, match=r"'CartPole-v1' does not take .*'gravitas': 3"):
        make_env("CartPole-v1", {"gravitas": 3})


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        ('Box2D is not installed, run `pip install "gymnasium[box2d]"`', "box2d"),
        ('MuJoCo is not installed, run `pip install "gymnasium[mujoco]"`', "mujoco"),
    ],
)
def test_a_missing_dependency_is_named_together_with_our_extra(monkeypatch, text, extra):
    def make(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled(text)

    monkeypatch.setattr(gymnasium, "make", make)
    with pytest.raises(EnvCreationError, match=rf"pip install 'ppo-gae\[{extra}\]'") as caught:
        make_env("LunarLander-v3")
    assert "pip install 'ppo'" not in str(caught.value)


def test_an_unknown_missing_dependency_keeps_the_words_of_its_environment(monkeypatch):
    def make(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("please install frobnicate")

    monkeypatch.setattr(gymnasium, "make", make)
    with pytest.raises(EnvCreationError, match="please install frobnicate"):
        make_env("CartPole-v1")


# --- factories


def test_a_factory_is_called_once_per_environment():
    source = resolve_env(lambda: CountingEnv(7), 4)
    assert [env.length for env in make_all(source)] == [7] * 4


def test_a_class_is_a_factory():
    assert len(make_all(resolve_env(CountingEnv, 2))) == 2


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_brings_its_own_number_and_order(kind):
    factories = kind([lambda: CountingEnv(1), lambda: CountingEnv(2), lambda: CountingEnv(3)])
    source = resolve_env(factories, 8)
    assert [env.length for env in make_all(source)] == [1, 2, 3]


@pytest.mark.parametrize(
    "envs",
    [[], [CountingEnv()], ["CartPole-v1", "CartPole-v1"], [CountingEnv, None]],
    ids=["nothing", "environment", "names", "none"],
)
def test_a_list_must_hold_factories(envs):
    with pytest.raises(TypeError, match="must hold factories"):
        resolve_env(envs, 1)


@pytest.mark.parametrize("env", [None, 3, 2.5, {"id": "CartPole-v1"}, b"CartPole-v1"], ids=str)
def test_what_is_no_environment_is_refused_by_type(env):
    with pytest.raises(TypeError):
        resolve_env(env, 1)


@pytest.mark.parametrize("num_envs", [0, -1])
def test_there_is_at_least_one_environment(num_envs):
    with pytest.raises(ValueError, match=r"num_envs.*at least 1"):
        resolve_env("CartPole-v1", num_envs)


# --- instances


def test_an_instance_with_a_spec_is_copied_with_its_settings_and_wrappers():
    env = gymnasium.wrappers.ClipReward(gymnasium.make("Pendulum-v1", g=2.0), -1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = resolve_env(env, 3)
    assert source.instance is env
    assert source.copyable
    copies = make_all(source)
    assert all(copy is not env for copy in copies)
    assert {copy.unwrapped.g for copy in copies} == {2.0}
    assert all(isinstance(copy, gymnasium.wrappers.ClipReward) for copy in copies)
    env.close()


def unrebuildable():
    class Custom(gymnasium.Wrapper):
        """Without a record of its arguments, no spec can rebuild it."""

    return Custom(gymnasium.make("CartPole-v1"))


@pytest.mark.parametrize("make", [CountingEnv, unrebuildable])
def test_an_instance_that_cannot_be_copied_is_alone_and_that_is_said_once(make):
    env = make()
    with pytest.warns(UserWarning, match="num_envs is 1, not 8.* factory") as caught:
        source = resolve_env(env, 8)
    assert len(caught) == 1
    assert len(source.factories) == 1
    assert source.factories[0]() is env
    assert not source.copyable
    env.close()


def test_nothing_is_said_where_one_environment_is_what_was_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(resolve_env(CountingEnv(), 1).factories) == 1


def test_resolving_neither_makes_nor_closes_an_environment():
    def factory():
        raise AssertionError("made too early")

    resolve_env(factory, 3)
    env = Recorder(CountingEnv())
    resolve_env(env, 1)
    assert env.closed == 0
    assert env.seeds == []


# --- vector environments


def sync(mode, count=2):
    return SyncVectorEnv([CountingEnv] * count, autoreset_mode=mode)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_autoreset_mode_is_read_from_the_metadata(mode):
    env = sync(mode)
    source = resolve_env(env, 8)
    assert source.vector is env
    assert source.autoreset_mode is mode
    assert source.factories == ()


def silent_vector_env():
    env = sync(AutoresetMode.SAME_STEP)
    env.metadata = {}
    return env


def test_a_vector_environment_that_says_nothing_is_an_error_that_names_the_argument():
    with pytest.raises(EnvCreationError, match="pass autoreset_mode='next_step', 'same_step'"):
        resolve_env(silent_vector_env(), 2)


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ("next_step", AutoresetMode.NEXT_STEP),
        ("same_step", AutoresetMode.SAME_STEP),
        ("disabled", AutoresetMode.DISABLED),
        ("SameStep", AutoresetMode.SAME_STEP),
        (AutoresetMode.DISABLED, AutoresetMode.DISABLED),
    ],
)
def test_the_argument_speaks_where_the_metadata_are_silent(given, mode):
    assert resolve_env(silent_vector_env(), 2, autoreset_mode=given).autoreset_mode is mode


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(PPOError, match="'next_step', 'same_step' or 'disabled', got 'later'"):
        resolve_env(silent_vector_env(), 2, autoreset_mode="later")


def test_a_mode_that_contradicts_the_metadata_is_refused():
    with pytest.raises((ValueError, PPOError), match="autoreset_mode"):
        resolve_env(sync(AutoresetMode.SAME_STEP), 2, autoreset_mode="next_step")


def test_the_metadata_may_name_the_mode_as_text():
    env = sync(AutoresetMode.SAME_STEP)
    env.metadata = {"autoreset_mode": "NextStep"}
    assert resolve_env(env, 2).autoreset_mode is AutoresetMode.NEXT_STEP
