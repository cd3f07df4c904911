"""The command `ppo`: train, resume, evaluate, play, export and plot runs, and check policies."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppo.agent import PPOAgent
from ppo.cli.arguments import natural, parse_arguments
from ppo.cli.checking import check
from ppo.cli.folders import check_folder_of
from ppo.cli.playing import open_video, open_window, play
from ppo.cli.plotting import plot_runs
from ppo.cli.runs import RunFolder, target_return
from ppo.cli.stop_signals import StopSignals
from ppo.config import PPOConfig, tuned_names
from ppo.errors import CheckpointError, ConfigError, EnvCreationError, PPOError, SpaceError
from ppo.policies.state import frame_stack_of, state_size_of
from ppo.report import Report

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the command's name; None takes those of the process.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # So that `env: my_module:My-v0` finds my_module.py in the current folder, as with `python -m`.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        args = parse_arguments(arguments)
        status: int = _COMMANDS[args.command](args)
        sys.stdout.flush()
        return status
    except SystemExit as exit_:  # argparse has said why
        return int(exit_.code or 0)
    except KeyboardInterrupt:
        _say("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `ppo configs | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, EnvCreationError, SpaceError) as error:  # another try would end the same
        _say(f"error: {' '.join(str(error).split())}")
        return 2
    except (PPOError, OSError) as error:
        _say(f"error: {error}")
        return 1


def _train(args: argparse.Namespace) -> int:
    seed, overrides = _seed(args.seed, args.overrides)
    config = _read_config(args.config, overrides)
    if config.env is None or config.steps is None:
        missing = "env" if config.env is None else "steps"
        raise ConfigError(
            f"{args.config}: {missing} is not set; write `{missing}: ...` into the file, "
            f"or {missing}=... behind its name"
        )
    run = RunFolder.create(
        config,
        seed=seed,
        out=args.out,
        stem=_stem(args.config),
        name=args.name,
        command=args.command_line,
    )
    agent = PPOAgent(config=config, seed=seed, device=args.device, logger=run.log)
    if not args.quiet:
        _note(f"training {config.env} for {config.steps:,} steps into {run.path}")
    return _learn(agent, run, config.steps, args)


def _resume(args: argparse.Namespace) -> int:
    run = RunFolder.open(args.run)
    agent = run.resume(device=args.device, warn=_warn)
    if agent.left_off is None and agent.steps < agent.goal:
        _warn(
            f"the checkpoint of {agent.steps:,} steps does not hold where its episodes were, as it "
            "was written after a failure or by an earlier version: new ones begin"
        )
    steps = max(0, agent.goal - agent.steps) if args.steps is None else args.steps
    if not args.quiet:
        _note(
            f"going on from {agent.steps:,} to {agent.steps + steps:,} steps in {run.path}"
            if steps
            else f"the goal of {agent.goal:,} steps is reached; to train further, pass --steps"
        )
    return _learn(agent, run, steps, args)


def _learn(agent: PPOAgent, run: RunFolder, steps: int, args: argparse.Namespace) -> int:
    """Train, keep checkpoints, and end well however it ends."""
    terminal = sys.stderr.isatty()
    milestones = _Milestones(agent.steps) if not (terminal or args.quiet) else None

    def after_update(report: Report) -> bool:
        run.checkpoint(agent)
        if milestones is not None:
            milestones(report)
        return stop.signum is None

    with run, StopSignals() as stop, warnings.catch_warnings():
        warnings.showwarning = lambda message, *about, **more: _warn(str(message))
        try:
            if steps > 0:
                # By its id, so that `num_workers: auto` may choose; without one, an error says so.
                env = agent.config.env or agent.config.env_factory()
                show = terminal and not args.quiet
                agent.learn(env, steps, callback=after_update, progress=show)
        except (PPOError, OSError):
            # The policy is as the latest update left it. A signal to the whole process group ends
            # the workers too, which is no failure then.
            if stop.signum is None:
                _keep(agent, run)
                raise
        except BaseException:
            # Ctrl-C for the second time, or a bug, may have hit the middle of an update: what is on
            # the disk counts.
            if agent.updates == 0:
                run.discard()
            else:
                _say(f"to go on from the latest checkpoint: {_command('resume', run)}")
            raise
        if stop.signum is not None:
            _keep(agent, run)
            return 128 + stop.signum
        run.finish(agent)
    _summarize(agent, run, args)
    return 0


def _keep(agent: PPOAgent, run: RunFolder) -> None:
    """Save what was learned, if anything was, and say how to go on."""
    if agent.updates == 0:
        run.discard()
        return
    try:
        run.save(agent)
    except CheckpointError as error:
        _warn(str(error))
    _say(f"stopped at {agent.steps:,} of {agent.goal:,} steps; to go on: {_command('resume', run)}")


def _command(name: str, run: RunFolder) -> str:
    return f"ppo {name} {shlex.quote(str(run.path))}"


def _summarize(agent: PPOAgent, run: RunFolder, args: argparse.Namespace) -> None:
    """Evaluate the final policy, draw the curve, and say where everything is."""
    with contextlib.suppress(PPOError):
        plot_runs([run], run.path / "curve.png")
    rate = agent.steps / run.seconds if run.seconds else float("nan")
    print(f"trained {agent.steps:,} steps in {_duration(run.seconds)} ({rate:,.0f} steps/s)")
    print(f"run folder: {run.path}", flush=True)
    if args.eval_episodes > 0:
        if not args.quiet:
            _note(f"evaluating over {args.eval_episodes} episodes ...")
        _print_evaluation(agent, args.eval_episodes, run=run)
    if not args.quiet:
        print(f"  to watch it:  {_command('play', run)}")
        print(f"  to train on:  {_command('resume', run)} --steps {agent.goal}")


def _evaluate(args: argparse.Namespace) -> int:
    agent = RunFolder.open(args.run).load(best=args.best, warn=_warn)
    _print_evaluation(agent, args.episodes, seed=args.seed, deterministic=not args.stochastic)
    return 0


def _print_evaluation(
    agent: PPOAgent,
    episodes: int,
    *,
    seed: int = 0,
    deterministic: bool = True,
    run: RunFolder | None = None,
) -> None:
    env = agent.config.env_factory()
    result = agent.evaluate(env, episodes, deterministic=deterministic, seed=seed)
    target = target_return(agent.config)
    solved = None if target is None else result.mean_return >= target
    print(f"evaluation: return {result}")
    if solved is not None:
        word = "solved" if solved else "not solved"
        print(f"{word}: the target on {agent.config.env} is a return of {target:g}")
    if run is not None:
        run.save_evaluation(
            result, steps=agent.steps, seed=seed, target_return=target, solved=solved
        )


def _play(args: argparse.Namespace) -> int:
    agent = RunFolder.open(args.run).load(best=args.best, warn=_warn)
    keeps_state = state_size_of(agent.policy) > 0 or frame_stack_of(agent.policy) > 1

    def act(obs: Any, mask: Any, state: Any) -> tuple[Any, Any]:
        sure = not args.stochastic
        chosen = agent.act(obs, deterministic=sure, action_mask=mask, state=state)
        return chosen if keeps_state else (chosen, None)

    opened = (
        open_window(agent.config, _warn)
        if args.video is None
        else open_video(agent.config, args.video)
    )
    with opened as env:
        for index, episode in enumerate(play(act, env, args.episodes, seed=args.seed), start=1):
            number = f"episode {index}: " if args.episodes > 1 else ""
            print(
                f"{number}return {episode.episode_return:.1f}, {episode.episode_length:,} steps",
                flush=True,
            )
    if args.video is not None:
        print(f"video: {args.video}")
    return 0


def _export(args: argparse.Namespace) -> int:
    run = RunFolder.open(args.run)
    out = Path(args.out or run.path / "policy")
    check_folder_of(out)
    try:
        paths = run.load(warn=_warn).export(out, masked=args.masked)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for path in paths:
        print(f"exported: {path}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    runs = [RunFolder.open(path) for path in args.runs]
    default = runs[0].path / "curve.png" if len(runs) == 1 else Path("curves.png")
    print(f"picture: {plot_runs(runs, args.out or default)}")
    return 0


def _check(args: argparse.Namespace) -> int:
    return check(args.policy, args.only, args.seed)


def _configs(args: argparse.Namespace) -> int:
    rows = [("NAME", "ENVIRONMENT", "STEPS")]
    for name in tuned_names():
        config = PPOConfig.tuned(name)
        rows.append((name, config.env or "", f"{config.steps or 0:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, env, steps in rows:
        print(f"{name:<{widths[0]}}  {env:<{widths[1]}}  {steps:>{widths[2]}}")
    return 0


def _read_config(name: str, overrides: Sequence[str]) -> PPOConfig:
    path = Path(name)
    if path.is_file() or path.name != name:
        return PPOConfig.from_yaml(path, overrides)
    try:
        return PPOConfig.tuned(name, overrides)
    except ConfigError as error:
        if Path(f"{name}.yaml").is_file() and "tuned configuration" in str(error):
            raise ConfigError(f"{error}; or did you mean the file {name}.yaml?") from error
        if path.suffix in (".yaml", ".yml") and "tuned configuration" in str(error):
            raise ConfigError(f"there is no file {name!r}; {error}") from error
        raise


def _stem(name: str) -> str | None:
    """What a run is called after: the name or file given, unless that is another run's file."""
    stem = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    return None if stem == "config" else stem


