"""Every public name is documented, with its arguments and an example."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import ppo
from ppo.config import PPOConfig

DOCS = Path(__file__).parent.parent / "docs"
MODULES = [
    "diagnostics",
    "errors",
    "losses",
    "policies",
    "policies.heads",
    "distributions",
    "rollout",
    "sequences",
    "frames",
    "spaces",
    "trees",
    "schedules",
    "statistics",
]
MODULES += ["probes", "probes.environments"]
# Users are handed these; they don't make them.
GIVEN = {"ActorCritic", "EvaluationResult", "PolicyState", "Report", "Rollout"}
FUNCTIONS = [name for name in ppo.__all__ if inspect.isfunction(getattr(ppo, name))]
CLASSES = [name for name in ppo.__all__ if inspect.isclass(getattr(ppo, name))]


def documented():
    """Full names of what the reference documents, such as `ppo.gae` and `ppo.policies.MLP`."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("api/*.rst"))
    names = re.findall(
        r"^\.\. (?:auto(?:class|function|exception)|py:data):: (ppo\.\S+)$", pages, re.MULTILINE
    )
    assert len(names) == len(set(names)), "documented twice"
    for module in re.findall(r"^\.\. automodule:: (ppo\.\S+)$", pages, re.MULTILINE):
        names += [module, *(f"{module}.{name}" for name in importlib.import_module(module).__all__)]
    return set(names)


def parameters(function):
    """Names of the arguments that have one."""
    arguments = inspect.signature(function).parameters.values()
    return [argument.name for argument in arguments if argument.kind != argument.VAR_KEYWORD]


def test_the_public_names_are_the_documented_ones():
    assert {f"ppo.{name}" for name in ppo.__all__} == {n for n in documented() if n.count(".") == 1}


@pytest.mark.parametrize("module", MODULES)
def test_every_name_of_a_documented_module_is_documented(module):
    names = importlib.import_module(f"ppo.{module}").__all__
    there = documented()
    assert [n for n in names if not {f"ppo.{n}", f"ppo.{module}.{n}"} & there] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_documents_its_arguments_and_shows_an_example(name):
    function = getattr(ppo, name)
    text = inspect.getdoc(function)
    for argument in parameters(function):
        assert re.search(rf"^    {argument}: ", text, re.MULTILINE), argument
    assert ">>> " in text


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_documents_its_fields_and_shows_an_example_if_users_make_it(name):
    cls = getattr(ppo, name)
    text = inspect.getdoc(cls)
    if issubclass(cls, Exception) or getattr(cls, "_is_protocol", False):
        assert text
        return
    fields = getattr(cls, "_fields", None) or getattr(cls, "__dataclass_fields__", None)
    for field in fields or parameters(cls):
        assert re.search(rf"^    {field}: ", text, re.MULTILINE), field
    if not hasattr(cls, "_fields") and name not in GIVEN:
        assert ">>> " in text


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_method_has_a_docstring(name):
    cls = getattr(ppo, name)
    methods = [
        member
        for attribute, member in vars(cls).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property | classmethod))
    ]
    for method in methods:
        assert inspect.getdoc(getattr(method, "__func__", method)), method


def classes_in(hint):
    """The classes that an annotation names, at any depth."""
    if inspect.isclass(hint):
        yield hint
    for argument in get_args(hint):
        for part in argument if isinstance(argument, list) else [argument]:
            yield from classes_in(part)


def annotations(name):
    """Annotations of what a public name takes, holds and returns."""
    thing = getattr(ppo, name)
    members = [thing]
    if inspect.isclass(thing):
        members += [
            getattr(member, "fget", None) or getattr(member, "__func__", member)
            for attribute, member in vars(thing).items()
            if attribute in ("__init__", "__call__") or not attribute.startswith("_")
        ]
    for member in members:
        if inspect.isclass(member) or inspect.isfunction(member):
            yield from get_type_hints(member, localns=KNOWN).items()


def known():
    """What annotations that are texts may name: whatever some module of the library knows."""
    names = {}
    for module in pkgutil.walk_packages(ppo.__path__, "ppo."):
        if not module.name.endswith("__main__"):
            names |= vars(importlib.import_module(module.name))
    return names | {"Env": Any, "EnvLike": Any}  # texts themselves, which no union takes


KNOWN = known()


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_whatever_a_public_name_takes_or_returns_is_documented(name):
    there = {full.rpartition(".")[2] for full in documented()}
    named = {
        cls.__name__
        for argument, hint in annotations(name)
        if not argument.startswith("_")
        for cls in classes_in(hint)
        if cls.__module__.partition(".")[0] == "ppo"
    }
    assert named <= there


def test_annotations_are_looked_through():
    named = {cls for _, hint in annotations("RolloutCollector") for cls in classes_in(hint)}
    assert {ppo.Rollout, ppo.Policy, KNOWN["CollectorState"]} <= named
    named = {cls for _, hint in annotations("PPOAgent") for cls in classes_in(hint)}
    assert {ppo.PPOConfig, ppo.PolicyState, ppo.Report} <= named


def test_every_setting_is_documented_with_its_group():
    for cls in (PPOConfig, ppo.PolicyConfig):
        text = inspect.getdoc(cls)
        for name in get_type_hints(cls):
            assert re.search(rf"^    {name}: ", text, re.MULTILINE), name


def test_the_yaml_file_of_the_guide_is_a_configuration(tmp_path):
    page = (DOCS / "guide" / "runs.rst").read_text(encoding="utf-8")
    block = re.search(r"^\.\. code-block:: yaml\n\n((?:    .*\n|\n)+)", page, re.MULTILINE)[1]
    path = tmp_path / "my.yaml"
    path.write_text(inspect.cleandoc(block), encoding="utf-8")
    assert PPOConfig.from_yaml(path).learning_rate(0.0) == 1e-3


def test_every_python_block_of_the_pages_is_python():
    blocks = [
        block
        for page in DOCS.rglob("*.rst")
        for block in re.findall(
            r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)",
            page.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    ]
    assert blocks
    for block in blocks:
        compile(inspect.cleandoc(block), "docs", "exec")


def test_every_guarantee_names_tests_that_are_there():
    page = (DOCS / "guide" / "guarantees.rst").read_text(encoding="utf-8")
    modules = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    known = set(re.findall(r"^def (test_\w+)\(", "\n".join(modules), re.MULTILINE))
    named = re.findall(r"``(test_\w+)``", page)
    assert set(named) <= known
    assert len(named) > 30
