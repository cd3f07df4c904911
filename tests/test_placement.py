"""Where workers sleep: each on a processor of its own, and free to leave it."""

import mmap
import os
import sys

import pytest
from environments import CountingEnv
from known_policies import SnapshotCountPolicy

from ppo.collector import RolloutCollector, placement, pool, worker
from ppo.collector.placement import (
    home_of,
    num_processors,
    rest_at,
    this_processor,
    waking_order,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux moves processes so")


@pytest.fixture
def moves(monkeypatch):
    """What is asked of the system, and where this thread is then."""
    found, plain = [], os.sched_setaffinity
    everywhere = os.sched_getaffinity(0)

    def move(pid, processors):
        plain(pid, processors)
        found.append((pid, set(processors), this_processor()))

    monkeypatch.setattr(os, "sched_setaffinity", move)
    yield found
    plain(0, everywhere)


def on(monkeypatch, *processors):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(processors))


def test_homes_where_workers_need_the_parents_processor(monkeypatch):
    on(monkeypatch, 5, 3)
    assert [home_of(index, 2) for index in range(2)] == [3, 5]
    assert [home_of(index, 5) for index in range(5)] == [3, 5, 3, 5, 3]


def test_no_homes_where_they_do_not_matter(monkeypatch):
    on(monkeypatch, 3, 5, 6)
    assert [home_of(index, 2) for index in range(2)] == [None, None]
    on(monkeypatch, 3)
    assert [home_of(index, 2) for index in range(2)] == [None, None]


def test_no_homes_where_none_can_be_chosen(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    assert home_of(0, 1000) is None


def test_a_thread_goes_home_and_is_free_there(moves, monkeypatch):
    monkeypatch.setattr(placement, "this_processor", lambda: -1)  # elsewhere, wherever it is
    allowed = os.sched_getaffinity(0)
    for home in allowed:
        moves.clear()
        rest_at(home)
        assert [move[:2] for move in moves] == [(0, {home}), (0, allowed)]
        assert moves[0][2] == home
        assert os.sched_getaffinity(0) == allowed


def test_who_is_bound_elsewhere_stays_there(moves, monkeypatch):
    bound = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {bound})
    moves.clear()
    monkeypatch.setattr(placement, "this_processor", lambda: bound)
    rest_at(bound + 1)
    assert not moves
    assert os.sched_getaffinity(0) == {bound}


def test_nothing_is_asked_at_home_or_without_one(moves, monkeypatch):
    rest_at(None)
    home = min(os.sched_getaffinity(0))
    monkeypatch.setattr(placement, "this_processor", lambda: home)
    rest_at(home)
    assert not moves


def test_a_system_that_refuses_is_left_alone(monkeypatch):
    def refuse(pid, processors):
        raise OSError(22, "Invalid argument")

    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr(placement, "this_processor", lambda: -1)
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    rest_at(min(allowed))
    assert os.sched_getaffinity(0) == allowed


def test_processors_are_counted_everywhere(monkeypatch):
    assert num_processors() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_processors() == os.cpu_count()


def test_where_a_thread_runs_is_known(moves):
    for processor in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {processor})
        assert this_processor() == processor


def test_where_a_thread_runs_may_be_unknown(monkeypatch):
    monkeypatch.setattr(placement, "_getcpu", None)
    assert this_processor() is None


def test_whoever_sleeps_where_the_parent_runs_is_woken_last(monkeypatch):
    monkeypatch.setattr(placement, "this_processor", lambda: 1)
    assert waking_order([1, 0, None, 1, 2]) == [1, 2, 4, 0, 3]
    monkeypatch.setattr(placement, "this_processor", lambda: 3)
    assert waking_order([1, 0, None]) == [0, 1, 2]


def test_every_worker_goes_to_its_own_home_behind_every_answer(monkeypatch):
    rests = mmap.mmap(-1, 2)  # shared with what is forked

    def note(home):
        rests[home] += 1

    monkeypatch.setattr(pool, "home_of", lambda index, count: count - 1 - index)
    monkeypatch.setattr(worker, "rest_at", note)
    with RolloutCollector(
        CountingEnv, num_envs=2, num_workers=2, seed=0, start_method="fork"
    ) as collector:
        assert [one.home for one in collector._backend._workers] == [1, 0]
        collector.collect(SnapshotCountPolicy(), 2)
        before = tuple(rests)
        collector.collect(SnapshotCountPolicy(), 2)
        collector.state_dict()  # behind all that a worker does after its answer
        assert all(now > then for now, then in zip(rests, before, strict=True))
        assert all(rest >= b"\x03" for rest in before)  # made, attached, reset


def test_workers_bound_by_their_user_stay_there():
    with RolloutCollector(CountingEnv, num_envs=2, num_workers=2, seed=0) as collector:
        for processor in os.sched_getaffinity(0):
            pids = [one.process.pid for one in collector._backend._workers]
            for _ in range(20):
                for pid in pids:
                    os.sched_setaffinity(pid, {processor})
                collector.collect(SnapshotCountPolicy(), 2)
                collector.state_dict()
                found = [os.sched_getaffinity(pid) for pid in pids]
                if found == [{processor}] * 2:
                    break  # else one was just on its way home when it was bound
            assert found == [{processor}] * 2
