import numpy as np
import pytest
import torch
from families import normal

from ppo.distributions import Bernoulli, Categorical, DiagonalGaussian, Joint, MultiCategorical


def parts(seed=0):
    return {
        "move": DiagonalGaussian(normal(seed, 3, 2), normal(seed + 1, 2)),
        "act": (Categorical(normal(seed + 2, 3, 4)), Bernoulli(normal(seed + 3, 3, 2))),
    }


def test_a_sample_gives_each_leaf_its_own_stretch_of_the_noise():
    tree, noise = parts(), normal(9, 3, 8)
    action = Joint(tree).sample(noise)
    assert Joint(tree).noise_size == 8
    assert torch.equal(action["move"], tree["move"].sample(noise[:, :2]))
    assert torch.equal(action["act"][0], tree["act"][0].sample(noise[:, 2:6]))
    assert torch.equal(action["act"][1], tree["act"][1].sample(noise[:, 6:]))
    assert list(action) == ["move", "act"]
    assert type(action["act"]) is tuple


def test_log_prob_entropy_and_kl_are_sums_over_the_leaves():
    tree, other, noise = parts(), parts(20), normal(9, 3, 8)
    action = Joint(tree).sample(noise)
    flat = [(tree["move"], action["move"], other["move"])]
    flat += list(zip(tree["act"], action["act"], other["act"], strict=True))
    dist = Joint(tree)
    torch.testing.assert_close(dist.log_prob(action), sum(p.log_prob(a) for p, a, _ in flat))
    torch.testing.assert_close(dist.entropy(), sum(p.entropy() for p, _, _ in flat))
    torch.testing.assert_close(dist.kl(Joint(other)), sum(p.kl(q) for p, _, q in flat))


def test_the_mode_is_that_of_every_leaf():
    tree = parts()
    mode = Joint(tree).mode()
    assert torch.equal(mode["move"], tree["move"].mean)
    assert torch.equal(mode["act"][0], tree["act"][0].mode())


def test_keys_of_an_action_may_come_in_any_order():
    dist = Joint(parts())
    action = dist.mode()
    reordered = {"act": action["act"], "move": action["move"]}
    assert torch.equal(dist.log_prob(action), dist.log_prob(reordered))


def test_an_action_without_a_leaf_is_an_error():
    dist = Joint(parts())
    with pytest.raises(KeyError, match="act"):
        dist.log_prob({"move": torch.zeros(3, 2)})


@pytest.mark.parametrize("nvec", [(3, 3), (2, 5)])
def test_positions_of_a_multi_categorical_are_like_leaves(nvec):
    logits = normal(1, 4, sum(nvec))
    whole = MultiCategorical(logits, nvec)
    joint = Joint(tuple(Categorical(part) for part in logits.split(nvec, -1)))
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(Categorical.draw_noise(rng, (4, sum(nvec))))
    action = whole.sample(noise)
    assert torch.equal(action, torch.stack(joint.sample(noise), -1))
    torch.testing.assert_close(whole.log_prob(action), joint.log_prob(tuple(action.unbind(-1))))
    torch.testing.assert_close(whole.entropy(), joint.entropy())
