"""Collecting rollouts from parallel environments, in this process or in several."""

from ppo.collector.collector import RolloutCollector, open_columns

__all__ = ["RolloutCollector", "open_columns"]
