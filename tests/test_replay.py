"""Going on in the middle of an episode: the log of its actions, and what an environment is."""

import gymnasium
import numpy as np
from environments import CountingEnv

from ppo.collector.replay import ActionLog, digest, kind_of, snapshot_of


def test_the_log_holds_the_actions_since_the_latest_reset_and_no_others():
    rng = np.random.default_rng(0)
    log, expected = ActionLog(4), [[] for _ in range(4)]
    for number in range(30):
        num_steps = int(rng.integers(1, 6))
        actions = {"a": rng.integers(100, size=(8, 4)), "b": (rng.normal(size=(8, 4, 2)),)}
        ended = rng.random((num_steps, 4)) < 0.2
        log.extend(actions, ended)
        for index, taken in enumerate(expected):
            for t in range(num_steps):
                taken.append(int(actions["a"][t, index]))
                if ended[t, index]:
                    taken.clear()
        if number % 3 == 0:
            found = [[] if one is None else one["a"].tolist() for one in log.of_all()]
            assert found == expected
            assert all(one is None or len(one["b"][0]) == len(one["a"]) for one in log.of_all())


def test_a_digest_tells_values_types_shapes_and_places_apart():
    observations = [
        np.zeros(2, np.float32),
        np.ones(2, np.float32),
        np.zeros(2, np.int32),
        np.zeros((2, 1), np.float32),
        {"a": np.zeros(2, np.float32)},
        {"b": np.zeros(2, np.float32)},
        (np.zeros(2, np.float32),),
    ]
    assert len({digest(obs) for obs in observations}) == len(observations)
    assert digest(observations[0]) == digest(np.zeros(2, np.float32))


def test_a_kind_names_the_id_the_class_and_every_wrapper():
    kind = kind_of(gymnasium.make("CartPole-v1", disable_env_checker=True))
    assert kind == "TimeLimit > OrderEnforcing > CartPoleEnv > CartPole-v1"
    assert kind_of(CountingEnv()) == "CountingEnv"


def test_what_only_sets_its_state_offers_no_snapshot():
    env = gymnasium.make("InvertedPendulum-v5")
    env.reset(seed=0)
    assert hasattr(env.unwrapped, "set_state")
    assert snapshot_of(env) is None


def test_a_snapshot_is_a_copy():
    class Stateful(CountingEnv):
        state = np.zeros(2)

        def get_state(self):
            return self.state

        def set_state(self, state):
            self.state = state

    env = Stateful()
    snapshot = snapshot_of(env)
    env.state += 1.0
    assert snapshot.tolist() == [0.0, 0.0]
