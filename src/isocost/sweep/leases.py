"""Who is at work on what: several runs on one results database share the work, and a dead one's work is taken over.

A claim is a row: what is worked on, by whom, and when that worker last said that it lives, by the results database's own clock. A worker
says so every few seconds from a thread of its own. A claim is free again when it is released, when its process is gone (on this
machine), or when nothing was heard of it for `LEASE_TIMEOUT_S` seconds.
"""

from __future__ import annotations

import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import ColumnElement, delete, func, literal_column, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from isocost.errors import ConfigError, RunError
from isocost.sweep.db import run_transaction
from isocost.sweep.schema import LeaseRecord
from isocost.utils.artifact_store import is_alive

LEASE_TIMEOUT_S = 60.0
HEARTBEAT_S = 5.0
POLL_S = 0.5


class Leases:
    """This worker's claims."""

    def __init__(self, engine: Engine) -> None:
        """The table of claims must be there."""
        self.engine = engine
        self.worker = uuid.uuid4().hex
        self.host, self.pid = platform.node(), os.getpid()
        sqlite = "(julianday('now') - 2440587.5) * 86400.0"
        self._now: ColumnElement[float] = literal_column(
            sqlite if engine.dialect.name == "sqlite" else "extract(epoch from clock_timestamp())"
        )
        self._mine: set[str] = set()
        self._beating: threading.Thread | None = None
        self._stop = threading.Event()
        self._failed: RunError | None = None

    def take(self, work: str) -> bool:
        """Claim a piece of work; False where another living worker has it.

        Raises:
            ConfigError: the claim is dated in the future, by a host whose clock is wrong.
            RunError: the results database could not be reached to renew claims.
        """
        if self._failed is not None:
            raise self._failed
        try:
            if not run_transaction(self.engine, lambda session: self._take(session, work), conflicts=0):
                return False
        except IntegrityError:  # another took it in the same moment
            return False
        self._mine.add(work)
        self._begin_to_beat()
        return True

    def _take(self, session: Session, work: str) -> bool:
        mine = {"worker": self.worker, "host": self.host, "pid": self.pid, "beat": self._now}
        silent = (self._now - LeaseRecord.beat).label("silent_s")
        columns = select(LeaseRecord.worker, LeaseRecord.host, LeaseRecord.pid, silent).where(LeaseRecord.work == work)
        held = session.execute(columns).first()
        if held is None:
            session.add(LeaseRecord(work=work, **mine))
            session.flush()
            return True
        if held.worker == self.worker:
            return True
        if held.silent_s < -LEASE_TIMEOUT_S:
            raise ConfigError(
                f"{work}: claimed by {held.host}, {-held.silent_s:.0f} s in the future: set that host's clock right"
            )
        if held.silent_s < LEASE_TIMEOUT_S and (held.host != self.host or is_alive(held.pid)):
            return False
        taken = update(LeaseRecord).where(LeaseRecord.work == work, LeaseRecord.worker == held.worker).values(**mine)
        return bool(session.execute(taken).rowcount)  # type: ignore[attr-defined]

    def release(self, *works: str) -> None:
        """Give claims back."""
        own = delete(LeaseRecord).where(LeaseRecord.work.in_(works), LeaseRecord.worker == self.worker)
        run_transaction(self.engine, lambda session: session.execute(own))
        self._mine -= set(works)

    def close(self) -> None:
        """Give all claims back, and be silent."""
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
        if self._mine:
            self.release(*self._mine)

    @contextmanager
    def exclusively(self, work: str) -> Iterator[None]:
        """Wait until nobody else is at `work`, and hold it meanwhile."""
        while not self.take(work):
            time.sleep(POLL_S)
        try:
            yield
        finally:
            self.release(work)

    def num_workers(self) -> int:
        """How many living workers have work in their hands."""
        held = select(func.count(LeaseRecord.worker.distinct())).where(self._now - LeaseRecord.beat < LEASE_TIMEOUT_S)
        return run_transaction(self.engine, lambda session: int(session.scalar(held) or 0))

    def _begin_to_beat(self) -> None:
        if self._beating is None:
            self._stop.clear()
            self._beating = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._beating.start()

    def _beat(self) -> None:
        renewed = update(LeaseRecord).where(LeaseRecord.worker == self.worker).values(beat=self._now)

        def renew(session: Session) -> None:
            session.execute(renewed)

        while not self._stop.wait(HEARTBEAT_S):
            try:
                run_transaction(self.engine, renew, timeout_s=LEASE_TIMEOUT_S / 2)
            except RunError as error:
                self._failed = error
                return
