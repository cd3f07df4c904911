import dataclasses
import json
import math
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from environments import CountingEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo import Constant, EncoderConfig, Linear, PolicyConfig, PPOAgent, PPOConfig, PPOError
from ppo.config import tuned_names
from ppo.errors import ConfigError, EnvCreationError


@pytest.fixture
def read(tmp_path):
    """Read a configuration from its text."""
    path = tmp_path / "run.yaml"

    def read(text, *overrides):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return PPOConfig.from_yaml(path, overrides)

    return read


def refused(read, text, *overrides, match=None):
    """The message with which it is refused; it names the file once, if at all."""
    with pytest.raises(ConfigError, match=match) as caught:
        read(text, *overrides)
    assert str(caught.value).count("run.yaml") <= 1, str(caught.value)
    return str(caught.value)


# The object


def test_settings_cannot_be_assigned():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().gamma = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().policy.shared = True


def test_settings_cannot_be_changed_from_behind():
    kwargs = {"a": 1}
    config = PPOConfig(env_kwargs=kwargs)
    kwargs["a"] = 2
    assert config.env_kwargs == {"a": 1}


def test_settings_are_given_by_name():
    with pytest.raises(TypeError):
        PPOConfig("CartPole-v1")
    with pytest.raises(TypeError):
        PolicyConfig((64, 64))


def test_a_config_error_is_a_value_error_of_the_library():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, PPOError)


# Whatever is wrong about a value: too small, too large, not a number, of another type.
WRONG = {
    "env": [3, b"CartPole-v1", ["CartPole-v1"]],
    "env_kwargs": [None, "x", [1], 3],
    "wrappers": [None, "FlattenObservation", 3, ["NoSuchWrapper"], [3], [{"ClipReward": 3}]],
    "steps": [0, -1, 1.5, "10", True, math.nan, math.inf],
    "num_envs": [0, -1, 2.5, "8", None, True, math.nan, math.inf],
    "step_timeout": [0, -1.0, "3", math.nan, math.inf],
    "num_workers": [-1, 0.5, "0", None, True],
    "num_steps": [0, -1, 2.5, "8", None],
    "num_epochs": [0, -1, 2.5, "8", None],
    "minibatch_size": [0, -1, 2.5, "8", None],
    "learning_rate": [-1e-3, "3e-4", None, True, math.nan, math.inf, {"linear": [-1, 0]}],
    "learning_rates": [None, 1e-3, [1e-3], {"critic": "3e-4"}, {"critic": -1e-3}, {"critic": None}],
    "adaptive_kl": [0, -0.1, "0.01", math.nan],
    "optimizer": [
        None,
        3,
        "Adamm",
        "sgd",
        "LBFGS",
        "SparseAdam",
        "Optimizer",
        "lr_scheduler",
    ],
    "optimizer_kwargs": [None, 3, {"eps": 1e-5}],
    "weight_decay": [-0.1, "0.1", None, math.nan, math.inf],
    "adam_eps": [0.0, -1e-5, "1e-5", None, math.nan, math.inf],
    "gamma": [-0.1, 1.1, "0.9", None, True, math.nan],
    "gae_lambda": [-0.1, 1.1, "0.9", None, True, math.nan],
    "clip_range": [-0.1, "0.2", None, math.nan, {"linear": [0.2, -0.1]}, {"cosine": [1, 0]}],
    "clip_range_high": [-0.1, "0.2", math.nan, {"linear": [0.2, -0.1]}],
    "dual_clip": [1, 0.5, "3", math.nan, math.inf],
    "recompute_advantages": ["no", None, 1],
    "value_clip_range": [0, -0.1, "0.2", math.nan],
    "value_coef": [-0.1, "0.5", None, math.nan, math.inf],
    "entropy_coef": ["0.0", None, math.nan, math.inf, {"linear": [1]}, {}],
    "max_grad_norm": [0.0, -1.0, "0.5", None, math.nan],
    "target_kl": [0, -0.1, "0.01", math.nan],
    "normalize_advantages": ["batch", None, True],
    "normalize_rewards": ["false", None, 0, 1],
    "policy": ["mlp", None, 3, PolicyConfig, {"hiden_sizes": [3]}],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_an_error_that_names_the_setting(name, value):
    nested = "hidden_sizes" if isinstance(value, dict) and name == "policy" else name
    with pytest.raises(ConfigError, match=nested):
        PPOConfig(**{name: value})
    with pytest.raises(ConfigError, match=nested):
        PPOConfig().replace(**{name: value})


WRONG_POLICY = {
    "hidden_sizes": [64, "64", None, (0,), (-3,), (2.5,), ("64",), (True,)],
    "activation": ["Tanh", "swish", None, 3],
    "shared": ["no", None, 1],
    "cnn_features": [0, -1, 2.5, "512", None],
    "memory": ["rnn", True],
    "memory_size": [0, 2.5],
    "distribution": ["gauss", None],
    "log_std_init": [9.0, -9.0, math.nan, "0"],
    "log_std_min": [1.0, math.nan],
    "log_std_max": [-1.0, math.nan],
    "output_gain": [0.0, -1.0, "1", math.nan, math.inf],
    "normalize_observations": ["no", None, 1],
    "observation_clip": [0.0, -1.0, "10", math.nan],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_POLICY.items() for value in values]
)
def test_a_wrong_value_of_the_policy_is_an_error_that_names_the_setting(name, value):
    with pytest.raises(ConfigError, match=name):
        PolicyConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 0),
        ("gamma", 1),
        ("gae_lambda", 0.0),
        ("num_envs", 1),
        ("num_envs", np.int64(3)),
        ("gamma", np.float32(0.5)),
        ("clip_range", 0),
        ("value_coef", 0),
        ("max_grad_norm", math.inf),
        ("entropy_coef", -0.01),
        ("learning_rate", 0.0),
        ("target_kl", None),
        ("adaptive_kl", None),
        ("dual_clip", 1.001),
        ("clip_range_high", 0),
        ("clip_range_high", None),
        ("learning_rates", {}),
        ("learning_rates", {"critic": 0.0}),
        ("optimizer", "RMSprop"),
        ("env_kwargs", {}),
        ("wrappers", []),
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(name, value):
    assert PPOConfig(**{name: value}) == PPOConfig().replace(**{name: value})
    assert PPOConfig.from_dict({name: value}) == PPOConfig(**{name: value})


