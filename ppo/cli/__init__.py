"""The command line: `main`, its arguments and commands, run folders, pictures and videos."""

from ppo.cli.commands import main

__all__ = ["main"]
