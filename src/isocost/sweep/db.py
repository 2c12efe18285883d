"""Connections and transactions of a results database (SQLite by default, any SQLAlchemy URL), with retries."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import create_engine, event, text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from isocost.errors import ConfigError, RunError

T = TypeVar("T")
TRANSACTION_TIMEOUT_S = 60.0
RETRY_S = 0.5
MAX_CONFLICTS = 5
_DAMAGED = "restore the database from a copy, or remove it: points whose artefacts are there are scored again without sampling"
_LASTING_PROBLEMS = {
    "full": "free some disk space, and the same command goes on",
    "no space left": "free some disk space, and the same command goes on",
    "readonly": "make it writable, or give another folder",
    "read-only": "make it writable, or give another folder",
    "disk i/o error": "check the disk, and the same command goes on",
    "unable to open": "check that its folder exists and can be written, and the same command goes on",
    "malformed": _DAMAGED,
    "not a database": _DAMAGED,
    "no such table": _DAMAGED,
    "no such column": _DAMAGED,
}
"""Reasons that do not pass by waiting, with what to do about them."""


def connect(address: str | Path) -> Engine:
    """Open a database and check that it answers.

    An SQLite file in a folder that cannot be written is opened for reading only.

    Args:
        address: a SQLAlchemy URL, or the path of an SQLite file, which is created if it is missing.

    Raises:
        ConfigError: the URL is invalid, its driver is not installed, or the database does not answer.
    """
    try:
        url = make_url(str(address)) if "://" in str(address) else URL.create("sqlite", database=str(address))
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.drivername == "sqlite" and url.database:
            file = Path(url.database)
            if file.is_file() and not (_is_writable(file) and _is_writable(file.parent)):
                return _connect_read_only(file)
            file.parent.mkdir(parents=True, exist_ok=True)
        connect_args = {"timeout": TRANSACTION_TIMEOUT_S} if url.drivername == "sqlite" else {}
        engine = create_engine(url, pool_pre_ping=url.drivername != "sqlite", connect_args=connect_args)
        if url.drivername == "sqlite":
            event.listen(engine, "connect", _use_write_ahead_log)
        with engine.connect():
            return engine
    except ArgumentError as error:
        raise ConfigError(
            f"--database {address}: not an address of a database; give postgresql://USER@HOST/NAME or a file"
        ) from error
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"--database {without_password(address)}: its driver is not installed; pip install 'isocost[postgresql]'"
        ) from error
    except DBAPIError as error:
        raise ConfigError(
            f"--database {without_password(address)}: the results database cannot be reached ({_first_line(error.orig)})"
        ) from error


def _is_writable(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _connect_read_only(file: Path) -> Engine:
    """Open an SQLite file without a change to its folder.

    SQLite needs to write next to a file in write-ahead mode, unless the file never changes. Work that is only in the log is
    read from a temporary copy of both files.
    """
    log = file.with_name(f"{file.name}-wal")
    if log.is_file() and log.stat().st_size:
        folder = tempfile.TemporaryDirectory(prefix="isocost-results-")
        copies = [Path(shutil.copyfile(source, Path(folder.name) / source.name)) for source in (file, log)]
        engine = create_engine(URL.create("sqlite", database=str(copies[0])))
        weakref.finalize(engine, folder.cleanup)
    else:
        address = f"file:{quote(str(file.resolve()))}?mode=ro&immutable=1"
        engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(address, uri=True, check_same_thread=False))
    with engine.connect() as connection:
        connection.execute(text("SELECT count(*) FROM sqlite_master"))
    return engine


def run_transaction(
    engine: Engine,
    work: Callable[[Session], T],
    timeout_s: float = TRANSACTION_TIMEOUT_S,
    max_conflicts: int = MAX_CONFLICTS,
) -> T:
    """Run `work` in one transaction, with retries, and return its result.

    Args:
        engine: the database.
        work: reads or writes in the session that it gets; it may be called several times.
        timeout_s: seconds of retries while the database is locked or does not answer.
        max_conflicts: retries when another process writes the same row at the same time.

    Raises:
        IntegrityError: every retry conflicted with another process.
        RunError: the database did not answer in time, has no space left, cannot be written, or is damaged.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with Session(engine) as session, session.begin():
                return work(session)
        except IntegrityError:
            if not max_conflicts:
                raise
            max_conflicts -= 1
        except DBAPIError as error:
            reason = _first_line(error.orig)
            remedy = next((remedy for words, remedy in _LASTING_PROBLEMS.items() if words in reason.lower()), None)
            if remedy is not None:
                raise RunError(f"the results database {_name(engine)}: {reason}; finished work is kept: {remedy}") from error
            if not isinstance(error, OperationalError | InterfaceError):
                raise RunError(f"the results database {_name(engine)}: {reason}; {_DAMAGED}") from error
            if time.monotonic() > deadline:
                raise RunError(
                    f"the results database cannot be reached ({reason}); finished work is kept: "
                    "run again when the database answers"
                ) from error
            time.sleep(RETRY_S)


def _name(engine: Engine) -> str:
    return engine.url.database or "" if engine.dialect.name == "sqlite" else engine.url.render_as_string(hide_password=True)


def without_password(address: str | Path) -> str:
    """Format an address for a message."""
    return make_url(str(address)).render_as_string(hide_password=True) if "://" in str(address) else str(address)


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _use_write_ahead_log(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
