"""What each process of a launch is doing, reported to the others, so that a silent one is noticed and named."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import ProcessError, first_line
from .launch import collective_timeout, lost_the_others, process_state, shared_store
from .terminal import single_line


if TYPE_CHECKING:
    import torch


_INTERVAL = 1.0  # seconds between two looks
_WAITING = "waiting for the others"


@dataclass
class _Seen:
    """The last that was heard of a process, and when, on this machine's monotonic clock."""

    beats: int = -1
    doing: str = "starting"
    who: str = ""
    alive: int = -1
    left: bool = False
    beat_at: float = 0.0
    alive_at: float = 0.0


_active: list[Heartbeat] = []


def beat(doing: str) -> None:
    """Say what this process is doing now, from anywhere inside a [`Heartbeat`]; a thread passes it on."""
    if _active:
        _active[-1].beat(doing)


def waiting() -> None:
    """Say that this process waits for the others: its silence is theirs."""
    beat(_WAITING)


class Heartbeat:
    """Each process says how far it is; a thread passes that on, and the main process tells who is silent.

        with Heartbeat("invert") as heart:
            for i in claim_indices(10):
                beat(f"adapter {i}")
            heart.wait_for_all()

    In a launch of one process nothing happens. A process that made no progress for a tenth of the time limit of
    collectives (`LORA_RECYCLE_TIMEOUT`, 1800 s) is named on stderr, with what it was doing.

    All processes must enter it, in the same order of such blocks.
    """

    def __init__(self, stage: str):
        self.stage, self._doing, self._beats, self._alive = stage, "starting", 0, 0
        self._store: torch.distributed.Store | None = None
        self._thread: threading.Thread | None = None
        self._meetings = 0

    def __enter__(self) -> Heartbeat:
        state = process_state()
        self._rank, self._size = state.process_index, state.num_processes
        if self._size > 1:
            self._limit, now = collective_timeout(), time.monotonic()
            self._store, self._stop = shared_store("heartbeat"), threading.Event()
            self._seen = [_Seen(beat_at=now, alive_at=now) for _ in range(self._size)]
            self._reported: dict[int, int] = {}
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        _active.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(timeout=2 * _INTERVAL)
        if error is not None and lost_the_others(error):
            silent = self.silent(self._limit / 10)
            silent.pop(self._rank, None)
            reason = "; ".join(silent.values()) or "one of them failed, and says so itself, above or in its own log"
            raise ProcessError(
                f"{self.stage}: process {self._rank} lost the others: {reason} ({first_line(error)}). What "
                "was finished is kept; run the command again."
            ) from error
        if error is None:
            self._leave()
        self._thread = self._store = None

    def beat(self, doing: str) -> None:
        self._doing = doing
        self._beats += 1

    def wait_for_all(self) -> None:
        """Return when all processes are here. As long as the others make progress there is no time limit.

        Raises:
            ProcessError: a process made no progress for as long as collectives may take.
        """
        if self._store is None:
            return
        self.beat(_WAITING)
        self._meetings += 1
        self._meet(self._store, "here")
        if self._rank:
            self._store.set(f"seen/{self._meetings}/{self._rank}", "")
        else:  # the store goes with this process, which therefore leaves last
            self._meet(self._store, "seen")

    def _meet(self, store: torch.distributed.Store, place: str) -> None:
        store.set(f"{place}/{self._meetings}/{self._rank}", "")
        keys = [f"{place}/{self._meetings}/{rank}" for rank in range(self._size)]
        while not store.check(keys):
            if silent := self.silent(self._limit):
                raise ProcessError(
                    f"{self.stage}: {'; '.join(silent.values())}. What was finished is kept; run the command again."
                )
            time.sleep(0.05)

    def silent(self, limit: float) -> dict[int, str]:
        """Processes without progress for more than `limit` seconds, and what is known of each."""
        complaints, now = {}, time.monotonic()
        for rank, seen in enumerate(self._seen):
            if seen.left:
                continue
            if now - seen.alive_at > limit:
                complaints[rank] = f"process {rank}{seen.who} has not answered for {now - seen.alive_at:.0f} s"
            elif now - seen.beat_at > limit and seen.doing != _WAITING:
                complaints[rank] = f"process {rank}{seen.who} has made no progress for {now - seen.beat_at:.0f} s"
            if rank in complaints:
                complaints[rank] += f"; it was last at: {seen.doing}"
        return complaints

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._notify()
                self._look()
                if self._rank == 0:
                    self._warn()
                self._stop.wait(min(_INTERVAL, self._limit / 50))
        except RuntimeError:  # the store went with the process that held it
            return

    def _leave(self) -> None:
        try:
            self._notify(left=True)
        except RuntimeError as gone:  # they are done, or failed, which the next collective says
            if not lost_the_others(gone):
                raise

    def _notify(self, left: bool = False) -> None:
        self._alive += 1
        assert self._store is not None  # as long as the thread runs
        who = f" (pid {os.getpid()} on {socket.gethostname()})"
        report = {"alive": self._alive, "beats": self._beats, "doing": self._doing, "left": left, "who": who}
        self._store.set(f"rank/{self._rank}", json.dumps(report))

    def _look(self) -> None:
        assert self._store is not None
        for rank, seen in enumerate(self._seen):
            key = f"rank/{rank}"
            if not self._store.check([key]):
                continue
            report, now = json.loads(self._store.get(key)), time.monotonic()
            if report["alive"] != seen.alive:
                seen.alive, seen.alive_at = report["alive"], now
                seen.left, seen.who = report["left"], report["who"]
            if report["beats"] != seen.beats:
                seen.beats, seen.beat_at, seen.doing = report["beats"], now, report["doing"]

    def _warn(self) -> None:
        for rank, text in self.silent(self._limit / 10).items():
            if self._reported.get(rank) != self._seen[rank].beats:
                self._reported[rank] = self._seen[rank].beats
                notice = f"lora-recycle: {self.stage}: {text}. The others wait for it, at most {self._limit:.0f} s."
                print(single_line(notice), file=sys.stderr, flush=True)
