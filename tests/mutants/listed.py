"""The mutants: one wrong line each, and the test files that should notice it.

`old` is a short piece of today's text that occurs exactly once in its file; where code moves, the
anchor moves with it. An `argument` says why a mutant that no test kills may live.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One wrong line.

    Attributes:
        breaks: What is wrong with it.
        file: Path below `ppo/`.
        old: Text that occurs exactly once in the file.
        new: What stands there instead.
        tests: Test modules, without `test_` and `.py`.
        argument: Why it may survive; empty if it may not.
    """

    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    argument: str = ""


ADVANTAGES = [
    Mutant(
        "a truncation removes the future",
        "advantages.py",
        "advantages.copy_(successor), done)",
        "advantages.copy_(successor), ended)",
        ("advantages",),
    ),
    Mutant(
        "the trace runs on through a truncation",
        "advantages.py",
        "decay.fill_(gamma * gae_lambda), ended)",
        "decay.fill_(gamma * gae_lambda), done)",
        ("advantages",),
    ),
    Mutant(
        "the value of the successor is discounted by λ",
        "advantages.py",
        ".mul_(gamma).add_(r).sub_(v)",
        ".mul_(gae_lambda).add_(r).sub_(v)",
        ("advantages",),
    ),
    Mutant(
        "the trace decays by γ alone",
        "advantages.py",
        "decay.fill_(gamma * gae_lambda)",
        "decay.fill_(gamma)",
        ("advantages",),
    ),
    Mutant(
        "returns are advantages plus rewards",
        "advantages.py",
        "torch.add(advantages, v, out=decay)",
        "torch.add(advantages, r, out=decay)",
        ("advantages",),
    ),
    Mutant(
        "only what is terminated and truncated has ended",
        "advantages.py",
        "done | tensors[-1]",
        "done & tensors[-1]",
        ("advantages",),
    ),
    Mutant(
        "n-step returns take one step too many",
        "advantages.py",
        "range(min(n, len(r)) - 1)",
        "range(min(n, len(r)))",
        ("advantages",),
    ),
    Mutant(
        "a discounted return does not bootstrap where the data end",
        "advantages.py",
        "closed[-1] = True",
        "closed[-1] |= False",
        ("advantages",),
    ),
    Mutant(
        "eps is added to the standard deviation",
        "advantages.py",
        "variance.sqrt().clamp(min=eps)",
        "(variance.sqrt() + eps)",
        ("advantages",),
    ),
    Mutant(
        "the mask leaves everything but what it names",
        "_masks.py",
        "where=flags.numpy()",
        "where=~flags.numpy()",
        ("masks",),
    ),
    Mutant(
        "masked means are divided by the number of all rows",
        "_reductions.py",
        "valid.sum().clamp(min=1)",
        "max(valid.numel(), 1)",
        ("advantages", "losses"),
    ),
    Mutant(
        "the rounding of a constant counts as spread",
        "_reductions.py",
        "noise = 8 * torch",
        "noise = 0 * torch",
        ("advantages", "losses"),
    ),
    Mutant(
        "the steps behind the last whole chunk are forgotten",
        "_scan.py",
        "x[whole - 1].addcmul_(c[whole - 1], x[whole])",
        "pass",
        ("advantages",),
    ),
    Mutant(
        "chunks are repaired from a row too late",
        "_scan.py",
        "chunks[1:, :1])",
        "chunks[1:, 1:2])",
        ("advantages",),
    ),
    Mutant(
        "the first step is left out of the scan",
        "_scan.py",
        "range(x.shape[0] - 2, -1, -1)",
        "range(x.shape[0] - 2, 0, -1)",
        ("advantages",),
    ),
]

