import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, seeds

from ppo.statistics import RewardScaler, RunningMoments

F32, F64 = torch.float32, torch.float64
shapes = st.sampled_from([(), (1,), (3,), (2, 2)])
sizes = st.lists(st.integers(0, 20), min_size=1, max_size=6)


def moments_of(batches, shape=()):
    moments = RunningMoments(shape)
    for batch in batches:
        moments.update(batch)
    return moments


def assert_same(actual, expected, tolerance=1e-12):
    for name in ("count", "mean", "var", "std"):
        x, y = getattr(actual, name), getattr(expected, name)
        assert x.dtype == F64
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@law
@given(seeds, sizes, shapes, st.sampled_from([F32, F64]), st.floats(-1e4, 1e4))
def test_moments_of_a_stream_are_those_of_all_its_samples(seed, sizes, shape, dtype, shift):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(sum(sizes), *shape, generator=generator, dtype=F64).add(shift).to(dtype)
    moments = moments_of(samples.split(sizes), shape)
    assert moments.count == len(samples)
    if len(samples):
        x = samples.double().numpy()
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(moments.var, x.var(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(moments.std, x.std(0), rtol=1e-9, atol=1e-9)


def test_a_large_mean_leaves_the_std_alone():
    generator = torch.Generator().manual_seed(0)
    moments = RunningMoments()
    for _ in range(100):
        moments.update(torch.randn(1000, generator=generator, dtype=F64) + 1e4)
    assert moments.std.item() == pytest.approx(1, abs=0.01)
    assert moments.mean.item() == pytest.approx(1e4, abs=0.01)


def test_there_is_no_prior_count():
    moments = moments_of([torch.tensor([5.0])])
    assert (moments.count, moments.mean, moments.var) == (1, 5, 0)
    fresh = RunningMoments((2,))
    assert fresh.count == 0
    assert torch.equal(fresh.mean, torch.zeros(2, dtype=F64))
    assert torch.equal(fresh.var, torch.zeros(2, dtype=F64))


@law
@given(seeds, sizes, st.randoms(use_true_random=False))
def test_merging_is_independent_of_order_and_grouping(seed, sizes, random):
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(size, 2, generator=generator, dtype=F64) + 3 for size in sizes]
    expected = moments_of(batches, (2,))
    parts = [moments_of([batch], (2,)) for batch in batches]
    while len(parts) > 1:
        random.shuffle(parts)
        other = parts.pop()
        parts[0].merge(other)
    assert_same(parts[0], expected)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_an_empty_batch_changes_nothing(shape):
    moments = moments_of([torch.randn(5, *shape)], shape)
    before = moments.state_dict()
    moments.update(torch.empty(0, *shape))
    moments.update(torch.empty(4, 0, *shape))
    moments.update(torch.randn(3, *shape), torch.zeros(3, dtype=torch.bool))
    moments.merge(RunningMoments(shape))
    for name, x in moments.state_dict().items():
        assert torch.equal(x, before[name])


def test_samples_without_numbers_are_counted():
    moments = moments_of([torch.empty(4, 5, 0), torch.empty(3, 0)], (0,))
    assert moments.count == 23
    assert moments.mean.shape == moments.std.shape == (0,)


def test_any_leading_axes_are_samples():
    batch = torch.randn(4, 5, 3)
    assert_same(moments_of([batch], (3,)), moments_of([batch.view(20, 3)], (3,)))


@law
@given(seeds, shapes, st.sampled_from([np.nan, np.inf, 7.0]))
def test_only_valid_samples_count(seed, shape, rubbish):
    rng = np.random.default_rng(seed)
    batch = torch.as_tensor(rng.normal(size=(6, 4, *shape)))
    valid = torch.as_tensor(rng.random((6, 4)) < 0.5)
    batch[~valid] = rubbish
    masked = RunningMoments(shape)
    masked.update(batch, valid)
    assert_same(masked, moments_of([batch[valid]], shape))


def test_a_batch_is_not_modified():
    batch = torch.randn(5, dtype=F64, requires_grad=True)
    before = batch.detach().clone()
    moments = moments_of([batch])
    assert torch.equal(batch, before)
    assert not moments.mean.requires_grad


def test_moments_saved_and_loaded_go_on_bitwise():
    batches = torch.randn(4, 7, 3)
    moments = moments_of(batches[:2], (3,))
    loaded = RunningMoments((3,))
    loaded.load_state_dict(moments.state_dict())
    for batch in batches[2:]:
        moments.update(batch)
        loaded.update(batch)
    for name, x in moments.state_dict().items():
        assert torch.equal(x, loaded.state_dict()[name])


def test_a_saved_state_is_a_copy():
    moments = moments_of([torch.tensor([1.0, 2.0])])
    for x in moments.state_dict().values():
        x.fill_(99)
    assert (moments.count, moments.mean, moments.var) == (2, 1.5, 0.25)
    state = moments.state_dict()
    loaded = RunningMoments()
    loaded.load_state_dict(state)
    for x in state.values():
        x.fill_(99)
    assert_same(loaded, moments)


def test_moments_go_on_from_known_ones():
    first, second = torch.randn(2, 50, 3, dtype=F64)
    expected = moments_of([first, second], (3,))
    known = moments_of([first], (3,))
    continued = RunningMoments.from_moments(known.count, known.mean, known.var)
    continued.update(second)
    assert_same(continued, expected)


def test_moments_refuse_what_does_not_fit():
    moments = RunningMoments((3,))
    with pytest.raises(ValueError, match=r"^batch has shape \[5, 2\], wanted"):
        moments.update(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"^batch has shape \[\], wanted"):
        moments.update(torch.zeros(()))
    with pytest.raises(TypeError, match=r"^batch is of type numpy.ndarray"):
        moments.update(np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"^valid has shape \[5, 3\], wanted \[5\]"):
        moments.update(torch.zeros(5, 3), torch.ones(5, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^valid has dtype float32"):
        moments.update(torch.zeros(5, 3), torch.ones(5))
    with pytest.raises(ValueError, match=r"^other has shape \[2\]"):
        moments.merge(RunningMoments((2,)))
    with pytest.raises(ValueError, match=r"keys \['count'\], wanted \['count', 'm2', 'mean'\]"):
        moments.load_state_dict({"count": torch.zeros(())})
    with pytest.raises(ValueError, match=r"^state\['mean'\] has shape \[2\], wanted \[3\]"):
        moments.load_state_dict(RunningMoments((2,)).state_dict())


def rollouts(seed, horizons, num_envs=3):
    """Rewards, terminated, truncated, valid ``[T, N]`` for each horizon."""
    rng = np.random.default_rng(seed)
    drawn = []
    for horizon in horizons:
        size = (horizon, num_envs)
        flags = [rng.random(size) < 0.15, rng.random(size) < 0.15, rng.random(size) < 0.8]
        drawn.append([torch.as_tensor(x) for x in (rng.normal(size=size) + 0.5, *flags)])
    return drawn


def sums_of(drawn, gamma):
    """Every discounted sum of the rollouts, by its definition."""
    rewards, terminated, truncated, valid = (torch.cat(x).numpy() for x in zip(*drawn, strict=True))
    ended = terminated | truncated
    return np.concatenate(
        [
            reference.discounted_sums(rewards[:, i], ended[:, i], valid[:, i], gamma)
            for i in range(rewards.shape[1])
        ]
    )


horizons = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@law
@given(seeds, horizons, st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_rewards_are_divided_by_the_std_of_the_discounted_sums_so_far(seed, horizons, gamma):
    scaler = RewardScaler(gamma, num_envs=3)
    drawn = rollouts(seed, horizons)
    for k, rollout in enumerate(drawn):
        sums = sums_of(drawn[: k + 1], gamma)
        scaled = scaler(*rollout)
        std = np.std(sums) if len(sums) > 1 else 1.0
        np.testing.assert_allclose(scaled, rollout[0] / std, rtol=1e-9)
    assert scaler.moments.count == len(sums)


@law
@given(seeds, st.integers(1, 39))
def test_the_moments_do_not_depend_on_where_rollouts_are_cut(seed, cut):
    ((*whole,),) = rollouts(seed, [40])
    together, apart = RewardScaler(0.9, 3), RewardScaler(0.9, 3)
    together(*whole)
    apart(*(x[:cut] for x in whole))
    apart(*(x[cut:] for x in whole))
    assert_same(apart.moments, together.moments, 1e-9)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_an_end_uses_its_reward_and_nothing_leaks_beyond_it(end):
    ended = torch.tensor([[False], [True], [False], [False]])
    flags = {"terminated": torch.zeros(4, 1, dtype=torch.bool)} | {end: ended}
    scaler = RewardScaler(1.0, num_envs=1)
    scaler(torch.tensor([[1.0], [10.0], [0.0], [2.0]]), **flags)
    sums = torch.tensor([1.0, 11.0, 0.0, 2.0], dtype=F64)
    assert_same(scaler.moments, moments_of([sums]))


def test_a_row_that_is_no_transition_counts_nowhere():
    rewards = torch.tensor([[1.0], [np.nan], [3.0]])
    valid = torch.tensor([[True], [False], [True]])
    scaler = RewardScaler(0.5, num_envs=1)
    # The end of an invalid row is none either.
    scaler(rewards, ~valid, valid=valid)
    assert_same(scaler.moments, moments_of([torch.tensor([1.0, 3.5])]))


def test_rewards_pass_unchanged_until_the_sums_vary():
    never = torch.zeros(3, 1, dtype=torch.bool)
    one = RewardScaler(0.9, 1)
    assert one(torch.tensor([[5.0]]), never[:1]) == 5
    assert torch.equal(RewardScaler(0.9, 1)(torch.zeros(3, 1), never), torch.zeros(3, 1))
    rubbish = RewardScaler(0.9, 1)(torch.ones(3, 1), never, valid=never)
    assert torch.equal(rubbish, torch.ones(3, 1))


@pytest.mark.parametrize("constant", [0.1, 0.7, 1 / 3, 1e6])
def test_the_rounding_of_a_constant_is_no_spread(constant):
    rewards = torch.full((11, 3), constant, dtype=F64)
    always = torch.ones(11, 3, dtype=torch.bool)
    scaler = RewardScaler(0.9, 3)
    for _ in range(10):
        assert torch.equal(scaler(rewards, always), rewards)
    assert scaler.moments.var < 1e-20 * constant**2


@pytest.mark.parametrize("dtype", [F32, F64])
def test_scaling_keeps_the_dtype_and_the_rewards(dtype):
    rewards, *flags = rollouts(0, [20])[0]
    rewards = rewards.to(dtype)
    before = rewards.clone()
    scaler = RewardScaler(0.9, 3)
    for known in (flags, flags[:1]):
        scaled = scaler(rewards, *known)
        assert scaled.dtype == dtype
        assert torch.equal(rewards, before)
        assert scaled.data_ptr() != rewards.data_ptr()


def test_a_tiny_spread_is_not_blown_up_without_limit():
    rewards = torch.tensor([[1e-12], [-1e-12]], dtype=F64)
    scaled = RewardScaler(0.0, 1)(rewards, torch.zeros(2, 1, dtype=torch.bool))
    torch.testing.assert_close(scaled, rewards / 1e-8)


@law
@given(seeds, horizons)
def test_a_scaler_saved_and_loaded_goes_on_bitwise(seed, horizons):
    *past, last = rollouts(seed, [*horizons, 10])
    scaler = RewardScaler(0.9, 3)
    for rollout in past:
        scaler(*rollout)
    state = scaler.state_dict()
    assert all(isinstance(x, torch.Tensor) for x in state.values())
    loaded = RewardScaler(0.9, 3)
    loaded.load_state_dict(state)
    assert torch.equal(loaded(*last), scaler(*last))
    for name, x in scaler.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)


def test_a_copy_of_a_scaler_goes_on_by_itself():
    first, second, third = rollouts(0, [10, 10, 10])
    scaler, witness = RewardScaler(0.9, 3), RewardScaler(0.9, 3)
    for one in (scaler, witness):
        one(*first)
    twin = scaler.copy()
    wanted = witness(*second)
    assert torch.equal(twin(*second), wanted)
    twin.forget(torch.tensor([True, False, True]))
    twin.reset(2)
    assert scaler.num_envs == 3
    assert torch.equal(scaler(*second), wanted)
    assert torch.equal(scaler(*third), witness(*third))


def test_reset_forgets_the_episodes_and_keeps_the_moments():
    first, second = rollouts(0, [10, 10])
    first[1][-1], first[2][-1], first[3][-1] = False, False, True
    scaler = RewardScaler(0.9, 3)
    scaler(*first)
    fresh = RewardScaler(0.9, 3)
    fresh(*second)
    known = scaler.state_dict()
    assert (known["returns"] != 0).all()
    scaler.reset()
    scaler(*second)
    expected = RunningMoments()
    expected.load_state_dict({name: known[name] for name in ("count", "mean", "m2")})
    expected.merge(fresh.moments)
    assert_same(scaler.moments, expected)
    scaler.reset(num_envs=2)
    scaler(*(x[:, :2] for x in second))


def test_a_scaler_refuses_what_does_not_fit():
    rewards, terminated, truncated, valid = rollouts(0, [5])[0]
    scaler = RewardScaler(0.9, 3)
    with pytest.raises(ValueError, match=r"^rewards has shape \[5, 2\], wanted \[T, 3\]"):
        scaler(rewards[:, :2], terminated[:, :2])
    with pytest.raises(ValueError, match=r"^rewards has shape \[0, 3\]"):
        scaler(rewards[:0], terminated[:0])
    with pytest.raises(TypeError, match=r"^rewards has dtype int64"):
        scaler(rewards.long(), terminated)
    with pytest.raises(TypeError, match=r"^rewards is of type numpy.ndarray"):
        scaler(rewards.numpy(), terminated)
    with pytest.raises(TypeError, match=r"^truncated has dtype float64"):
        scaler(rewards, terminated, rewards)
    with pytest.raises(ValueError, match=r"^valid has shape \[4, 3\]"):
        scaler(rewards, terminated, truncated, valid[:4])
    with pytest.raises(ValueError, match=r"^gamma is 1.5"):
        RewardScaler(1.5, 3)
    for num_envs, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=r"^num_envs is "):
            RewardScaler(0.9, num_envs)
    with pytest.raises(ValueError, match=r"^num_envs is 0"):
        scaler.reset(num_envs=0)
    with pytest.raises(ValueError, match=r"^state\['returns'\] has shape \[2\], wanted \[3\]"):
        scaler.load_state_dict(RewardScaler(0.9, 2).state_dict())


def test_no_value_is_read_on_the_host():
    # Tensors without data: whatever branched on a value would fail.
    arguments = [x.to("meta") for x in rollouts(0, [20])[0]]
    scaler = RewardScaler(0.9, 3)
    scaler.load_state_dict({name: x.to("meta") for name, x in scaler.state_dict().items()})
    assert scaler(*arguments).device.type == "meta"
    assert scaler.moments.mean.device.type == "meta"
