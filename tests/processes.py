"""Child processes: which are alive, and scripts run as processes of their own; alarms."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ppo


def children():
    """Ids of this process's living children, but for multiprocessing's own two servers."""
    ids = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            ids |= {int(pid) for pid in (task / "children").read_text().split()}
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that has ended since its name was read; it has no children now
    return {pid for pid in ids if is_alive(pid) and not _is_server(pid)}


def is_alive(pid):
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _is_server(pid):
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "multiprocessing.forkserver" in command or "multiprocessing.resource_tracker" in command


def wait_until(condition, seconds=10.0):
    """Wait for what other processes have to do; returns whether the condition came true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def ringing(handler, seconds, again=0.0):
    """Call a handler in a while, and then again and again."""
    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def give_up(signum, frame):
    """An alarm's handler that ends what hangs."""
    raise AssertionError("nobody noticed")  # no OSError: those are suppressed


def start_script(path, code, *arguments, **options):
    """Start code as a script of its own, or from the standard input without a path."""
    if path is not None:
        path.write_text(code)
    roots = [str(Path(ppo.__file__).parents[1]), str(Path(__file__).parent)]
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(path or "-"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run_script(path, code, *arguments, seconds=120.0):
    """Run code as a script of its own; returns its exit code, output and errors."""
    with start_script(path, code, *arguments) as process:
        try:
            out, err = process.communicate(code if path is None else None, timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, out, err