def test_schedules_come_as_numbers_objects_or_mappings():
    for value in (0.1, Constant(0.1), {"constant": 0.1}):
        assert PPOConfig(learning_rate=value).learning_rate == Constant(0.1)
    for value in (Linear(0.1, 0.0), {"linear": [0.1, 0]}, {"linear": (0.1, 0.0)}):
        assert PPOConfig(clip_range=value).clip_range == Linear(0.1, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PolicyConfig(memory="rnn"), "memory must be one of [...], got 'rnn'"),
        (
            lambda: PPOConfig(num_workers="all"),
            "num_workers must be [...] 'all' (or one of ['auto'])",
        ),
    ],
)
def test_the_words_that_a_setting_may_be_are_named_once(make, message):
    pattern = re.escape(message).replace(re.escape("[...]"), ".*")
    with pytest.raises(ConfigError, match=f"^{pattern}$"):
        make()


def test_the_nearest_optimizer_is_offered():
    for wrong, nearest in [
        ("Adamm", "Adam"),
        ("RMSProp", "RMSprop"),
        ("Sgd", "SGD"),
        ("adamw", "AdamW"),
    ]:
        with pytest.raises(ConfigError, match=f"unknown optimizer '{wrong}'.*'{nearest}"):
            PPOConfig(optimizer=wrong)
    with pytest.raises(ConfigError, match=r"known are .*RMSprop"):
        PPOConfig(optimizer="zzz")


def test_settings_of_one_optimizer_are_not_given_to_another():
    assert PPOConfig(optimizer="AdamW", optimizer_kwargs={"weight_decay": 0.1}).weight_decay == 0.0
    with pytest.raises(ConfigError, match=r"weight_decay must be 0 .*optimizer_kwargs"):
        PPOConfig(optimizer="SGD", weight_decay=0.1)
    with pytest.raises(ConfigError, match="optimizer_kwargs must be empty for adam"):
        PPOConfig(optimizer_kwargs={"momentum": 0.9})
    with pytest.raises(ConfigError, match=r"optimizer_kwargs do not fit SGD: .*momentun"):
        PPOConfig(optimizer="SGD", optimizer_kwargs={"momentun": 0.9})


def test_what_the_schedules_say_is_asked_for_in_one_call():
    config = PPOConfig(
        learning_rate=Linear(1.0, 0.0),
        learning_rates={"critic": Linear(2.0, 0.0)},
        clip_range=0.2,
        clip_range_high=Linear(0.4, 0.2),
        entropy_coef=Linear(0.0, 0.1),
    )
    assert config.at(0.5) == {
        "learning_rate": 0.5,
        "learning_rates": {"critic": 1.0},
        "clip_range": 0.2,
        "clip_range_high": pytest.approx(0.3),
        "entropy_coef": 0.05,
    }
    assert PPOConfig().at(1.0)["clip_range_high"] is None


def test_the_rates_of_groups_are_the_configs_own():
    rates = {"critic": 1e-3}
    config = PPOConfig(learning_rates=rates)
    rates["critic"] = 5.0
    assert config.learning_rates == {"critic": Constant(1e-3)}


def test_the_policy_comes_as_object_or_mapping():
    assert PPOConfig(policy={"shared": True}).policy == PolicyConfig(shared=True)


def test_replace_changes_what_it_is_told_and_nothing_else():
    config = PPOConfig(gamma=0.9)
    other = config.replace(num_envs=3)
    assert (other.gamma, other.num_envs, config.num_envs) == (0.9, 3, 8)
    assert other.replace(num_envs=8) == config


@pytest.mark.parametrize(
    ("make", "name", "nearest"),
    [
        (PPOConfig, "gama", "gamma"),
        (PPOConfig().replace, "gama", "gamma"),
        (PPOConfig, "n_steps", "num_steps"),  # as other libraries call it
        (PPOConfig, "hidden_size", "policy.hidden_sizes"),
        (PPOConfig, "log_std_init", "policy.log_std_init"),
        (PolicyConfig, "hiden_sizes", "hidden_sizes"),
        (EncoderConfig, "feature", "features"),
    ],
)
@pytest.mark.parametrize("kind", [ConfigError, TypeError])  # what a caller might catch
def test_an_unknown_argument_is_answered_with_the_nearest(make, name, nearest, kind):
    with pytest.raises(kind, match=f"unknown setting '{name}'; did you mean '{nearest}'"):
        make(**{name: 0.9})