STATISTICS = [
    Mutant(
        "the variance is the unbiased one",
        "statistics.py",
        "self._m2 / self.count.clamp(min=1)",
        "self._m2 / (self.count - 1).clamp(min=1)",
        ("statistics",),
    ),
    Mutant(
        "merging forgets that the means differ",
        "statistics.py",
        "spread + m2 + delta.square() * (seen * share)",
        "spread + m2",
        ("statistics",),
    ),
    Mutant(
        "samples that are not valid reach the mean",
        "statistics.py",
        "samples = torch.where(counted, samples, 0.0)",
        "pass",
        ("statistics",),
    ),
    Mutant(
        "samples that are not valid reach the variance",
        "statistics.py",
        "deviations = torch.where(counted, deviations, 0.0)",
        "pass",
        ("statistics",),
    ),
    Mutant(
        "an episode's sum of rewards is cut before its last step",
        "statistics.py",
        "decay[1:].masked_fill_(ended[:-1], 0.0)",
        "decay.masked_fill_(ended, 0.0)",
        ("statistics",),
    ),
    Mutant(
        "the sum of rewards starts anew with every rollout",
        "statistics.py",
        "paid[0] += decay[0] * self._returns.to(paid.device)",
        "pass",
        ("statistics",),
    ),
    Mutant(
        "the sum of an episode that ended goes on into the next rollout",
        "statistics.py",
        "torch.where(ended[-1], 0.0, returns[-1])",
        "returns[-1].clone()",
        ("statistics",),
    ),
    Mutant(
        "a row that is no transition discounts",
        "statistics.py",
        "torch.where(valid, decay, 1.0)",
        "decay",
        ("statistics",),
    ),
    Mutant(
        "the mean is subtracted from rewards",
        "statistics.py",
        "return rewards / torch.where(",
        "return (rewards - self.moments.mean) / torch.where(",
        ("statistics",),
    ),
    Mutant(
        "a truncation does not end the sum of rewards",
        "statistics.py",
        "ended = terminated if truncated is None else terminated | truncated",
        "ended = terminated",
        ("statistics",),
    ),
    Mutant(
        "rewards are scaled by what was known before them",
        "statistics.py",
        "self.moments.update(self._discounted(rewards, ended, valid), valid)\n"
        "        std = self.moments.std",
        "std = self.moments.std\n"
        "        self.moments.update(self._discounted(rewards, ended, valid), valid)",
        ("statistics",),
    ),
    Mutant(
        "new environments go on with the sums of the old",
        "statistics.py",
        "self._returns = self._returns.new_zeros(self.num_envs)",
        "self._returns = self._returns[:1].expand(self.num_envs).clone()",
        ("statistics", "agent"),
    ),
    Mutant(
        "observations are divided by their variance",
        "policies/normalizer.py",
        "torch.rsqrt(self.var + 1e-8)",
        "1 / (self.var + 1e-8)",
        ("normalizer",),
    ),
    Mutant(
        "normalised observations are not clipped",
        "policies/normalizer.py",
        ".clamp(-self.clip, self.clip)",
        "",
        ("normalizer",),
    ),
    Mutant(
        "statistics move while the policy is only evaluated",
        "policies/normalizer.py",
        "return ((obs - self.shift)",
        "self.update(obs)\n        return ((obs - self.shift)",
        ("normalizer", "agent"),
    ),
    Mutant(
        "a loaded normaliser goes on with the numbers it had",
        "policies/normalizer.py",
        "super()._load_from_state_dict(*args, **kwargs)\n        self._refresh()",
        "super()._load_from_state_dict(*args, **kwargs)",
        ("normalizer",),
    ),
    Mutant(
        "moments that go on from known ones forget how many they were",
        "statistics.py",
        '"m2": var * count',
        '"m2": var',
        ("statistics", "normalizer"),
    ),
    Mutant(
        "the rounding of a constant return counts as spread",
        "statistics.py",
        "_NOISE * self.moments.mean.abs()",
        "0.0 * self.moments.mean.abs()",
        ("statistics",),
    ),
    Mutant(
        "a tiny spread of returns is blown up without limit",
        "statistics.py",
        "std.clamp(min=_MIN_STD)",
        "std",
        ("statistics",),
    ),
]

SCHEDULES = [
    Mutant(
        "a line runs backwards",
        "schedules.py",
        "(1.0 - p) * self.start + p * self.end",
        "p * self.start + (1.0 - p) * self.end",
        ("schedules",),
    ),
    Mutant(
        "a line goes on beyond its end",
        "schedules.py",
        "min(max(progress, 0.0), 1.0)",
        "max(progress, 0.0)",
        ("schedules",),
    ),
    Mutant(
        "schedules are an update ahead",
        "agent.py",
        "min(self.steps / self.goal, 1.0)",
        "min((self.steps + rollout.num_transitions) / self.goal, 1.0)",
        ("agent",),
    ),
    Mutant(
        "the clip range stays at its start",
        "agent.py",
        "config.clip_range(progress)",
        "config.clip_range(0.0)",
        ("agent",),
    ),
    Mutant(
        "a line is written down backwards",
        "schedules.py",
        "[self.start, self.end]",
        "[self.end, self.start]",
        ("schedules", "config"),
    ),
]

