"""What tests of collecting share: collect a few rollouts, and check that their rows are real."""

import torch
from known_policies import VALUE_OF_ZERO

from ppo.collector import RolloutCollector
from ppo.frames import to_tensor
from ppo.policies import PolicyConfig, make_policy
from ppo.trees import leaves_with_paths


def collect(env, horizons, policy=None, *, num_envs=3, seed=0, **options):
    """Collect one rollout per horizon; a config, or None, stands for the policy it makes."""
    with RolloutCollector(env, num_envs=num_envs, seed=seed, **options) as collector:
        if policy is None or isinstance(policy, PolicyConfig):
            spaces = collector.observation_space, collector.action_space
            policy = make_policy(*spaces, policy or PolicyConfig())
        return [collector.collect(policy, num_steps) for num_steps in horizons]


def tensors_of(rollout):
    """Every tensor of a rollout by name, those of nested fields by path."""
    values = {name: value for name, value in vars(rollout).items() if name != "episodes"}
    finals, sequences = values.pop("finals"), values.pop("sequences")
    values |= {f"finals.{name}": value for name, value in finals._asdict().items()}
    values["sequences.states"] = None if sequences is None else sequences.states
    return {
        f"{name}/{path}": to_tensor(leaf)
        for name, value in values.items()
        for path, leaf in leaves_with_paths(value)
        if leaf is not None
    }


def assert_identical(rollouts, others):
    """Bit for bit: every tensor, every type, every episode."""
    for rollout, other in zip(rollouts, others, strict=True):
        assert rollout.episodes == other.episodes
        theirs = tensors_of(other)
        ours = tensors_of(rollout)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


def ended(rollout):
    """Where an episode ended, for either reason."""
    return rollout.terminated | rollout.truncated


def assert_counts(rollouts, column):
    """Every valid row is a real step of a counting environment, under a count policy.

    Episodes begin at 0, count up, are paid, end and begin anew, over the borders of rollouts.
    """
    expected, tag = 0, None
    for rollout in rollouts:
        for t in range(len(rollout.rewards)):
            if not rollout.valid[t, column]:
                continue
            count, row_tag = rollout.obs[t, column].tolist()
            assert count == expected
            assert tag in (None, row_tag)
            assert rollout.rewards[t, column] == count + 1 + row_tag
            assert rollout.values[t, column] == VALUE_OF_ZERO + count
            successor = 0.0 if rollout.terminated[t, column] else VALUE_OF_ZERO + count + 1
            assert rollout.next_values[t, column] == successor
            over = ended(rollout)[t, column]
            expected, tag = (0, None) if over else (count + 1, row_tag)