# From a file


def test_every_setting_can_be_written_in_a_file(read):
    text = """
# A comment.
env: CartPole-v1
env_kwargs: {sutton_barto_reward: true, render_mode: null}
wrappers:
  - FlattenObservation
  - TimeLimit: {max_episode_steps: 20}
steps: 1e6
num_envs: 010
num_workers: 2
num_steps: 1_000
num_epochs: 4
minibatch_size: 1e2
learning_rate: {linear: [3e-4, 0]}
learning_rates: {critic: {linear: [1e-3, 0]}, actor: 3e-4}
adaptive_kl: 1e-2
adam_eps: 1e-8
weight_decay: 1e-2
gamma: .9
gae_lambda: 1
clip_range: {linear: [2e-1, 1e-1]}
clip_range_high: 3e-1
dual_clip: 3
value_clip_range: 0.2
value_coef: 1
entropy_coef: 1e-2
max_grad_norm: 5.
target_kl: 1.5e-2
recompute_advantages: true
normalize_advantages: none
normalize_rewards: false
policy:
  hidden_sizes: [256, 1_28]
  activation: relu
  shared: True
  memory: null
  distribution: gaussian
  log_std_init: -1
"""
    assert read(text) == PPOConfig(
        env="CartPole-v1",
        env_kwargs={"sutton_barto_reward": True, "render_mode": None},
        wrappers=["FlattenObservation", {"TimeLimit": {"max_episode_steps": 20}}],
        steps=1_000_000,
        num_envs=10,
        num_workers=2,
        num_steps=1000,
        num_epochs=4,
        minibatch_size=100,
        learning_rate=Linear(3e-4, 0.0),
        learning_rates={"critic": Linear(1e-3, 0.0), "actor": Constant(3e-4)},
        adaptive_kl=0.01,
        adam_eps=1e-8,
        weight_decay=0.01,
        gamma=0.9,
        gae_lambda=1.0,
        clip_range=Linear(0.2, 0.1),
        clip_range_high=Constant(0.3),
        dual_clip=3.0,
        value_clip_range=0.2,
        value_coef=1.0,
        entropy_coef=0.01,
        max_grad_norm=5.0,
        target_kl=0.015,
        recompute_advantages=True,
        normalize_advantages="none",
        normalize_rewards=False,
        policy=PolicyConfig(
            hidden_sizes=(256, 128), activation="relu", shared=True, log_std_init=-1.0
        ),
    )


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "---\n", "\ufeffgamma: 0.99\n"])
def test_a_file_that_sets_nothing_gives_the_defaults(read, text):
    assert read(text) == PPOConfig()


def test_numbers_have_the_type_of_their_setting(read):
    config = read("num_envs: 1e1\ngamma: 1\nsteps: 100_000\nlearning_rate: 3e-4")
    assert (config.num_envs, type(config.num_envs)) == (10, int)
    assert (config.gamma, type(config.gamma)) == (1.0, float)
    assert (config.steps, type(config.steps)) == (100_000, int)
    assert config.learning_rate == Constant(3e-4)


@pytest.mark.parametrize("word", ["null", "~", "Null", "none", ""])
def test_an_optional_setting_is_switched_off(read, word):
    assert read(f"target_kl: {word}").target_kl is None