def _seed(option: int | None, overrides: Sequence[str]) -> tuple[int, list[str]]:
    """The seed, from `--seed` or `seed=`, and the overrides without it."""
    given = [word.partition("=")[2] for word in overrides if word.startswith("seed=")]
    rest = [word for word in overrides if not word.startswith("seed=")]
    try:
        seeds = [*([] if option is None else [option]), *map(natural, given)]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"seed {error}") from error
    if len(seeds) > 1:
        raise ConfigError(f"the seed is given twice: {seeds[0]} and {seeds[1]}; keep one")
    return (seeds[0] if seeds else 0), rest


class _Milestones:
    """Ten short lines for those who read a log file instead of a progress bar."""

    def __init__(self, steps: int) -> None:
        self._start = steps
        self._told = 0

    def __call__(self, report: Report) -> None:
        tenths = 10 * (report.steps - self._start) // max(1, report.goal - self._start)
        if tenths > self._told:
            self._told = tenths
            metrics = report.metrics
            _note(
                f"{report.steps:>12,} of {report.goal:,} steps"
                f"  return {metrics['episode_return']:9.1f}"
                f"  {metrics['steps_per_second']:9,.0f} steps/s"
            )


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "resume": _resume,
    "evaluate": _evaluate,
    "play": _play,
    "export": _export,
    "plot": _plot,
    "check": _check,
    "configs": _configs,
}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say(text: str) -> None:
    _note(f"ppo: {text}")


def _warn(text: str) -> None:
    _say(f"warning: {text}")
