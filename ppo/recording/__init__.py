"""Computations of a policy, recorded once and repeated without torch's cost per call."""

from ppo.recording.call import RecordedCall
from ppo.recording.fingerprint import Fingerprint
from ppo.recording.tape import Program, Tape, UnsupportedError

__all__ = ["Fingerprint", "Program", "RecordedCall", "Tape", "UnsupportedError"]