LOSSES = [
    Mutant(
        "the surrogate is the optimistic one",
        "losses.py",
        "torch.minimum(ratio * advantages",
        "torch.maximum(ratio * advantages",
        ("losses",),
    ),
    Mutant(
        "entropy is punished",
        "losses.py",
        "total - entropy_coef * mean_entropy",
        "total + entropy_coef * mean_entropy",
        ("losses",),
    ),
    Mutant(
        "the value clip takes the smaller error",
        "losses.py",
        "torch.maximum(error",
        "torch.minimum(error",
        ("losses",),
    ),
    Mutant(
        "a gradient reaches the advantages",
        "losses.py",
        "at_least_float32(advantages.detach())",
        "at_least_float32(advantages)",
        ("losses",),
    ),
    Mutant(
        "a gradient reaches the returns",
        "losses.py",
        "at_least_float32(values, returns.detach())",
        "at_least_float32(values, returns)",
        ("losses",),
    ),
    Mutant(
        "a gradient reaches the policy that collected",
        "losses.py",
        "old_log_probs.detach())",
        "old_log_probs)",
        ("losses",),
    ),
    Mutant(
        "a gradient reaches the critic that collected",
        "losses.py",
        '"value_clip_range").detach()',
        '"value_clip_range")',
        ("losses",),
    ),
    Mutant(
        "rows that are not valid reach the gradient of the ratio",
        "losses.py",
        "select(log_probs - old_log_probs, valid)",
        "log_probs - old_log_probs",
        ("losses",),
    ),
    Mutant(
        "rows that are not valid reach the gradient of the values",
        "losses.py",
        "select(values - returns, valid)",
        "(values - returns)",
        ("losses",),
    ),
    Mutant(
        "a huge ratio overflows",
        "losses.py",
        "return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)",
        "return log_ratio",
        ("losses",),
    ),
    Mutant(
        "the clip range is twice as wide above",
        "losses.py",
        "1 - clip_range, 1 + clip_range",
        "1 - clip_range, 1 + 2 * clip_range",
        ("losses",),
    ),
    Mutant(
        "the estimate of the KL may be negative",
        "losses.py",
        "masked_mean(log_ratio.expm1() - log_ratio, valid)",
        "masked_mean(-log_ratio, valid)",
        ("losses",),
    ),
    Mutant(
        "explained is what remains unexplained",
        "losses.py",
        "1 - unexplained / total",
        "unexplained / total",
        ("losses",),
    ),
    Mutant(
        "clipped values step away from the new ones",
        "losses.py",
        "_clamp(values - old_values,",
        "_clamp(old_values - values,",
        ("losses",),
    ),
    Mutant(
        "a weight of the entropy in a tensor is read",
        "losses.py",
        "isinstance(entropy_coef, Tensor) or entropy_coef != 0",
        "bool(entropy_coef != 0)",
        ("losses", "host_sync"),
    ),
]

DISTRIBUTIONS = [
    Mutant(
        "the entropy of classes is negative",
        "distributions.py",
        "-(self.log_p.exp() * self.log_p)",
        "(self.log_p.exp() * self.log_p)",
        ("distributions",),
    ),
    Mutant(
        "a density grows with its spread",
        "distributions.py",
        "0.5 * z * z + self.log_std",
        "0.5 * z * z - self.log_std",
        ("distributions",),
    ),
    Mutant(
        "actions are drawn with the root of the spread",
        "distributions.py",
        "self.log_std.exp() * noise",
        "(0.5 * self.log_std).exp() * noise",
        ("distributions",),
    ),
    Mutant(
        "the entropy of a normal lacks its half",
        "distributions.py",
        "self.log_std + 0.5 + _HALF_LOG_2PI",
        "self.log_std + _HALF_LOG_2PI",
        ("distributions",),
    ),
    Mutant(
        "the KL of classes is negative",
        "distributions.py",
        "self.log_p - other.log_p",
        "other.log_p - self.log_p",
        ("distributions",),
    ),
    Mutant(
        "the spread of an action is not bounded",
        "policies/heads.py",
        "self.log_std.clamp(*self.log_std_bounds)",
        "self.log_std",
        ("policies",),
    ),
    Mutant(
        "the gradient of the spread ends at its bound",
        "policies/heads.py",
        "(clamped - self.log_std).detach()",
        "(clamped - self.log_std)",
        ("policies",),
    ),
    Mutant(
        "the KL of classes that cannot be is NaN",
        "distributions.py",
        "log_p.clamp(min=torch.finfo(log_p.dtype).min)",
        "log_p",
        ("distributions",),
    ),
    Mutant(
        "the KL of normals takes their distance once",
        "distributions.py",
        "shift * shift - 1.0",
        "shift - 1.0",
        ("distributions",),
    ),
    Mutant(
        "the actor of the workers takes no noise",
        "policies/snapshot.py",
        "np.argmax(h + noise, axis=-1)",
        "np.argmax(h, axis=-1)",
        ("snapshot",),
    ),
    Mutant(
        "the actor of the workers does not clip observations",
        "policies/snapshot.py",
        "np.minimum(h, self._high, out=h)",
        "pass",
        ("snapshot",),
    ),
]

