"""Learning probes: tiny environments with known answers, each learned in seconds.

A policy that fails one of them will not learn anything larger, and the one it fails says what is
wrong with it. The first five are Andy Jones' ("Debugging RL, Without the Agonizing Pain", 2021)::

    for result in run_probes(make_policy):
        print(result)
"""

from ppo.probes.catalogue import PROBES, find_probes, run_probes
from ppo.probes.probe import Answer, Probe, ProbeResult, Return, Values

__all__ = [
    "PROBES",
    "Answer",
    "Probe",
    "ProbeResult",
    "Return",
    "Values",
    "find_probes",
    "run_probes",
]