def test_environment_arguments_keep_the_type_they_are_written_in(read):
    text = """
env_kwargs:
  whole: 3
  real: -10.0
  small: 1e-3
  yes: true
  nothing: null
  word: human
  quoted: '3'
  long: "true"
  octal: 010
  list: [1, 2.5, a, [false]]
  group: {deep: {er: 1}}
"""
    wanted = {
        "whole": 3,
        "real": -10.0,
        "small": 1e-3,
        "yes": True,
        "nothing": None,
        "word": "human",
        "quoted": "3",
        "long": "true",
        "octal": 10,
        "list": [1, 2.5, "a", [False]],
        "group": {"deep": {"er": 1}},
    }
    kwargs = read(text).env_kwargs
    assert kwargs == wanted
    assert {name: type(value) for name, value in kwargs.items()} == {
        name: type(value) for name, value in wanted.items()
    }


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("gamma: 0.9\n\nnum_env: 3", 3, ["'num_env'", "'num_envs'"]),
        ("gamma: 0.9\nlambda: 0.9", 2, ["'lambda'", "'gae_lambda'"]),
        ("gamma: 0.9\nzzz: 0.9", 2, ["'zzz'", "gae_lambda"]),
        ("gamma: 0.9\nGamma: 0.9", 2, ["'Gamma'", "'gamma'"]),
        ("policy:\n  shared: true\n  hiden_sizes: [3]", 3, ["'hiden_sizes'", "'hidden_sizes'"]),
        ("gamma: 0.9\nnum_envs: 3\ngamma: 0.9", 3, ["'gamma'", "twice"]),
        ("policy:\n  shared: true\n  shared: true", 3, ["'shared'", "twice"]),
        ("'gamma': 0.9\ngamma: 0.9", 2, ["'gamma'", "twice"]),
        ("env_kwargs:\n  a: 1\n  a: 2", 3, ["'a'", "twice"]),
        ("gamma: 0.9\nnum_envs: many", 2, ["num_envs", "many"]),
        ("\ngamma: '0.9'", 2, ["gamma", "0.9"]),
        ("\ngamma: [0.9]", 2, ["gamma", "0.9"]),
        ("\ngamma: {a: 0.9}", 2, ["gamma", "0.9"]),
        ("\ngamma:", 2, ["gamma"]),
        ("\ngamma: nan", 2, ["gamma", "nan"]),
        ("\ngamma: .nan", 2, ["gamma", "nan"]),
        ("\nnum_envs: 2.5", 2, ["num_envs", "2.5"]),
        ("\nnum_envs: 1e400", 2, ["num_envs", "1e400"]),
        ("\nnum_envs: 0x10", 2, ["num_envs", "0x10"]),
        ("\nnum_envs: 1:30", 2, ["num_envs", "1:30"]),
        ("\nnum_envs: 1__0", 2, ["num_envs", "1__0"]),
        ("\nnum_envs: 10_", 2, ["num_envs", "10_"]),
        ("\nnum_envs: true", 2, ["num_envs", "true"]),
        ("\nnum_envs: 8 # eight\nnum_steps: 8 9", 3, ["num_steps", "8 9"]),
        ("\nnormalize_rewards: on", 2, ["normalize_rewards", "on", "true or false"]),
        ("\nnormalize_rewards: yes", 2, ["normalize_rewards", "yes"]),
        ("\nnormalize_rewards: 1", 2, ["normalize_rewards", "1"]),
        ("\nnormalize_rewards: 'true'", 2, ["normalize_rewards"]),
        ("\nnormalize_advantages: batch", 2, ["normalize_advantages", "rollout", "batch"]),
        ("gamma: 1\nlearning_rates: {critic: fast}", 2, ["learning_rates.critic", "fast"]),
        ("gamma: 1\nlearning_rates: {critic: -1}", 2, ["learning_rates", "0 or more"]),
        ("gamma: 1\noptimizer: Adagrat", 2, ["'Adagrat'", "'Adagrad'"]),
        ("gamma: 1\ntarget_kl: off", 2, ["target_kl", "off"]),
        ("gamma: 1\nenv: [CartPole-v1]", 2, ["env", "CartPole-v1"]),
        ("gamma: 1\nenv_kwargs: [1]", 2, ["env_kwargs"]),
        ("gamma: 1\nwrappers: FlattenObservation", 2, ["wrappers"]),
        ("gamma: 1\nwrappers: [NoSuchWrapper]", 2, ["NoSuchWrapper"]),
        ("gamma: 1\npolicy: mlp", 2, ["policy", "mlp"]),
        ("gamma: 1\npolicy: [shared]", 2, ["policy"]),
        ("policy:\n\n  hidden_sizes: 64", 3, ["hidden_sizes", "64"]),
        ("policy:\n\n  hidden_sizes: [64, x]", 3, ["hidden_sizes", "x"]),
        ("policy:\n  activation: tanh\n  memory: rnn", 3, ["memory", "rnn"]),
        ("policy:\n  activation: swish", 2, ["activation", "swish", "tanh"]),
        ("policy:\n  log_std_min: -1\n  log_std_init: -2", 3, ["log_std_init", "-2"]),
        ("gamma: 0.9\ngae_lambda: 1.5", 2, ["gae_lambda", "[0, 1]", "1.5"]),
        ("gamma: 0.9\nnum_envs: 0", 2, ["num_envs", "at least 1", "0"]),
        ("gamma: 0.9\nlearning_rate: -1", 2, ["learning_rate", "-1"]),
        ("gamma: 0.9\nlearning_rate: '3e-4'", 2, ["learning_rate", "3e-4"]),
        ("gamma: 0.9\nlearning_rate: {linear: [1e-3, x]}", 2, ["learning_rate", "x"]),
        ("gamma: 0.9\nlearning_rate: {linear: 1e-3}", 2, ["learning_rate", "linear"]),
        ("gamma: 0.9\nlearning_rate: {linear: [1, 2, 3]}", 2, ["learning_rate", "linear"]),
        ("gamma: 0.9\nlearning_rate: {linar: [1, 2]}", 2, ["learning_rate", "linear"]),
        ("gamma: 0.9\nlearning_rate: [1e-3, 0]", 2, ["learning_rate"]),
        ("gamma: 0.9\nclip_range: {linear: [0.1, -0.1]}", 2, ["clip_range"]),
        ("gamma: 0.9\n? [a, b]\n: 3", 2, ["key"]),
        ("gamma: 0.9\n~: 3", 2, ["'~'"]),
        ("gamma: 0.9\n3: 3", 2, ["'3'"]),
        ("gamma: 0.9\n<<: {num_envs: 3}", 2, ["<<"]),
    ],
)
def test_a_mistake_in_a_file_is_shown_with_file_line_and_remedy(read, text, line, words):
    message = refused(read, text)
    assert re.search(rf"run\.yaml:{line}\b", message), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "text",
    [
        "- gamma",
        "gamma",
        "3",
        "gamma: [1",
        "gamma: 1\n num_envs: 3",
        "gamma: a: b",
        "gamma: 0.9\n---\nnum_envs: 3",
        "gamma: *nowhere",
        "gamma: 0.9\x00",
        b"\xff\xfegamma",
        b"env: \xe9",
        "\tgamma: 1",
        "gamma: %",
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_by_name(read, text):
    assert "run.yaml" in refused(read, text)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "missing.yaml", str(tmp_path / "missing.yaml"), tmp_path):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            PPOConfig.from_yaml(path)


