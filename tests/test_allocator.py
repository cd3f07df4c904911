"""Memory that is freed stays with the process, unless the user decided otherwise."""

import os
import subprocess
import sys

ROUNDS = """
import resource
import numpy as np
from ppo._allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        blocks = [np.ones(3 << 20) for _ in range(5)]  # 24 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


def page_faults(**variables):
    """How often the system had to give memory to a process that frees and allocates it again."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    command = [sys.executable, "-c", ROUNDS]
    done = subprocess.run(
        command, env=environment | variables, check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def test_freed_memory_is_used_again():
    assert page_faults() < 100


def test_what_the_user_decided_holds():
    assert page_faults(MALLOC_TRIM_THRESHOLD_="0") > 100
    assert page_faults(MALLOC_MMAP_THRESHOLD_="100000") > 100
    assert page_faults(GLIBC_TUNABLES="glibc.malloc.trim_threshold=0") > 100
