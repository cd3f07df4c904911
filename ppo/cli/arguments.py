"""The arguments of the command `ppo`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

import torch

from ppo._version import __version__

__all__ = ["natural", "parse_arguments"]

_EXAMPLES = """\
examples:
  ppo configs                                      what can be trained without writing a file
  ppo train pendulum                               train a shipped configuration
  ppo train my.yaml steps=1e6 policy.activation=relu --seed 3
                                                   train a file, with two settings changed
  ppo resume runs/pendulum-20260101-120000-seed0   go on after an interruption
  ppo evaluate runs/pendulum-20260101-120000-seed0
  ppo play runs/pendulum-20260101-120000-seed0 --video pendulum.gif
  ppo plot runs/pendulum-*                         several seeds in one picture
  ppo check my_policy.py                           can this policy learn? tiny tasks tell

exit status: 0 done, 1 failed, 2 wrong usage, configuration or environment, 130 after Ctrl-C, 143
after SIGTERM
"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the words behind `ppo`; a wrong one ends the process as argparse does.

    Args:
        argv: The words.

    Returns:
        What was given or is the default; `command` names the subcommand, `command_line` is all.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one piece; overrides may stand among the options.
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray or (rest and args.command != "train"):
        words = " ".join(stray or rest)
        parser.exit(2, f"ppo: error: unknown: {words}; see `ppo {args.command} --help`\n")
    if args.command == "train":
        args.overrides += rest
    args.command_line = ["ppo", *argv]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppo",
        description="Train agents with Proximal Policy Optimization.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ppo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    train = command("train", "Train an agent; writes a run folder.")
    train.add_argument("config", metavar="CONFIG", help="a YAML file, or a name from `ppo configs`")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, e.g. steps=1e6"
    )
    train.add_argument("--seed", type=natural, help="also as seed=N (default: 0)")
    train.add_argument("--out", default="runs", metavar="DIR", help="default: ./runs")
    train.add_argument(
        "--name", help="name of the run folder (default: configuration, date, time and seed)"
    )
    resume = command("resume", "Go on with a run from its newest checkpoint.")
    resume.add_argument("run", metavar="RUN")
    resume.add_argument(
        "--steps", type=positive, help="train so many more (default: up to the run's goal)"
    )
    for sub in (train, resume):
        sub.add_argument("--device", default="cpu", type=device, help="default: cpu")
        sub.add_argument(
            "--eval-episodes", type=natural, default=100, metavar="N", help="default: 100"
        )
        sub.add_argument("--quiet", action="store_true", help="print the result only")

    evaluate = command("evaluate", "Measure how good a run's policy is.")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("--episodes", type=positive, default=100, help="default: 100")
    evaluate.add_argument("--seed", type=natural, default=0, help="default: 0")

    watch = command("play", "Watch a run's policy in a window, or record a video.")
    watch.add_argument("run", metavar="RUN")
    watch.add_argument("--episodes", type=positive, default=1, help="default: 1")
    watch.add_argument("--seed", type=natural, help="default: a new one every time")
    watch.add_argument("--video", metavar="FILE", help="record to FILE (.mp4 or .gif)")
    for sub in (evaluate, watch):
        sub.add_argument(
            "--best", action="store_true", help="the best checkpoint instead of the newest"
        )
        sub.add_argument(
            "--stochastic", action="store_true", help="sample actions instead of the likeliest"
        )

    export = command("export", "Write a run's policy as ONNX and as a program of torch.export.")
    export.add_argument("run", metavar="RUN")
    export.add_argument(
        "--out", metavar="FILE", help=".onnx or .pt2, or no ending for both (default: RUN/policy)"
    )
    export.add_argument("--masked", action="store_true", help="with an input for legal actions")

    plot = command("plot", "Draw learning curves; runs that differ in their seed are one.")
    plot.add_argument("runs", nargs="+", metavar="RUN")
    plot.add_argument(
        "--out", metavar="FILE", help="default: RUN/curve.png, for several runs ./curves.png"
    )
    check = command("check", "Train a policy on tiny tasks with known answers (ppo.probes).")
    check.add_argument(
        "policy",
        nargs="?",
        metavar="FILE.py[:FUNCTION]",
        help="a file with a function make_policy(observation_space, action_space), or one of "
        "another name; THE FILE IS RUN, as python FILE.py would (default: the default policy)",
    )
    check.add_argument("--only", nargs="+", metavar="PROBE", help="run these probes only")
    check.add_argument("--seed", type=natural, default=0, help="default: 0")
    command("configs", "List the shipped configurations.")
    return parser


def natural(text: str, least: int = 0) -> int:
    """Read a whole number such as `3`, `100_000` or `1e6`.

    Raises:
        ArgumentTypeError: It is none, or below `least`.
    """
    with contextlib.suppress(ValueError, OverflowError):
        number = float(text) if "e" in text.lower() else int(text)
        if number >= least and number == int(number):
            return int(number)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")


def positive(text: str) -> int:
    return natural(text, least=1)


def device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {reason}") from error
    return text