def test_a_folder_with_spaces_is_no_trouble(tmp_path):
    folder = tmp_path / "my runs: new"
    folder.mkdir()
    path = folder / "run.yaml"
    for text in ("policy:\n  hiden_sizes: [3]", "policy:\n  memory: rnn", "policy: {shared: 1}"):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            PPOConfig.from_yaml(path)
        assert str(caught.value).count(str(path)) == 1


TAGS = [
    "!!python/object/apply:os.system [echo hacked]",
    "!!python/object:ppo.PPOConfig {}",
    "!!python/name:os.system",
    "!!python/name:os.system X",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!custom 3",
    "!<tag:example.com,2000:x> 3",
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("key", ["env", "gamma", "env_kwargs", "policy"])
def test_tags_are_refused_and_run_nothing(read, tag, key, monkeypatch):
    monkeypatch.setattr("os.system", lambda command: pytest.fail(command))
    assert "run.yaml:2" in refused(read, f"num_envs: 3\n{key}: {tag}", match="tags are not")
    refused(read, "", f"{key}={tag}", match="tags are not")


def test_an_anchor_is_a_copy(read):
    config = read("policy: {hidden_sizes: &sizes [3, 4]}\nenv_kwargs: {sizes: *sizes}")
    assert config.policy.hidden_sizes == (3, 4)
    assert config.env_kwargs == {"sizes": [3, 4]}


@pytest.mark.parametrize(
    "text",
    [
        "env_kwargs: &loop {again: *loop}",
        "env_kwargs: &loop {list: [*loop]}",
        "wrappers: &loop [*loop]",
        "&loop policy: {x: *loop}",
        "[" * 5_000,
        "env_kwargs: " + "{a: " * 5_000 + "1" + "}" * 5_000,
        "gamma: " + "[" * 5_000 + "]" * 5_000,
    ],
    ids=["mapping", "list", "root list", "key", "unclosed", "deep", "deep list"],
)
def test_endless_and_bottomless_files_are_refused(read, text):
    refused(read, text)


def test_a_file_that_unfolds_to_a_million_values_is_refused(read):
    # One level more is ten times as many; the file itself has seven lines.
    lines = ["env_kwargs:", "  a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 6)]
    refused(read, "\n".join(lines))


@pytest.mark.parametrize("key", ["steps", "num_envs", "gamma", "learning_rate"])
@pytest.mark.parametrize("digits", [30, 400, 5_000])
def test_numbers_beyond_reason_are_refused_or_kept_exactly(read, key, digits):
    number = "9" * digits
    if key in ("steps", "num_envs") and digits <= 400:
        assert getattr(read(f"{key}: {number}"), key) == int(number)
    elif key == "learning_rate" and digits == 30:
        assert read(f"{key}: {number}").learning_rate == Constant(1e30)
    else:
        assert "run.yaml:1" in refused(read, f"{key}: {number}", match=key)


def test_an_endless_number_among_the_arguments_is_kept_or_refused(read):
    try:
        read("env_kwargs: {seed: " + "9" * 5_000 + "}")
    except ConfigError as error:
        assert "run.yaml:1" in str(error)  # noqa: PT017


@pytest.mark.parametrize("word", ["no", "No", "OFF", "yes", "on"])
@pytest.mark.parametrize(
    ("text", "line", "name"),
    [
        ("env: FrozenLake-v1\nenv_kwargs:\n  is_slippery: {}", 3, "env_kwargs.is_slippery"),
        ("env_kwargs: {{a: {{b: [1,\n {}]}}}}", 2, "env_kwargs.a.b"),
        ("optimizer: SGD\noptimizer_kwargs: {{nesterov: {}}}", 2, "optimizer_kwargs.nesterov"),
        ("wrappers:\n- ClipReward:\n    min_reward: {}", 3, "wrappers.ClipReward.min_reward"),
    ],
)
def test_a_word_that_yaml_takes_for_a_flag_is_no_text_without_quotes(read, word, text, line, name):
    message = refused(read, text.format(word))
    assert f"run.yaml:{line}: {name} is {word}" in message
    assert f'write true or false, or, if text is meant, "{word}" in quotes' in message


def test_a_word_in_quotes_is_text_and_comes_back(read, tmp_path):
    config = read("env_kwargs: {a: \"no\", b: ['on'], c: norway, off: 1}")
    assert config.env_kwargs == {"a": "no", "b": ["on"], "c": "norway", "off": 1}
    config.to_yaml(tmp_path / "again.yaml")
    assert PPOConfig.from_yaml(tmp_path / "again.yaml") == config
    assert PPOConfig.from_dict({"env_kwargs": {"a": "no"}}).env_kwargs == {"a": "no"}


# Overrides


def test_overrides_change_the_file(read):
    config = read(
        "gamma: 0.9\npolicy: {activation: relu, shared: false}\nlearning_rate: 1e-3",
        "gamma=0.5",
        "policy.shared=true",
        "policy.hidden_sizes=[3, 4]",
        "learning_rate={linear: [3e-4, 0]}",
        "env_kwargs.gravity=-5.0",
        "env=CartPole-v1",
        "target_kl=",
        "clip_range.linear=[0.2, 0.1]",
        " num_envs = 1e1",
        "num_envs=3",
    )
    assert config == PPOConfig(
        gamma=0.5,
        policy=PolicyConfig(activation="relu", shared=True, hidden_sizes=(3, 4)),
        learning_rate=Linear(3e-4, 0.0),
        env_kwargs={"gravity": -5.0},
        env="CartPole-v1",
        clip_range=Linear(0.2, 0.1),
        num_envs=3,
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gamma", ["key=value", "'gamma'"]),
        ("=0.9", ["key=value"]),
        ("", ["key=value"]),
        ("gama=0.9", ["'gama'", "'gamma'"]),
        ("polcy.shared=true", ["'polcy'", "'policy'"]),
        ("policy.shred=true", ["'shred'", "'shared'"]),
        ("policy..shared=true", ["''"]),
        (".shared=true", ["''"]),
        ("policy.shared.x=true", ["shared"]),
        ("gamma.x=1", ["gamma"]),
        ("gamma=", ["gamma"]),
        ("gamma=2", ["gamma", "[0, 1]"]),
        ("gamma=0.9=1", ["gamma", "0.9=1"]),
        ("gamma=[", ["gamma=["]),
        ("policy=relu", ["policy", "relu"]),
        ("env_kwargs.is_slippery=no", ["env_kwargs.is_slippery is no", "write true or false"]),
        ("env_kwargs={is_slippery: Off}", ["env_kwargs.is_slippery is Off"]),
        ("policy={shred: true}", ["'shred'", "'shared'"]),
    ],
)
def test_a_mistake_in_an_override_is_not_blamed_on_the_file(read, override, words):
    message = refused(read, "gamma: 0.99\npolicy:\n  shared: true", override)
    assert "run.yaml:" not in message, message
    for word in words:
        assert word in message, message


# From and to plain values


# PyYAML itself does not bring every line separator of Unicode back.
letters = st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])
words = st.text(letters, max_size=8) | st.sampled_from(
    [
        "a\nb",
        "\t",
        "1",
        "010",
        "1e3",
        "1_000",
        "1__0",
        "true",
        "on",
        "null",
        "none",
        "~",
        "",
        "<<",
        "=",
        "a: b",
    ]
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda children: st.lists(children, max_size=2) | st.dictionaries(words, children, max_size=2),
    max_leaves=3,
)
numbers = st.floats(0.0, 1e6)
schedules = numbers.map(Constant) | st.builds(Linear, numbers, numbers)
positive = st.floats(1e-9, 1e9)
sizes = st.integers(1, 10**9)
policies = st.builds(
    PolicyConfig,
    hidden_sizes=st.lists(sizes, max_size=3).map(tuple),
    activation=st.sampled_from(["tanh", "relu", "gelu"]),
    shared=st.booleans(),
    log_std_init=st.floats(-5, 2),
    output_gain=positive,
    normalize_observations=st.booleans(),
)
configs = st.builds(
    PPOConfig,
    env=st.none() | words,
    steps=st.none() | sizes,
    num_envs=sizes,
    num_workers=st.integers(0, 9),
    learning_rate=schedules,
    adam_eps=positive,
    gamma=st.floats(0, 1),
    clip_range=schedules,
    value_clip_range=st.none() | positive,
    value_coef=numbers,
    entropy_coef=schedules,
    normalize_advantages=st.sampled_from(["rollout", "minibatch", "none"]),
    normalize_rewards=st.booleans(),
    policy=policies,
    learning_rates=st.dictionaries(words, schedules, max_size=2),
    adaptive_kl=st.none() | positive,
    weight_decay=numbers,
    clip_range_high=st.none() | schedules,
    dual_clip=st.none() | st.floats(1.0, 1e3, exclude_min=True),
    recompute_advantages=st.booleans(),
) | st.builds(
    PPOConfig,
    optimizer=st.just("SGD"),
    optimizer_kwargs=st.fixed_dictionaries({"momentum": st.floats(0.0, 1.0)}),
    env_kwargs=st.dictionaries(words, plain, max_size=2),
    wrappers=st.lists(
        st.just("FlattenObservation")
        | st.builds(lambda kwargs: {"TimeLimit": kwargs}, st.dictionaries(words, plain)),
        max_size=2,
    ),
)


