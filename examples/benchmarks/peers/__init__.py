"""One module per library. Each has

    train(workload, num_updates, seed, tick, **variant) -> act

which trains in the way the library's own documentation shows, calls `tick()` after every update,
and returns a function from raw observations `[B, ...]` to the actions the trained agent takes.
"""

OURS = {
    "ppo": ("peers.ppo_agent", {}),
    "ppo-0-workers": ("peers.ppo_agent", {"num_workers": 0}),
    "ppo-2-workers": ("peers.ppo_agent", {"num_workers": 2}),
    "ppo-own-module": ("peers.ppo_agent", {"own_module": True}),
    "ppo-lstm": ("peers.ppo_agent", {"memory": "lstm"}),
    "ppo-lstm-shared": ("peers.ppo_agent", {"memory": "lstm", "shared": True}),
    "ppo-gru": ("peers.ppo_agent", {"memory": "gru"}),
    "ppo-bfloat16": ("peers.ppo_agent", {"precision": "bfloat16"}),
}

OTHERS = {
    "sb3": ("peers.sb3", {}),
    "skrl": ("peers.skrl_agent", {}),
    "rsl_rl": ("peers.rsl_rl_runner", {}),
    "tianshou": ("peers.tianshou_agent", {}),
    "torchrl": ("peers.torchrl_loop", {}),
    "plain-torch": ("peers.plain_torch", {}),
    "plain-torch-compiled": ("peers.plain_torch", {"compiled": True}),
}

PEERS = OURS | OTHERS

# The others are written here for vectors only.
FOR_PIXELS = {"ppo", "ppo-0-workers", "ppo-2-workers", "ppo-bfloat16", "sb3"}
FOR_VECTORS = set(PEERS) - {"ppo-bfloat16"}


class UnsupportedError(Exception):
    """The library has no way to do what the workload asks for."""
