"""Leases on work items: several processes with one results database share the work, and replace dead workers.

A lease is a row with a work item, its worker and the time of the worker's last heartbeat, by the clock of the database. A
thread of the worker sends a heartbeat every few seconds. A lease is free again when it is released, when its process has ended
(on this machine), or when its last heartbeat is older than `LEASE_TIMEOUT_S`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, func, literal_column, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from isocost.errors import ConfigError, RunError
from isocost.sweep.db import run_transaction
from isocost.sweep.schema import LeaseRecord
from isocost.utils.host import host_name, is_alive

logger = logging.getLogger(__name__)

LEASE_TIMEOUT_S = 60.0
HEARTBEAT_S = 5.0
POLL_S = 0.5
FIRST_NOTICE_S = 5.0
"""Time after which a wait is reported. Shorter waits are usual at the end of a stage that workers share."""
NOTICE_S = 30.0


@dataclass
class _Holder:
    """The worker that holds a lease for which this worker waits; `waiting_since` is a `time.monotonic()`."""

    worker: str
    host: str
    pid: int
    age_s: float
    waiting_since: float


class Leases:
    """The leases of one worker, in a database that has the tables of `schema.py`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.worker = uuid.uuid4().hex
        self.host, self.pid = host_name(), os.getpid()
        sqlite = "(julianday('now') - 2440587.5) * 86400.0"
        self._now: ColumnElement[float] = literal_column(
            sqlite if engine.dialect.name == "sqlite" else "extract(epoch from clock_timestamp())"
        )
        self._held: set[str] = set()
        self._holders: dict[str, _Holder] = {}
        self._noticed = -NOTICE_S
        self._heartbeat_thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._error: RunError | None = None

    def acquire(self, work_item: str) -> bool:
        """Acquire the lease of a work item; False if another living worker holds it.

        Raises:
            ConfigError: the heartbeat of the lease lies in the future.
            RunError: the results database could not be reached for a heartbeat.
        """
        if self._error is not None:
            raise self._error
        try:
            if not run_transaction(self.engine, lambda session: self._acquire(session, work_item), max_conflicts=0):
                return False
        except IntegrityError:  # another worker acquired it at the same time
            return False
        self._held.add(work_item)
        self._holders.pop(work_item, None)
        self._start_heartbeat()
        return True

    def _acquire(self, session: Session, work_item: str) -> bool:
        columns = {"worker": self.worker, "host": self.host, "pid": self.pid, "heartbeat": self._now}
        age = (self._now - LeaseRecord.heartbeat).label("age_s")
        query = select(LeaseRecord.worker, LeaseRecord.host, LeaseRecord.pid, age).where(LeaseRecord.work_item == work_item)
        lease = session.execute(query).first()
        if lease is None:
            session.add(LeaseRecord(work_item=work_item, **columns))
            session.flush()
            return True
        if lease.worker == self.worker:
            return True
        if lease.age_s < -LEASE_TIMEOUT_S:
            raise ConfigError(
                f"{work_item}: leased by {lease.host}, {-lease.age_s:.0f} s in the future; correct the clock of that host"
            )
        if lease.age_s < LEASE_TIMEOUT_S and (lease.host != self.host or is_alive(lease.pid)):
            known = self._holders.get(work_item)
            waiting_since = known.waiting_since if known is not None and known.worker == lease.worker else time.monotonic()
            self._holders[work_item] = _Holder(lease.worker, lease.host, lease.pid, lease.age_s, waiting_since)
            return False
        takeover = update(LeaseRecord).where(LeaseRecord.work_item == work_item, LeaseRecord.worker == lease.worker)
        return bool(session.execute(takeover.values(**columns)).rowcount)  # type: ignore[attr-defined]

    def release(self, *work_items: str) -> None:
        statement = delete(LeaseRecord).where(LeaseRecord.work_item.in_(work_items), LeaseRecord.worker == self.worker)
        run_transaction(self.engine, lambda session: session.execute(statement))
        self._held -= set(work_items)

    def close(self) -> None:
        """Stop the heartbeat and release all leases."""
        self._stop.set()
        if self._heartbeat_thread is not None:
            self._heartbeat_thread.join()
            self._heartbeat_thread = None
        if self._held:
            self.release(*self._held)

    def wait(self, *work_items: str) -> None:
        """Pause before the next attempt to acquire leases that other workers hold, and report a long wait.

        The report names the worker that has held one of the leases for the longest time. It comes after `FIRST_NOTICE_S`, and
        then every `NOTICE_S` at most.

        Args:
            work_items: those that this worker waits for.
        """
        self._holders = {item: holder for item, holder in self._holders.items() if item in work_items}
        clock = time.monotonic()
        if self._holders and clock - self._noticed >= NOTICE_S:
            item, holder = min(self._holders.items(), key=lambda entry: entry[1].waiting_since)
            if clock - holder.waiting_since >= FIRST_NOTICE_S:
                self._noticed = clock
                logger.info(
                    f"waiting for {item}: process {holder.pid} on {holder.host} has held it for "
                    f"{clock - holder.waiting_since:.0f} s or more; its last heartbeat was {max(0.0, holder.age_s):.0f} s ago; "
                    "if that process is stuck, end it, and this process does the work"
                )
        time.sleep(POLL_S)

    @contextmanager
    def exclusively(self, work_item: str) -> Iterator[None]:
        """Wait for the lease of a work item, and hold it inside the context."""
        while not self.acquire(work_item):
            self.wait(work_item)
        try:
            yield
        finally:
            self.release(work_item)

    def num_workers(self) -> int:
        """Return the number of living workers that hold a lease."""
        query = select(func.count(LeaseRecord.worker.distinct())).where(self._now - LeaseRecord.heartbeat < LEASE_TIMEOUT_S)
        return run_transaction(self.engine, lambda session: int(session.scalar(query) or 0))

    def _start_heartbeat(self) -> None:
        if self._heartbeat_thread is None:
            self._stop.clear()
            self._heartbeat_thread = threading.Thread(target=self._send_heartbeats, name="leases", daemon=True)
            self._heartbeat_thread.start()

    def _send_heartbeats(self) -> None:
        statement = update(LeaseRecord).where(LeaseRecord.worker == self.worker).values(heartbeat=self._now)

        def renew(session: Session) -> None:
            session.execute(statement)

        while not self._stop.wait(HEARTBEAT_S):
            try:
                run_transaction(self.engine, renew, timeout_s=LEASE_TIMEOUT_S / 2)
            except RunError as error:
                self._error = error
                return