def types(value):
    """The value with every scalar's type, which equality does not see: 1 == 1.0 == True."""
    if isinstance(value, dict):
        return {key: types(item) for key, item in value.items()}
    if isinstance(value, list):
        return [types(item) for item in value]
    return type(value), value


@settings(max_examples=60, deadline=None)
@given(configs)
def test_a_config_survives_plain_values_and_json(config):
    data = config.to_dict()
    for copy in (data, json.loads(json.dumps(data))):
        back = PPOConfig.from_dict(copy)
        assert back == config
        assert types(back.to_dict()) == types(data)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_equal_configs_have_one_hash(config):
    twin = PPOConfig.from_dict(config.to_dict())
    assert hash(twin) == hash(config)
    assert hash(twin.policy) == hash(config.policy)
    assert {config: "found"}[twin] == "found"


def test_the_hash_tells_configs_apart_and_types_that_are_equal_not():
    config = PPOConfig(env_kwargs={"mass": 1})
    assert hash(config) == hash(PPOConfig(env_kwargs={"mass": 1.0}))
    changes = [{}, {"gamma": 0.9}, {"num_envs": 3}, {"policy": PolicyConfig(shared=True)}]
    assert len({hash(config.replace(**change)) for change in changes}) == len(changes)


@settings(max_examples=60, deadline=None)
@given(config=configs)
def test_a_config_survives_a_file(config, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "survivor.yaml"
    config.to_yaml(path)
    back = PPOConfig.from_yaml(path)
    assert back == config
    assert types(back.to_dict()) == types(config.to_dict())


def test_numbers_of_numpy_become_plain_ones():
    config = PPOConfig(num_envs=np.int64(3), gamma=np.float32(0.5), clip_range=np.float64(0.1))
    assert config == PPOConfig(num_envs=3, gamma=0.5, clip_range=0.1)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize("name", ["env_kwargs", "optimizer_kwargs", "wrappers"])
def test_free_groups_are_at_once_what_a_file_gives_back(name, tmp_path):
    given = {
        "env_kwargs": {"a": np.float32(0.5), "b": (1, np.int8(2)), "c": {"d": ((), np.bool_(1))}},
        "optimizer_kwargs": {"betas": (0.8, np.float64(0.9)), "amsgrad": np.bool_(0)},
        "wrappers": [{"TimeLimit": {"max_episode_steps": np.int64(3), "x": (1, 2)}}],
    }[name]
    wanted = {
        "env_kwargs": {"a": 0.5, "b": [1, 2], "c": {"d": [[], True]}},
        "optimizer_kwargs": {"betas": [0.8, 0.9], "amsgrad": False},
        "wrappers": ({"TimeLimit": {"max_episode_steps": 3, "x": [1, 2]}},),
    }[name]
    config = PPOConfig(optimizer="AdamW", **{name: given})
    assert repr(getattr(config, name)) == repr(wanted)  # with types
    config.to_yaml(tmp_path / "run.yaml")
    assert PPOConfig.from_yaml(tmp_path / "run.yaml") == config
    assert PPOConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "value",
    [np.ones(2), Path, len, Path("a"), float("nan"), np.float32("nan"), 1j, {1}, b"a"],
    ids=repr,
)
def test_what_no_file_can_hold_is_refused_by_its_key_with_a_remedy(value):
    with pytest.raises(ConfigError, match=r"env_kwargs\.a\.b is .*; wanted .*a factory of"):
        PPOConfig(env_kwargs={"a": {"b": [value]}})
    with pytest.raises(ConfigError, match=r"wrappers\.TimeLimit\.a is .*a factory of"):
        PPOConfig(wrappers=[{"TimeLimit": {"a": value}}])
    with pytest.raises(ConfigError, match=r"optimizer_kwargs\.eps is .*: convert it$"):
        PPOConfig(optimizer="AdamW", optimizer_kwargs={"eps": value})


