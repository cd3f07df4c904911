"""TorchRL, put together as its examples do. Its scaled rewards are also centred."""

import gymnasium
import torch
from tensordict import TensorDict
from tensordict.nn import AddStateIndependentNormalScale, TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    GymEnv,
    SerialEnv,
    TransformedEnv,
    VecNormV2,
)
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from peers import UnsupportedError


def train(workload, num_updates, seed, tick):
    if workload.decay:
        raise UnsupportedError("no schedule of the clip range")
    torch.manual_seed(seed)
    spec = gymnasium.make(workload.env)
    size, action_space = spec.observation_space.shape[0], spec.action_space
    spec.close()
    discrete = isinstance(action_space, gymnasium.spaces.Discrete)

    def make_env():
        return GymEnv(workload.env, device="cpu", categorical_action_encoding=True)

    transforms = [DoubleToFloat()]
    normalizer = VecNormV2(in_keys=["observation"], decay=1.0)
    if workload.normalize:
        transforms += [normalizer, VecNormV2(in_keys=["reward"], decay=1.0)]
    env = TransformedEnv(SerialEnv(workload.num_envs, make_env), Compose(*transforms))
    env.set_seed(seed)

    def mlp(num_outputs):
        return MLP(
            in_features=size,
            out_features=num_outputs,
            num_cells=[workload.hidden_size, workload.hidden_size],
            activation_class=nn.Tanh,
        )

    if discrete:
        net = TensorDictModule(mlp(int(action_space.n)), ["observation"], ["logits"])
        family = {"in_keys": ["logits"], "distribution_class": Categorical}
    else:
        num_actions = action_space.shape[0]
        body = nn.Sequential(mlp(num_actions), AddStateIndependentNormalScale(num_actions))
        net = TensorDictModule(body, ["observation"], ["loc", "scale"])
        family = {"in_keys": ["loc", "scale"], "distribution_class": IndependentNormal}
    actor = ProbabilisticActor(net, **family, return_log_prob=True, spec=env.action_spec)
    critic = ValueOperator(mlp(1), in_keys=["observation"])
    advantage = GAE(
        gamma=workload.gamma,
        lmbda=workload.gae_lambda,
        value_network=critic,
        average_gae=False,
    )
    loss_module = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=workload.clip_range,
        entropy_bonus=False,
        critic_coeff=workload.value_coef,
        loss_critic_type="l2",
        normalize_advantage=True,
    )
    optimizer = torch.optim.Adam(
        loss_module.parameters(), lr=workload.learning_rate, eps=workload.adam_eps
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(workload.rollout_size),
        sampler=SamplerWithoutReplacement(),
        batch_size=workload.minibatch_size,
    )
    collector = Collector(
        env,
        actor,
        frames_per_batch=workload.rollout_size,
        total_frames=num_updates * workload.rollout_size,
        auto_register_policy_transforms=True,
    )
    for data in collector:
        with torch.no_grad():
            advantage(data)
        buffer.empty()
        buffer.extend(data.reshape(-1))
        for _ in range(workload.num_epochs):
            for batch in buffer:
                losses = loss_module(batch)
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"]).backward()
                nn.utils.clip_grad_norm_(loss_module.parameters(), workload.max_grad_norm)
                optimizer.step()
        tick()
    collector.shutdown()

    @torch.no_grad()
    def act(obs):
        obs = torch.as_tensor(obs, dtype=torch.float32)
        if workload.normalize:
            obs = normalizer.to_observation_norm()._apply_transform(obs)
        outputs = net(TensorDict({"observation": obs}, batch_size=[len(obs)]))
        return (outputs["logits"].argmax(-1) if discrete else outputs["loc"]).numpy()

    return act
