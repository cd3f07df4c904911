"""`ppo check`: the learning probes, for the default policy or for one in a file."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ppo.errors import ConfigError
from ppo.probes import Probe, ProbeResult, find_probes

__all__ = ["check", "load_function"]

FUNCTION = "make_policy"
"""The function that is looked for where none is named."""


def check(source: str | None, names: list[str] | None, seed: int) -> int:
    """Run the probes, with a line for each.

    Args:
        source: `FILE.py` or `FILE.py:FUNCTION`; None takes the default policy.
        names: Which probes; None or none runs all.
        seed: Seeds weights, training and judgement.

    Returns:
        The exit status: 0 if probes were solved and none failed.

    Raises:
        ConfigError: There is no such file, function or probe.
    """
    make_policy = None if source is None else load_function(source)
    try:
        probes = find_probes(names or None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    width = max(len(probe.name) for probe in probes)
    results = []
    for probe in probes:
        result = probe.run(make_policy, seed=seed)
        _print(probe, result, width)
        results.append(result)
    counts = {
        outcome: sum(result.outcome == outcome for result in results)
        for outcome in ("solved", "failed", "not applicable")
    }
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()), flush=True)
    return 0 if counts["solved"] and not counts["failed"] else 1


def _print(probe: Probe, result: ProbeResult, width: int) -> None:
    said = result.measured or result.explanation
    print(f"{probe.name:<{width}}  {result.outcome:<14}  {result.seconds:5.1f} s  {said}")
    if result.outcome == "failed":
        print(f"{'':<{width}}  it tests: {probe.tests}")
        if result.measured:
            print(f"{'':<{width}}  usually means: {result.explanation}")
    sys.stdout.flush()
    if result.error is not None:
        traceback.print_exception(result.error)


def load_function(source: str) -> Callable[..., Any]:
    """Run a Python file and return a function of it.

    Args:
        source: `FILE.py`, whose `make_policy` is meant, or `FILE.py:FUNCTION`.

    Raises:
        ConfigError: There is no such file, or no such function in it.
    """
    stem, _, given = source.partition(".py:")
    path, name = Path(f"{stem}.py" if given else source), given or FUNCTION
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(
            f"there is no Python file {str(path)!r}; give FILE.py or FILE.py:FUNCTION"
        )
    function: Any = getattr(_run_file(path), name, None)
    if not callable(function):
        raise ConfigError(
            f"{path} has no function {name!r}; define `def {name}(observation_space, "
            f"action_space)` there, or name another one as {path}:FUNCTION"
        )
    return cast(Callable[..., Any], function)


def _run_file(path: Path) -> Any:
    """The module that a file defines; it may import what lies beside it."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"checked_{path.stem}"  # a file random.py must not take the place of that module
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    module = importlib.util.module_from_spec(cast(importlib.machinery.ModuleSpec, spec))
    sys.modules[name] = module  # where dataclasses and pickle look for it
    loader.exec_module(module)
    return module