COLLECTOR = [
    Mutant(
        "actions are clipped before their density is taken",
        "spaces.py",
        "np.minimum(np.maximum(raw, self._low), self._high)",
        "np.clip(raw, self._low, self._high, out=raw)",
        ("spaces", "collector"),
    ),
    Mutant(
        "actions leave the bounds of the space",
        "spaces.py",
        "np.minimum(np.maximum(raw, self._low), self._high)",
        "raw",
        ("spaces", "collector"),
    ),
    Mutant(
        "classes do not begin where the space says",
        "spaces.py",
        "(raw + self._start)",
        "raw",
        ("spaces", "collector"),
    ),
    Mutant(
        "the last observation is not copied before the reset",
        "collector/columns.py",
        "last = np.array(obs, self._obs_dtype)",
        "last = np.asarray(obs, self._obs_dtype)",
        ("collector",),
    ),
    Mutant(
        "a terminated step bootstraps too",
        "collector/columns.py",
        "if not terminated:",
        "if True:",
        ("collector",),
    ),
    Mutant(
        "a truncated step bootstraps from the observation after the reset",
        "collector/collector.py",
        "next_values[steps, envs] = final_values",
        "pass",
        ("collector",),
    ),
    Mutant(
        "a terminated step keeps a value of its successor",
        "collector/collector.py",
        'next_values[rows["terminated"]] = 0.0',
        "pass",
        ("collector",),
    ),
    Mutant(
        "the values of successors are those of the step itself",
        "collector/collector.py",
        "torch.cat([values[1:], last_values.unsqueeze(0)])",
        "torch.cat([values[:-1], last_values.unsqueeze(0)])",
        ("collector",),
    ),
    Mutant(
        "a rollout begins where the one before began",
        "collector/collector.py",
        "old.obs[self._last_row]",
        "old.obs[0]",
        ("collector",),
    ),
    Mutant(
        "a rollout shares its memory with the next",
        "collector/collector.py",
        "torch.from_numpy(array.copy())",
        "torch.from_numpy(array)",
        ("collector",),
    ),
    Mutant(
        "every environment gets the noise of the last",
        "collector/collector.py",
        "buffers.noise[:num_steps, index] = values",
        "buffers.noise[:num_steps] = values[:, None]",
        ("collector",),
    ),
    Mutant(
        "the return of an episode goes on into the next",
        "collector/columns.py",
        "self._lengths[index] = seed, 0.0, 0",
        "self._lengths[index] = seed, self._returns[index], 0",
        ("collector",),
    ),
    Mutant(
        "all episodes are the same",
        "collector/columns.py",
        "seed = draw_seed(self._seeds[index])",
        "seed = 0",
        ("collector",),
    ),
    Mutant(
        "rows that only reset count as transitions",
        "collector/vector_columns.py",
        "valid = ~self._resetting",
        "valid = np.ones_like(self._resetting)",
        ("vector_columns",),
    ),
    Mutant(
        "SAME_STEP bootstraps from the observation after the reset",
        "collector/vector_columns.py",
        'return infos["final_obs"][column]',
        "return obs[column]",
        ("vector_columns",),
    ),
    Mutant(
        "what acts in a worker depends on which environments are its own",
        "collector/acting.py",
        "columns.first // GROUP_SIZE * GROUP_SIZE",
        "columns.first",
        ("workers", "snapshot", "agent"),
    ),
    Mutant(
        "minibatches are drawn from the global generator",
        "rollout.py",
        "torch.randperm(rows, generator=generator)",
        "torch.randperm(rows)",
        ("rollout",),
    ),
    Mutant(
        "every field of a minibatch is shuffled by itself",
        "rollout.py",
        "tensor[order] for name",
        "tensor[torch.randperm(rows, generator=generator)] for name",
        ("rollout",),
    ),
    Mutant(
        "minibatches are larger than asked for",
        "rollout.py",
        "-(-rows // minibatch_size)",
        "max(rows // minibatch_size, 1)",
        ("rollout",),
    ),
    Mutant(
        "rows that are no transition are learned from",
        "rollout.py",
        "if bool(self.valid.all()):",
        "if True:",
        ("rollout",),
    ),
    Mutant(
        "a value of a successor may be NaN",
        "rollout.py",
        '"next_values", "log_probs")',
        '"log_probs")',
        ("rollout", "agent"),
    ),
    Mutant(
        "a NaN that nobody reads is refused",
        "rollout.py",
        "self.valid & ~self.terminated if",
        "self.valid if",
        ("rollout", "agent"),
    ),
    Mutant(
        "rows that only reset lengthen an episode",
        "collector/vector_columns.py",
        "self._lengths[valid] += 1",
        "self._lengths += 1",
        ("vector_columns",),
    ),
]