def test_a_file_says_every_setting(tmp_path):
    PPOConfig().to_yaml(tmp_path / "run.yaml")
    text = (tmp_path / "run.yaml").read_text()
    for field in (*dataclasses.fields(PPOConfig), *dataclasses.fields(PolicyConfig)):
        assert f"{field.name}:" in text


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"gama": 0.9}, "'gamma'"),
        ({3: 0.9}, "'3'"),
        ({"gamma": None}, "gamma"),
        ({"gamma": 10**400}, "gamma"),
        ({"gamma": [0.9]}, "gamma"),
        ({"num_envs": True}, "num_envs"),
        ({"num_envs": 2.5}, "num_envs"),
        ({"normalize_rewards": 1}, "normalize_rewards"),
        ({"env": 3}, "env"),
        ({"policy": None}, "policy"),
        ({"policy": {"shred": True}}, "'shared'"),
        ({"policy": {"hidden_sizes": "64"}}, "hidden_sizes"),
        ({"wrappers": "TimeLimit"}, "wrappers"),
        ({"learning_rate": {"linear": [1, "x"]}}, "learning_rate"),
    ],
)
def test_plain_values_are_read_as_strictly_as_a_file(data, match):
    with pytest.raises(ConfigError, match=match):
        PPOConfig.from_dict(data)


def test_reading_plain_values_leaves_them_as_they_were():
    data = {"env_kwargs": {"a": [1]}, "policy": {"shared": True}, "learning_rate": 1e-3}
    copy = json.loads(json.dumps(data))
    config = PPOConfig.from_dict(data)
    config.to_dict()["env_kwargs"]["a"].append(2)
    assert data == copy
    assert config.env_kwargs == {"a": [1]}


