"""Moved to `ppo.recording.tape`; this file goes away."""
from ppo.recording.tape import *  # noqa: F403
from ppo.recording.tape import UnsupportedError, Tape, Program  # noqa: F401