CHECKPOINT = [
    Mutant(
        "the file is not flushed to the disk",
        "checkpoint.py",
        "os.fsync(file.fileno())",
        "pass",
        ("checkpoint",),
    ),
    Mutant(
        "the new name is not flushed to the disk",
        "checkpoint.py",
        "os.fsync(fd)",
        "pass",
        ("checkpoint",),
    ),
    Mutant(
        "what the disk kept is not read back",
        "checkpoint.py",
        "if temporary.read_bytes() != data:",
        "if False:",
        ("checkpoint",),
    ),
    Mutant(
        "the old file is written over",
        "checkpoint.py",
        "os.replace(temporary, path)",
        "path.write_bytes(data), temporary.unlink()",
        ("checkpoint",),
    ),
    Mutant(
        "a checksum that does not match is accepted",
        "checkpoint.py",
        'if metadata.get("sha256") != _digest(tensors, text):',
        "if False:",
        ("checkpoint",),
    ),
    Mutant(
        "the checksum leaves the document out",
        "checkpoint.py",
        "hashlib.sha256(document.encode())",
        "hashlib.sha256()",
        ("checkpoint",),
    ),
    Mutant(
        "any version of the format is read",
        "checkpoint.py",
        "if version != str(FORMAT_VERSION):",
        "if False:",
        ("checkpoint",),
    ),
    Mutant(
        "NaN is saved",
        "checkpoint.py",
        "not bool(torch.isfinite(tensor).all())",
        "False",
        ("checkpoint",),
    ),
    Mutant(
        "a loaded agent plays the episodes of the first call again",
        "agent.py",
        '"learn_calls": self._learn_calls',
        '"learn_calls": 0',
        ("agent",),
    ),
    Mutant(
        "a loaded agent draws its minibatches anew",
        "agent.py",
        'agent._generator.set_state(groups["generators"]["minibatches"])',
        "pass",
        ("agent",),
    ),
    Mutant(
        "an update that fails has moved the reward scaler",
        "agent.py",
        "copy.deepcopy(self._reward_scaler)",
        "self._reward_scaler",
        ("agent",),
    ),
    Mutant(
        "the statistics of observations move before the policy learns",
        "agent.py",
        "rollout.check_finite()",
        "rollout.check_finite()\n"
        '        if hasattr(self.policy, "update_normalizer"):\n'
        "            self.policy.update_normalizer(rollout.flatten().obs)",
        ("agent",),
    ),
    Mutant(
        "the folder is flushed before the file has its name",
        "checkpoint.py",
        "os.replace(temporary, path)\n        _sync_folder(path.parent)",
        "_sync_folder(path.parent)\n        os.replace(temporary, path)",
        ("checkpoint",),
    ),
    Mutant(
        "a save that fails leaves its file behind",
        "checkpoint.py",
        "temporary.unlink()",
        "pass",
        ("checkpoint",),
    ),
    Mutant(
        "the returns of a call of learn go on into the next",
        "agent.py",
        "self._reward_scaler.reset(collector.num_envs)",
        "pass",
        ("agent",),
    ),
    Mutant(
        "every call of learn plays the same episodes",
        "agent.py",
        "spawn_key=(3, self._learn_calls)",
        "spawn_key=(3, 0)",
        ("agent",),
    ),
    Mutant(
        "rows that only reset count in the scale of rewards",
        "agent.py",
        "rollout.truncated, rollout.valid)",
        "rollout.truncated)",
        ("agent",),
    ),
    Mutant(
        "rows that only reset count in the mean advantage",
        "agent.py",
        "normalize(advantages, rollout.valid)",
        "normalize(advantages)",
        ("agent",),
    ),
    Mutant(
        "rows that only reset count in the explained variance",
        "agent.py",
        "explained_variance(rollout.values, returns, rollout.valid)",
        "explained_variance(rollout.values, returns)",
        ("agent",),
    ),
]