# Shipped configurations


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("Pendulum-v1", "Pendulum-v1"),
        ("pendulum", "Pendulum-v1"),
        ("Pendulum", "Pendulum-v1"),
        ("pendulum.yaml", "Pendulum-v1"),
        ("MountainCarContinuous-v0", "MountainCarContinuous-v0"),
        ("mountaincarcontinuous", "MountainCarContinuous-v0"),
        ("mountain_car", "MountainCar-v0"),
        ("LunarLander-v3", "LunarLander-v3"),
    ],
)
def test_a_shipped_configuration_is_found_by_any_reasonable_name(name, env):
    assert PPOConfig.tuned(name).env == env


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("Pendlum-v1", "pendulum"), ("cartpol", "cartpole"), ("Humanoid-v5", "acrobot")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, remedy):
    with pytest.raises(ConfigError, match=remedy):
        PPOConfig.tuned(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../config", "/etc/passwd", "pendulum/../acrobot"])
def test_a_name_is_no_path(name):
    with pytest.raises(ConfigError, match="acrobot"):
        PPOConfig.tuned(name)


def test_a_shipped_configuration_can_be_changed():
    config = PPOConfig.tuned("cartpole", ["gamma=0.5", "policy.shared=true"])
    assert config == PPOConfig.tuned("cartpole").replace(
        gamma=0.5, policy=PolicyConfig(shared=True)
    )
    with pytest.raises(ConfigError, match="'gamma'"):
        PPOConfig.tuned("cartpole", ["gama=0.5"])


def test_the_seven_classic_environments_are_shipped():
    shipped = {PPOConfig.tuned(name).env for name in tuned_names()}
    assert shipped >= {
        "CartPole-v1",
        "Acrobot-v1",
        "MountainCar-v0",
        "Pendulum-v1",
        "MountainCarContinuous-v0",
        "LunarLander-v3",
        "CarRacing-v3",
    }


def test_a_wrapper_that_does_not_suit_the_environment_is_named():
    config = PPOConfig(env="CartPole-v1", wrappers=["GrayscaleObservation"])
    with pytest.raises(
        ConfigError, match=r"GrayscaleObservation.* failed: (AssertionError|.*image)"
    ):
        config.env_factory()()


@pytest.mark.parametrize("name", tuned_names())
def test_a_shipped_configuration_trains(name):
    config = PPOConfig.tuned(name)
    assert config.steps is not None
    assert config == PPOConfig.tuned(config.env)
    tiny = config.replace(num_envs=1, num_workers=0, num_steps=4, num_epochs=1, minibatch_size=4)
    try:
        config.env_factory()().close()
    except EnvCreationError as error:
        assert "pip install" in str(error)  # noqa: PT017
        pytest.skip(str(error))
    agent = PPOAgent(config=tiny).learn(config.env, 1)
    assert agent.steps == 4


def test_the_factory_makes_the_configured_environment():
    config = PPOConfig(
        env="CartPole-v1",
        env_kwargs={"sutton_barto_reward": True},
        wrappers=["NormalizeObservation", {"TimeLimit": {"max_episode_steps": 7}}],
    )
    env = config.env_factory()()
    assert isinstance(env, gymnasium.wrappers.TimeLimit)
    assert isinstance(env.env, gymnasium.wrappers.NormalizeObservation)
    env.reset(seed=0)
    assert env.step(0)[1] == 0.0  # Sutton and Barto pay nothing but -1 for falling
    env.close()


@pytest.mark.parametrize("folder", ["/tmp", "../..", "videos"])
def test_no_file_says_where_videos_are_written(read, folder):
    text = f"wrappers: [RecordVideo: {{video_folder: {folder}}}]"
    assert "ppo play RUN --video FILE" in refused(read, text, match="RecordVideo")


def test_a_factory_needs_an_environment():
    with pytest.raises(ConfigError, match="env"):
        PPOConfig().env_factory()


def test_what_a_wrapper_does_not_take_is_said_when_the_environment_is_made():
    config = PPOConfig(env="CartPole-v1", wrappers=[{"TimeLimit": {"max_steps": 3}}])
    with pytest.raises(ConfigError, match=r"TimeLimit.*max_steps"):
        config.env_factory()()


def test_the_agent_takes_a_config_and_shows_it():
    config = PPOConfig(num_envs=1, num_steps=8)
    agent = PPOAgent(config=config)
    assert agent.config is config
    assert agent.learn(CountingEnv, 1).steps == 8


def test_another_version_of_an_environment_has_no_tuned_configuration():
    assert PPOConfig.tuned("CartPole-v1") == PPOConfig.tuned("cartpole")
    with pytest.raises(ConfigError, match="for 'CartPole-v2'; 'cartpole' is for CartPole-v1"):
        PPOConfig.tuned("CartPole-v2")


@pytest.mark.parametrize("data", [[1], "gamma", None, 3])
def test_settings_that_are_no_mapping_are_refused(data):
    with pytest.raises(ConfigError, match="settings must be a mapping"):
        PPOConfig.from_dict(data)
