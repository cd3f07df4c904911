"""Imports point down only, names are in order, and importing the library does nothing else."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ppo"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up. A module may import from its own floor and from those below it.
FLOORS = [
    {
        "_version",
        "errors",
        "_allocator",
        "_checks",
        "_files",
        "_hooks",
        "_masks",
        "_modes",
        "_reductions",
        "_scan",
        "_threads",
        "packing",
        "trees",
    },
    {"advantages", "losses", "diagnostics", "distributions", "statistics", "schedules"},
    {
        "frames",
        "sequences",
        "rollout",
        "revaluation",
        "report",
        "progress",
        "spaces",
        "atari",
        "envs",
        "policies",
        "config_parsing",
        "nearest",
        "recording",
    },
    {"collector", "learner", "config", "checkpoint"},
    {"evaluation", "acting", "persistence", "assembly", "agent", "export"},
    {"probes"},
    {"cli"},
    {"__init__", "__main__"},
]
GROUND = FLOORS[1]


def module_of(path):
    """`ppo/collector/pool.py` -> `collector.pool`, `ppo/policies/__init__.py` -> `policies`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)


def imported(path):
    """Full names of the modules and names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = {module_of(path): path for path in SOURCES}


def own_imports(module):
    """Modules of the library that a module imports."""
    found = set()
    for name in imported(MODULES[module]):
        if name.partition(".")[0] == "ppo":
            parts = name.split(".")[1:]
            while parts and ".".join(parts) not in MODULES:
                parts.pop()
            found.add(".".join(parts) or "__init__")
    return found - {module}


def floor(module):
    top = module.partition(".")[0]
    (number,) = [number for number, modules in enumerate(FLOORS) if top in modules]
    return number


def test_every_module_has_a_place_in_the_layout():
    assert {module.partition(".")[0] for module in MODULES} == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_only(module):
    assert [name for name in own_imports(module) if floor(name) > floor(module)] == []


def test_imports_have_no_cycle():
    waiting = {module: own_imports(module) for module in MODULES}
    # A package imports its modules; a module that names its package imports from beside it.
    while waiting:
        free = {module for module, needed in waiting.items() if not needed & waiting.keys()}
        assert free, f"a cycle among {sorted(waiting)}"
        for module in free:
            del waiting[module]


@pytest.mark.parametrize("module", [m for m in MODULES if m.partition(".")[0] in GROUND])
def test_the_ground_knows_mathematics_only(module):
    """Apart from the lowest floor, modules of a package know their own package only."""
    own = module.partition(".")[0]
    others = {name for name in own_imports(module) if name.partition(".")[0] != own}
    assert {floor(name) for name in others} <= {0}
    outside = {name.partition(".")[0] for name in imported(MODULES[module])} - {"ppo"}
    assert not outside & {"gymnasium", "multiprocessing", "os", "random", "threading", "time"}


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("collector")])
def test_the_collector_knows_a_policy_as_a_protocol_only(module):
    allowed = ("_checks", "envs", "errors", "rollout", "spaces", "policies.protocol", "trees")
    allowed += ("collector", "recording", "frames", "sequences", "policies.state", "revaluation")
    allowed += ("packing", "_modes")
    assert [name for name in own_imports(module) if not name.startswith(allowed)] == []


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("learner")])
def test_the_learner_knows_neither_environments_nor_a_concrete_policy(module):
    allowed = ("learner", "recording", "rollout", "sequences", "policies.protocol")
    allowed += (*GROUND, *FLOORS[0])
    assert [name for name in own_imports(module) if not name.startswith(allowed)] == []


def test_the_learner_uses_the_public_losses():
    modules = [module for module in MODULES if module.startswith("learner")]
    assert "losses" in set().union(*map(own_imports, modules))


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_no_module_is_long_or_hides_an_import_from_the_interpreter(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    assert "TYPE_CHECKING" not in text


MAKES_CODE = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "shelve", "dill"}
MAKES_CODE |= {"torch.load", "np.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_makes_code_of_data(module):
    """But for the factories that a parent sends to its workers, and for programs under test."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    used = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used |= {name.partition(".")[0] for name in imported(MODULES[module])}
    assert not used & MAKES_CODE
    assert ("cloudpickle.loads" in used) == (module == "collector.worker")


def in_order(name):
    """Constants, classes, functions, each by the alphabet: the order ruff keeps."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2, name


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__main__", "_version", "__init__"}))
def test_a_module_lists_its_names_in_order(module):
    names = getattr(importlib.import_module(f"ppo.{module}"), "__all__", None)
    if names is None:
        assert module.startswith("_")
        return
    assert names == sorted(set(names), key=in_order)


def test_the_package_lists_its_names_in_order_and_has_them():
    import ppo

    assert ppo.__all__ == sorted(set(ppo.__all__), key=in_order)
    assert [name for name in ppo.__all__ if not hasattr(ppo, name)] == []


IMPORT = """
import os, random, sys, threading
import numpy, torch
state = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
threads, torch_threads = threading.active_count(), torch.get_num_threads()
import ppo
assert state == (
    random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
), "a global generator moved"
assert threading.active_count() == threads, "a thread was started"
assert torch.get_num_threads() == torch_threads, "a setting of torch changed"
assert "multiprocessing.process" not in sys.modules or not (
    sys.modules["multiprocessing.process"].active_children()
), "a process was started"
heavy = {"matplotlib", "tensorboard", "moviepy", "pygame", "Box2D", "mujoco", "ale_py", "onnx"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert os.listdir() == [], "a file was written"
"""


def test_importing_the_library_has_no_side_effects(tmp_path):
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", path + IMPORT], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_the_oldest_versions_that_are_tested_are_the_ones_that_are_required():
    pinned = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8")
    stated = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.search(r"^dependencies = \[\n(.*?)^\]", stated, re.MULTILINE | re.DOTALL)
    minima = re.findall(r'"(\S+)>=(\S+)"', required[1])
    assert minima
    assert sorted(minima) == sorted(re.findall(r"^(\S+)==(\S+)$", pinned, re.MULTILINE))
