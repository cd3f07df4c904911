from pathlib import Path

import pytest
from mutants.listed import MUTANTS, stale

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_a_mutant_finds_its_line_exactly_once(mutant):
    assert stale(mutant, (ROOT / "ppo" / mutant.file).read_text(encoding="utf-8")) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_a_mutant_is_a_program_and_names_tests_that_exist(mutant):
    text = (ROOT / "ppo" / mutant.file).read_text(encoding="utf-8")
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert mutant.tests
    for module in mutant.tests:
        assert (ROOT / "tests" / f"test_{module}.py").exists()


def test_a_text_that_moved_is_named():
    mutant = MUTANTS[0]
    for text in ("", 2 * mutant.old):
        assert mutant.breaks in stale(mutant, text)
    assert stale(mutant, mutant.old) == ""


def test_there_are_enough_mutants_and_no_two_are_alike():
    assert len(MUTANTS) >= 40
    assert len({mutant.breaks for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
