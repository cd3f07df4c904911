"""Collecting rollouts from parallel environments, in this process or in several."""

from ppo.collector.collector import RolloutCollector, open_columns
from ppo.collector.collector_state import CollectorState

__all__ = ["CollectorState", "RolloutCollector", "open_columns"]
