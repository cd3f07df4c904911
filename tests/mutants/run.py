"""Mutation testing: does the fast suite notice when the core is wrong?

    python tests/mutants/run.py
    python tests/mutants/run.py --only losses.py --jobs 1

Each mutant of `listed.py` is written into a copy of the library in a temporary folder, never into
the checkout, and the test files named for it run until the first failure. The exit code is 1 if
more mutants survive than allowed.
"""

import argparse
import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from listed import MUTANTS, stale

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED = 0, 1  # exit codes of pytest; any other means that tests could not run
IGNORED = shutil.ignore_patterns("__pycache__", "mutants", "test_mutants.py")


def copy_tree(folder):
    for name in ("ppo", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=IGNORED)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_tests(folder, modules, timeout):
    """Run test modules of a copy; returns pytest's exit code, None after a timeout, its output."""
    # The bytecode of a mutant of the same size and second would be taken for the original's.
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "--hypothesis-seed=0"]
    command += ["-p", "no:cacheprovider", *(f"tests/test_{module}.py" for module in modules)]
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Whatever a broken library left running belongs to the session of its tests.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read()


def try_mutant(mutant, folder, timeout):
    """Return "killed", "survived", "timeout" or "broken", and the line that says by what."""
    path = folder / "ppo" / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, output = run_tests(folder, mutant.tests, timeout)
    finally:
        path.write_text(text, encoding="utf-8")
    if code is None:
        return "timeout", f"after {timeout} s"
    if code == PASSED:
        return "survived", f"tests {', '.join(mutant.tests)}"
    lines = output.splitlines()
    if code != FAILED:
        return "broken", "\n".join(lines[-15:])
    return "killed", next((line for line in lines if line.startswith("FAILED")), "")


def check_anchors(mutants):
    """Stop with the names of the mutants whose text is not where they expect it."""
    problems = []
    for mutant in mutants:
        path = ROOT / "ppo" / mutant.file
        problems.append(stale(mutant, path.read_text(encoding="utf-8") if path.exists() else ""))
    if any(problems):
        sys.exit("\n".join(["stale mutants:", *filter(None, problems)]))


def check_originals(mutants, folder, timeout):
    """Stop unless the tests pass on the library as it is: only then does a failure mean a kill."""
    modules = sorted({module for mutant in mutants for module in mutant.tests})
    code, output = run_tests(folder, modules, timeout)
    if code != PASSED:
        sys.exit(f"the tests do not pass without a mutant:\n{output[-3000:]}")


def run_all(mutants, args):
    """Yield each mutant with its verdict, in the order of the list."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = queue.Queue()
        for job in range(args.jobs):
            folders.put(copy_tree(Path(temporary, str(job))))
        folder = folders.get()
        check_originals(mutants, folder, 3 * args.timeout)
        folders.put(folder)

        def judge(mutant):
            folder = folders.get()
            try:
                return try_mutant(mutant, folder, args.timeout)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(args.jobs) as pool:
            yield from zip(mutants, pool.map(judge, mutants), strict=True)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a file name or of a description")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for a mutant's tests")
    parser.add_argument("--allowed", type=int, default=2, help="mutants that may survive")
    return parser.parse_args()


def main():
    args = parse_arguments()
    mutants = [m for m in MUTANTS if args.only in m.file or args.only in m.breaks]
    check_anchors(mutants)
    start = time.monotonic()
    verdicts = {"killed": [], "timeout": [], "survived": [], "argued": [], "broken": []}
    for mutant, (verdict, detail) in run_all(mutants, args):
        if verdict == "survived" and mutant.argument:
            verdict, detail = "argued", mutant.argument
        verdicts[verdict].append(mutant)
        print(f"{verdict:9} {mutant.file}: {mutant.breaks}  [{detail}]", flush=True)
    counts = ", ".join(f"{len(found)} {name}" for name, found in verdicts.items())
    print(f"{len(mutants)} mutants in {time.monotonic() - start:.0f} s: {counts}")
    sys.exit(len(verdicts["survived"]) > args.allowed or bool(verdicts["broken"]))


if __name__ == "__main__":
    main()
