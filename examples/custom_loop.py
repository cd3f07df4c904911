import torch

from ppo import RolloutCollector, evaluate, gae, make_policy, normalize, ppo_loss

torch.set_num_threads(1)  # faster for small networks
STEPS = 100_000

generator = torch.Generator().manual_seed(0)
with RolloutCollector("CartPole-v1", num_envs=8, seed=0) as collector:
    policy = make_policy(collector.observation_space, collector.action_space, seed=0)
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5)
    steps = 0
    while steps < STEPS:
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - steps / STEPS)
        rollout = collector.collect(policy, num_steps=32)
        advantages, returns = gae(
            rollout.rewards,
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.truncated,
            gamma=0.98,
            gae_lambda=0.8,
        )
        advantages = normalize(advantages, rollout.valid)
        batch = rollout.flatten(advantages=advantages, returns=returns)  # [T, N] -> [B]
        for _ in range(20):
            for mini in batch.minibatches(256, generator):
                new = policy.evaluate(mini.obs, mini.actions)
                loss = ppo_loss(
                    new.log_probs, mini.log_probs, mini.advantages, new.values, mini.returns
                )
                optimizer.zero_grad()
                loss.total.backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
                optimizer.step()
        policy.update_normalizer(batch.obs)
        steps += rollout.num_transitions

print(evaluate(policy, "CartPole-v1", episodes=100))
