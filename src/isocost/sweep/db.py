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

from sqlalchemy import Column, MetaData, create_engine, event, inspect, text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.orm import Session

from isocost.errors import ConfigError, RunError

T = TypeVar("T")
TRANSACTION_TIMEOUT_S = 60.0
RETRY_S = 0.5
MAX_CONFLICTS = 5
READ_ONLY = "isocost_read_only"
"""Execution option of an engine whose database cannot be written."""
FILE = "isocost_file"
"""Execution option of such an engine: the file that the user gave, for messages."""
_DAMAGED = "restore the database from a copy, or remove it: points whose artefacts are there are scored again without sampling"
_LASTING_PROBLEMS = {
    "full": "free some disk space, then run the same command again",
    "no space left": "free some disk space, then run the same command again",
    "readonly": "make it writable, or give another folder",
    "read-only": "make it writable, or give another folder",
    "must be owner of": "open it once with the account that owns its tables",
    "it is a view": "make it writable, or give another folder",
    "disk i/o error": "check the disk, then run the same command again",
    "unable to open": "check that its folder exists and is writable, then run the same command again",
    "malformed": _DAMAGED,
    "not a database": _DAMAGED,
    "no such table": _DAMAGED,
    "no such column": _DAMAGED,
}
"""Reasons that waiting does not remove, with their remedies."""


def connect(address: str | Path, read_only: bool = False) -> Engine:
    """Open a database and check that it answers.

    An SQLite file in a folder that cannot be written is opened for reading only.

    Args:
        address: a SQLAlchemy URL, or the path of an SQLite file, which is created if it is missing.
        read_only: open an SQLite file that exists without any change to it or to its folder.

    Raises:
        ConfigError: the URL is invalid, its driver is not installed, or the database does not answer.
    """
    try:
        url = make_url(str(address)) if "://" in str(address) else URL.create("sqlite", database=str(address))
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.drivername == "sqlite" and url.database:
            file = Path(url.database)
            if file.is_file() and (read_only or not (_is_writable(file) and _is_writable(file.parent))):
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
            f"--database {address}: not a database address; give postgresql://USER@HOST/NAME or a file"
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
    options = {READ_ONLY: True, FILE: str(file)}
    log = file.with_name(f"{file.name}-wal")
    if log.is_file() and log.stat().st_size:
        folder = tempfile.TemporaryDirectory(prefix="isocost-results-")
        copies = [Path(shutil.copyfile(source, Path(folder.name) / source.name)) for source in (file, log)]
        engine = create_engine(URL.create("sqlite", database=str(copies[0])), execution_options=options)
        event.listen(engine, "connect", _refuse_writes)
        weakref.finalize(engine, folder.cleanup)
    else:
        address = f"file:{quote(str(file.resolve()))}?mode=ro&immutable=1"
        engine = create_engine(
            "sqlite://",
            creator=lambda: sqlite3.connect(address, uri=True, check_same_thread=False),
            execution_options=options,
        )
    with engine.connect() as connection:
        connection.execute(text("SELECT count(*) FROM sqlite_master"))
    return engine


def _refuse_writes(connection: sqlite3.Connection, _: object) -> None:
    connection.execute("PRAGMA query_only = ON").close()


def add_missing_columns(engine: Engine, metadata: MetaData) -> None:
    """Add the nullable columns that an earlier release did not write. A database that cannot be written stays as it is.

    In a read-only database the missing columns are read as NULL.

    Args:
        engine: a database with the tables.
        metadata: the tables of this release.

    Raises:
        RunError: the database does not answer, or the account may not change its tables.
    """
    if not missing_columns(engine, metadata):
        return
    if engine.get_execution_options().get(READ_ONLY):
        read_missing_columns_as_null(engine, metadata)
        return

    def add(session: Session) -> None:  # a process that comes second finds the columns when it tries again
        for table, columns in missing_columns(engine, metadata).items():
            for column in columns:
                session.execute(text(f"ALTER TABLE {table} ADD COLUMN {column.name} {column.type.compile(engine.dialect)}"))

    run_transaction(engine, add)


def read_missing_columns_as_null(engine: Engine, metadata: MetaData) -> None:
    """Read the nullable columns that a database lacks as NULL, without a change to it.

    A temporary view, which only its own connection sees, hides each table that lacks columns.
    """
    missing = missing_columns(engine, metadata)
    if not missing:
        return
    schema = inspect(engine).default_schema_name
    views = [
        f"CREATE TEMPORARY VIEW {table} AS SELECT {table}.*, "
        + ", ".join(f"CAST(NULL AS {column.type.compile(engine.dialect)}) AS {column.name}" for column in columns)
        + f" FROM {schema}.{table}"
        for table, columns in missing.items()
    ]

    def create_views(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        is_read_only = engine.get_execution_options().get(READ_ONLY)
        if is_read_only:
            cursor.execute("PRAGMA query_only = OFF")
        for view in views:
            cursor.execute(view)
        if is_read_only:
            cursor.execute("PRAGMA query_only = ON")
        cursor.close()
        connection.commit()

    engine.dispose()
    event.listen(engine, "connect", create_views)


def missing_columns(engine: Engine, metadata: MetaData) -> dict[str, list[Column[Any]]]:
    """The nullable columns of `metadata` that the tables of the database lack, by table."""

    def read(session: Session) -> dict[str, list[Column[Any]]]:
        inspector = inspect(session.connection())
        existing = {name: {column["name"] for column in inspector.get_columns(name)} for name in inspector.get_table_names()}
        absent = {
            name: [column for column in table.columns if column.nullable and column.name not in existing[name]]
            for name, table in metadata.tables.items()
            if name in existing
        }
        return {name: columns for name, columns in absent.items() if columns}

    return run_transaction(engine, read)


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
    if file := engine.get_execution_options().get(FILE):
        return str(file)
    return engine.url.database or "" if engine.dialect.name == "sqlite" else engine.url.render_as_string(hide_password=True)


def without_password(address: str | Path) -> str:
    """Format an address for a message."""
    return make_url(str(address)).render_as_string(hide_password=True) if "://" in str(address) else str(address)


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _use_write_ahead_log(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
