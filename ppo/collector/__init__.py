"""Collecting rollouts from parallel environments, in this process or in several."""

from ppo.collector.collector import RolloutCollector
from ppo.collector.collector_state import CollectorState
from ppo.collector.making import open_columns

__all__ = ["CollectorState", "RolloutCollector", "open_columns"]
