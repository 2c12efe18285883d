"""Connections and transactions of a results database (SQLite by default, any SQLAlchemy URL), with retries."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import create_engine, event
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from isocost.errors import ConfigError, RunError

T = TypeVar("T")
TRANSACTION_TIMEOUT_S = 60.0
RETRY_S = 0.5
MAX_CONFLICTS = 5


def connect(address: str | Path) -> Engine:
    """Open a database and check that it answers.

    Args:
        address: a SQLAlchemy URL, or the path of an SQLite file, which is created if it is missing.

    Raises:
        ConfigError: the URL is invalid, its driver is not installed, or the database does not answer.
    """
    try:
        url = make_url(str(address)) if "://" in str(address) else make_url(f"sqlite:///{address}")
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.drivername == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
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
        RunError: the database did not answer in time.
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
        except (OperationalError, InterfaceError) as error:
            if time.monotonic() > deadline:
                raise RunError(
                    f"the results database cannot be reached ({_first_line(error.orig)}); finished work is kept: "
                    "run again when the database answers"
                ) from error
            time.sleep(RETRY_S)


def without_password(address: str | Path) -> str:
    """Format an address for a message."""
    return make_url(str(address)).render_as_string(hide_password=True) if "://" in str(address) else str(address)


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _use_write_ahead_log(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