LEARNER = [
    Mutant(
        "an update ends when the KL is small",
        "learner/learner.py",
        'epoch["approx_kl"] > self._target_kl',
        'epoch["approx_kl"] < self._target_kl',
        ("learner",),
    ),
    Mutant(
        "an update that fails leaves its steps behind",
        "learner/learner.py",
        "undo.apply()\n                raise",
        "raise",
        ("learner",),
    ),
    Mutant(
        "rows carry the history of whoever collected them",
        "learner/learner.py",
        "rows.detach() for name",
        "rows for name",
        ("learner",),
    ),
    Mutant(
        "the advantages of a minibatch are not normalised",
        "learner/eager.py",
        "advantages = normalize(advantages)",
        "pass",
        ("recorded", "learner"),
    ),
    Mutant(
        "only rows beyond the clip pull",
        "learner/numpy_loss.py",
        "surrogate <= clipped",
        "surrogate > clipped",
        ("recorded", "learner"),
    ),
    Mutant(
        "rows beyond the limit of the log-ratio pull",
        "learner/numpy_loss.py",
        "pulls &= log_ratio == difference",
        "pass",
        ("recorded", "learner"),
    ),
    Mutant(
        "the value clip stops the wrong rows",
        "learner/numpy_loss.py",
        "(other > square)",
        "(other < square)",
        ("recorded", "learner"),
    ),
    Mutant(
        "the recorded gradient punishes entropy",
        "learner/recorded.py",
        "fill(-settings.entropy_coef",
        "fill(settings.entropy_coef",
        ("recorded", "learner"),
    ),
    Mutant(
        "gradients are not clipped",
        "learner/flat_adam.py",
        "if norm + 1e-6 > limit:",
        "if False:",
        ("flat_adam",),
    ),
    Mutant(
        "Adam forgets squares ten times as fast",
        "learner/flat_adam.py",
        "(0.9, 0.999)",
        "(0.9, 0.99)",
        ("flat_adam",),
    ),
    Mutant(
        "Adam does not count its steps",
        "learner/flat_adam.py",
        "self._step_count.numpy()[...] += 1.0",
        "pass",
        ("flat_adam",),
    ),
    Mutant(
        "metrics are those of the last epoch",
        "learner/learner.py",
        "return _means(records)",
        "return epoch",
        ("learner",),
    ),
    Mutant(
        "the values are clipped around themselves",
        "learner/eager.py",
        "old_values=batch.values",
        "old_values=new.values",
        ("recorded", "learner"),
    ),
    Mutant(
        "a recording without entropy serves an update with it",
        "learner/recorded.py",
        "actions.dtype, settings.entropy_coef != 0.0",
        "actions.dtype",
        ("recorded", "learner"),
    ),
    Mutant(
        "a policy that was exchanged is replayed as it was",
        "learner/recorded.py",
        "if fingerprint != self._fingerprint:",
        "if self._fingerprint is None:",
        ("recorded", "learner"),
    ),
    Mutant(
        "the rounding of equal advantages is blown up",
        "learner/numpy_loss.py",
        "variance <= noise * noise",
        "variance <= 0.0",
        ("recorded", "learner"),
    ),
    Mutant(
        "the moments of a parameter that stays are lost",
        "learner/flat_adam.py",
        "ours.copy_(old)",
        "pass",
        ("flat_adam", "learner"),
    ),
    Mutant(
        "gradients are clipped at half the limit",
        "learner/flat_adam.py",
        "_clip_on_cpu(gradient.numpy(), max_grad_norm)",
        "_clip_on_cpu(gradient.numpy(), max_grad_norm / 2)",
        ("flat_adam",),
    ),
]

MUTANTS = [
    *ADVANTAGES,
    *STATISTICS,
    *SCHEDULES,
    *LOSSES,
    *DISTRIBUTIONS,
    *COLLECTOR,
    *CHECKPOINT,
    *LEARNER,
]


def stale(mutant: Mutant, text: str) -> str:
    """Say what keeps a mutant from being applied to the text of its file; empty if nothing."""
    count = text.count(mutant.old)
    if count == 1 and mutant.old != mutant.new:
        return ""
    return f"{mutant.breaks}: {mutant.old!r} occurs {count} times in ppo/{mutant.file}, wanted once"
