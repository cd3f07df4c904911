"""The parent's side of all worker processes: who does which columns, and who is replaced."""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import time
from collections.abc import Iterable, Sequence
from multiprocessing import connection, reduction
from typing import Any, NoReturn

import cloudpickle
import numpy as np

from ppo.collector.buffers import Buffers, Layout, anonymous_file, write_objects
from ppo.collector.columns import Final, Harvest, Restart, give_up_rows
from ppo.collector.placement import home_of, num_processors, waking_order
from ppo.collector.processes import StartMethod, WorkerProcess, end_workers, start_context
from ppo.collector.replay import Bookmark, Place
from ppo.collector.signals import STEP, STEPPED, Patience, poll, receive_byte
from ppo.collector.whereabouts import PLAYING, whereabouts
from ppo.envs import EnvFactory
from ppo.errors import SpaceError, WorkerError
from ppo.policies.protocol import Actor

__all__ = ["WorkerPool"]

_SPIN_SECONDS = 200e-6
_START_SECONDS = 60.0
_HURRY_SECONDS = 0.3
_STARTING = ("start",)


class _LostError(Exception):
    """A worker is dead or hangs."""

    def __init__(self, worker: int, error: WorkerError) -> None:
        super().__init__()
        self.worker, self.error = worker, error


class WorkerPool:
    """Worker processes, each stepping a contiguous share of the columns into shared memory.

    Args:
        factories: One per column.
        seeds: Generator of episode seeds per column.
        num_workers: Number of processes, at most one per column is started.
        start_method: How processes are started; None for the platform's default.
        step_timeout: Seconds without progress after which a worker is taken to hang. Starting may
            take ten times as long, and a minute in any case.
        max_restarts: How many times a dead or hung worker is replaced; the same number of times
            each of them makes an environment anew that raised.
    """

    def __init__(
        self,
        factories: Sequence[EnvFactory],
        seeds: Sequence[np.random.Generator],
        num_workers: int,
        start_method: StartMethod | None,
        step_timeout: float | None,
        max_restarts: int = 0,
    ) -> None:
        self._factories, self._seeds = factories, list(seeds)
        self._timeout = step_timeout
        self._start_timeout = step_timeout and max(_START_SECONDS, 10.0 * step_timeout)
        self._max_restarts = self._restarts_left = max_restarts
        self._workers: list[WorkerProcess] = []
        self._files: list[int] = []  # the one with large objects, the one with the rollout
        self._buffers: Buffers | None = None
        self._command: tuple[Any, ...] = _STARTING
        self._died_idle: set[int] = set()
        self._finals: list[Final] = []
        self._restarts: list[Restart] = []
        # Environments of each worker, and the columns they make: several for several agents.
        count = len(factories)
        self._environments = np.array_split(np.arange(count), min(num_workers, count))
        self._shares = self._environments
        # Polling pays only while nobody else could use the processor.
        self._spin = _SPIN_SECONDS if len(self._shares) <= num_processors() else 0.0
        self._patience = Patience(self._spin)
        # Ends the workers when the pool is dropped, and at exit before multiprocessing joins them.
        self._finalizer = multiprocessing.util.Finalize(
            self, end_workers, (self._workers, self._files), exitpriority=100
        )
        self._context = start_context(start_method)
        try:
            self._files.append(anonymous_file("ppo-objects", 0))
            for worker in range(len(self._shares)):
                self._start(worker)
            answers = self._receive_all()
        except BaseException:
            self.close()
            raise
        self.observation_space, self.action_space, self._num_agents = self._made = answers[0]
        for worker, other in enumerate(answers):
            if other != answers[0]:
                self.close()
                raise SpaceError(
                    f"environment {self._environments[worker][0]} has other spaces than "
                    f"environment 0, or another number of agents: {other} against {answers[0]}"
                )
        self.num_envs = count * self._num_agents
        self._shares = [
            np.arange(share[0] * self._num_agents, (share[-1] + 1) * self._num_agents)
            for share in self._environments
        ]

    def _start(self, worker: int) -> None:
        """Start a worker in an empty place, or in that of one that was ended."""
        environments = self._environments[worker]
        first, stop = int(environments[0]), int(environments[-1]) + 1
        try:
            payload = cloudpickle.dumps(list(self._factories[first:stop]))
        except Exception as error:
            raise TypeError(
                f"the factories of environments {first} to {stop - 1} cannot be sent to a worker: "
                f"{error}; let them make what they need inside, or use num_workers=0"
            ) from error
        started = WorkerProcess(
            self._context,
            worker,
            self._workers,
            payload,
            self._seeds[first:stop],
            first,
            self._spin,
            self._max_restarts,
            home_of(worker, len(self._shares)),
        )
        self._workers[worker : worker + 1] = [started]
        started.start(self._files[0])

    def attach(self, layout: Layout) -> Buffers:
        """Make the arrays of a rollout in memory shared with every worker."""
        fd = anonymous_file("ppo-rollout", layout.num_bytes())
        while len(self._files) > 1:
            os.close(self._files.pop())
        self._files.append(fd)
        self._buffers = Buffers(layout, fd)
        for one in self._workers:
            self._attach(one)
        pending = set(range(len(self._workers)))
        while pending:
            try:
                for worker in self._wait(pending):
                    self._receive(worker)
                    pending.remove(worker)
            except _LostError as lost:
                self._workers[lost.worker].kill()
                if self._max_restarts == 0:
                    self._fail(lost.error)
                # With restarts it is met again, dead, at the next command.
                pending.remove(lost.worker)
        return self._buffers

    def bookmarks(self) -> list[Bookmark]:
        """The place of every column in its episode."""
        self._send_all("bookmarks")
        return [mark for marks in self._receive_all() for mark in marks]

    def restore(self, places: Sequence[Place], squash: bool) -> list[bool]:
        """Go to these places, each worker to its own; says which columns got there."""
        self._command = ("restore",)
        parts = [places[int(share[0]) : int(share[-1]) + 1] for share in self._shares]
        spans = write_objects(self._files[0], parts)
        for one, span in zip(self._workers, spans, strict=True):
            one.send("restore", span, squash)
        timeout = self._timeout
        if timeout is not None:  # whole episodes are played, and no step of them is announced
            self._timeout = timeout * (1 + sum(place.mark.episode_length for place in places))
        try:
            return [arrived for columns in self._receive_all() for arrived in columns]
        finally:
            self._timeout = timeout

    def _attach(self, one: WorkerProcess) -> None:
        assert self._buffers is not None
        one.send("attach", self._buffers.layout)
        one.send_handle(self._files[1])

    def reset(self) -> list[bool]:
        """Start the first episodes; says which columns give action masks."""
        self._send_all("reset", 0)
        return [masked for columns in self._receive_all() for masked in columns]

    def run(self, actor: Actor, num_steps: int) -> Harvest:
        """Let every worker act for its own columns for a whole rollout."""
        (span,) = write_objects(self._files[0], [actor])
        self._send_all("run", 0, num_steps, span)
        return self._merge(self._receive_all())

    def begin(self, num_steps: int) -> None:
        """Announce a rollout in which the parent acts."""
        self._send_all("steps", 0, num_steps)

    def step(self, t: int) -> None:
        """Wake every worker for row `t` and wait for all of them."""
        start = time.perf_counter()
        for one in self._workers:
            try:
                os.write(one.conn.fileno(), STEP)
            except OSError:
                continue  # who is dead is met below
        pending = set(range(len(self._workers)))
        for worker, one in enumerate(self._workers):
            # Whoever is not ready soon is waited for together with all others.
            if self._patience.seconds and poll(one.conn, self._patience.seconds):
                self._take_step(worker, t)
                pending.remove(worker)
        while pending:
            try:
                for worker in self._wait(pending):
                    self._take_step(worker, t)
                    pending.remove(worker)
            except _LostError as lost:
                self._replace(lost, t)
                pending.remove(lost.worker)
        self._patience.learn(time.perf_counter() - start)

    def _take_step(self, worker: int, t: int) -> None:
        byte = receive_byte(self._workers[worker].conn, 0.0)
        if byte == STEPPED:
            return
        try:
            self._receive(worker)  # the fault, or the news that the worker is dead
        except _LostError as lost:
            self._replace(lost, t)
        else:
            raise WorkerError(f"worker {worker} broke the protocol: got {byte!r}")

    def harvest(self) -> Harvest:
        """End the rollout announced by `begin`."""
        return self._merge(self._receive_all())

    def _send_all(self, *message: Any) -> None:
        self._command = message
        codes = [one.process.exitcode for one in self._workers]
        self._died_idle = {worker for worker, code in enumerate(codes) if code is not None}
        pickled = reduction.ForkingPickler.dumps(message)  # once for all
        for worker in waking_order([one.home for one in self._workers]):
            with contextlib.suppress(OSError):  # who is dead is met when an answer is awaited
                self._workers[worker].conn.send_bytes(pickled)

    def _receive_all(self) -> list[Any]:
        """One answer of every worker, as they come: no fault waits behind a busy sibling."""
        answers: dict[int, Any] = {}
        pending = set(range(len(self._workers)))
        while pending:
            try:
                for worker in self._wait(pending):
                    answers[worker] = self._receive(worker)
                    pending.remove(worker)
            except _LostError as lost:
                self._replace(lost)
        return [answers[worker] for worker in range(len(self._workers))]

    def _receive_one(self, worker: int) -> Any:
        self._wait({worker})
        return self._receive(worker)

    def _wait(self, pending: Iterable[int]) -> list[int]:
        """Workers that have sent something; `_LostError` for one that died or makes no progress."""
        workers = {worker: self._workers[worker] for worker in sorted(pending)}
        sources = [source for one in workers.values() for source in (one.conn, one.sentinel)]
        timeout = self._start_timeout if self._command == _STARTING else self._timeout
        moved = {} if timeout is None else {worker: self._moved(worker) for worker in workers}
        while True:
            ready = connection.wait(sources, timeout)
            answered = [worker for worker, one in workers.items() if one.conn in ready]
            if answered:
                return answered
            for worker, one in workers.items():
                if one.sentinel in ready:
                    raise _LostError(worker, self._death(worker))
            for worker in workers:
                before, moved[worker] = moved[worker], self._moved(worker)
                if before == moved[worker]:
                    raise _LostError(worker, self._hang(worker, timeout))

    def _receive(self, worker: int) -> Any:
        """The answer that a worker has sent, or is about to send."""
        one = self._workers[worker]
        try:
            status, result = one.conn.recv()
        except (EOFError, OSError):
            raise _LostError(worker, self._death(worker)) from None
        if status == "error":
            self._fail(result)
        return result

    def _replace(self, lost: _LostError, t: int | None = None) -> None:
        """Put a new worker in the place of a lost one, or raise what it was lost to.

        Its columns lose row `t`, or the first that is not whole, and go on behind it with new
        episodes. They also lose earlier rows whose successor only the worker knew.
        """
        worker, error, command = lost.worker, lost.error, self._command
        if self._max_restarts == 0 or command[0] not in PLAYING:
            self._workers[worker].kill()
            self._fail(error)
        buffers, share, row = self._buffers, self._shares[worker], 0
        assert buffers is not None
        self._end(worker)  # or it might still write
        if command[0] != "reset":
            t = min(int(buffers.progress[share].min()), command[2] - 1) if t is None else t
            self._finals += give_up_rows(buffers, t, share, self._finals)
            row = t + 1
        while True:
            if self._restarts_left == 0:
                text = f"max_restarts = {self._max_restarts} restarts are spent; the last fault: "
                self._fail(WorkerError(f"{text}{error}"))
            self._restarts_left -= 1
            self._restarts.append(Restart(max(row - 1, 0), int(share[0]), str(error)))
            for index in self._environments[worker]:  # for episodes that were not played yet
                self._seeds[index] = self._seeds[index].spawn(1)[0]
            self._died_idle.discard(worker)
            buffers.progress[share] = row
            try:
                self._command = _STARTING
                self._start(worker)
                made = self._receive_one(worker)
                self._command = ("reset", row)
                if made != self._made:
                    raise SpaceError(f"worker {worker} was replaced by one with other spaces")
                self._attach(self._workers[worker])
                self._receive_one(worker)
                if row:
                    self._workers[worker].send("reset", row)
                    self._receive_one(worker)
                break
            except _LostError as again:
                error = again.error
                self._end(worker)
        self._command = command
        self._workers[worker].send(command[0], row, *command[2:])

    def _fail(self, error: Exception) -> NoReturn:
        """Raise an error soon: siblings get a moment to leave, and are not waited for longer."""
        end_workers(self._workers, self._files, _HURRY_SECONDS)
        raise error from None

    def _end(self, worker: int) -> None:
        """End one worker at once."""
        self._workers[worker].kill()
        self._workers[worker].release()

    def _merge(self, harvests: list[Harvest]) -> Harvest:
        """Join the workers' harvests, in the order (step, environment) of one process."""
        own = Harvest(self._finals, [], self._restarts)
        self._finals, self._restarts = [], []
        return Harvest.joined([*harvests, own])

    def _moved(self, worker: int) -> Any:
        """Something that differs whenever an environment of a worker has finished something."""
        if self._buffers is None:
            return None
        share, buffers = self._shares[worker], self._buffers
        signs = (buffers.progress, buffers.started, buffers.episode_seeds)
        return [sign[share].tolist() for sign in signs]

    def _describe(self, worker: int) -> str:
        share, made = self._shares[worker], self._environments[worker]
        named = f"worker {worker} (environments {made[0]} to {made[-1]})"
        if self._command == _STARTING:
            return f"{named} while starting"
        if self._buffers is None or worker in self._died_idle:
            return f"{named} between two rollouts"
        return f"{named} at rollout step {self._buffers.progress[share].min()}"

    def _doing(self, worker: int) -> str:
        """Which environment a worker was at, from what it left in shared memory."""
        idle = self._command[0] not in PLAYING or worker in self._died_idle
        if self._buffers is None or idle:
            return ""
        share, agents = self._shares[worker], self._num_agents
        return whereabouts(self._buffers, share, self._command, self.action_space, agents)

    def _death(self, worker: int) -> WorkerError:
        how = self._workers[worker].death()
        stack = self._workers[worker].stack()
        return WorkerError(f"{self._describe(worker)} {how}{self._doing(worker)}{stack}")

    def _hang(self, worker: int, timeout: float | None) -> WorkerError:
        setting = "" if self._command == _STARTING else "step_timeout = "
        text = f"{self._describe(worker)} made no progress for {setting}{timeout} s"
        text += self._doing(worker)  # before the signal, which may wake it
        return WorkerError(text + self._workers[worker].stack_now())

    def close(self) -> None:
        """End the workers within seconds, even if one hangs or ignores signals."""
        self._finalizer()
