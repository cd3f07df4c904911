"""What holds for every test module: one thread, patient hypothesis, no child left behind."""

import gc
import multiprocessing
import os
import sys
import threading

import hypothesis
import numpy as np
import pytest
import torch
from processes import children, wait_until

collect_ignore = ["mutants"]

torch.set_num_threads(1)

hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_xdist_auto_num_workers(config):
    """Two processes run the whole suite; one runs what is named on the command line."""
    return 2 if config.args_source is config.ArgsSource.TESTPATHS else 0


@pytest.fixture(autouse=True, scope="module")
def _no_child_outlives_its_module():
    """A test module fails if it leaks a child process."""
    gc.collect()
    gc.freeze()  # every later collection would look through all modules that were imported
    if sys.platform != "linux":
        yield
        assert not multiprocessing.active_children()
        return
    before = children()
    yield
    gc.collect()
    multiprocessing.active_children()  # reaps those that have ended
    assert wait_until(lambda: children() <= before), f"left behind: {children() - before}"


@pytest.fixture(autouse=True, scope="module")
def _numpy_warns_as_before():
    """A test module fails if NumPy warns of other things behind it."""
    before = np.geterr()
    yield
    assert np.geterr() == before


@pytest.fixture
def nothing_left():
    """Checks, after the test, that no child, descriptor or thread of it is left."""
    before = children(), len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    gc.collect()
    assert wait_until(lambda: children() <= before[0])
    assert len(os.listdir("/proc/self/fd")) <= before[1]
    assert threading.active_count() <= before[2]
