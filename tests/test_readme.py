"""The README says what is so: its code runs, its commands and links exist."""

import re
from pathlib import Path

import pytest

from ppo.cli.arguments import parse_arguments
from ppo.config import PPOConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def custom_loop():
    (block,) = [block for block in blocks("python") if "RolloutCollector(" in block]
    return block


def cut_short(code):
    """The same code with rollouts' worth of steps and two episodes."""
    code, steps = re.subn(r"\b\d{2,3}_000\b", "512", code)
    code, episodes = re.subn(r"episodes=100\b", "episodes=2", code)
    assert steps or episodes, "nothing to shorten: adapt this test to the README"
    return code


def test_every_python_block_runs_after_those_before_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(compile(cut_short(block), "README.md", "exec"), names)
    assert capsys.readouterr().out.count("over 2 episodes") == 2
    assert names["agent"].steps > 512


def test_the_custom_loop_is_the_example():
    assert custom_loop() == (ROOT / "examples" / "custom_loop.py").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_the_custom_loop_trains_cartpole_to_475(seed, capsys):
    code, count = re.subn(r"(?<=seed[=(])0", seed, custom_loop())
    assert count == 3
    exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[0]) >= 475


def test_the_yaml_block_is_a_configuration(tmp_path):
    (block,) = blocks("yaml")
    path = tmp_path / "my.yaml"
    path.write_text(block, encoding="utf-8")
    config = PPOConfig.from_yaml(path)
    assert (config.env, config.steps) == ("Pendulum-v1", 200_000)


def test_every_command_is_one_the_command_line_knows():
    lines = [line for block in blocks("console") for line in block.splitlines()]
    typed = [line.partition("#")[0].split() for line in lines]
    commands = [words[1:] for words in typed if words[:1] == ["ppo"]]
    known = {parse_arguments(words).command for words in commands}
    assert known == {"train", "resume", "evaluate", "play", "export", "plot", "check", "configs"}


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).is_file()]
    assert not missing


def test_the_picture_is_small():
    assert (ROOT / "docs" / "_static" / "pendulum.png").stat().st_size < 100_000


def test_nobody_is_told_to_install_the_package_of_a_stranger():
    pages = [path for glob in ("*.md", "docs/**/*.rst", "ppo/**/*.py") for path in ROOT.glob(glob)]
    told = [
        line
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install .*?\bppo\b(?!-gae)", line.partition("&&")[0])
    ]
    assert len(pages) > 50
    assert not told
