"""The way to a results database: SQLite by default, any SQLAlchemy URL otherwise, with patience where it is away for a while."""

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


def connect(where: str | Path) -> Engine:
    """An engine on a file or URL that answers.

    Raises:
        ConfigError: the URL is none, its driver is not installed, or nothing answers there.
    """
    try:
        url = make_url(str(where)) if "://" in str(where) else make_url(f"sqlite:///{where}")
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if url.drivername == "sqlite" and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        waits = {"timeout": TRANSACTION_TIMEOUT_S} if url.drivername == "sqlite" else {}
        engine = create_engine(url, pool_pre_ping=url.drivername != "sqlite", connect_args=waits)
        if url.drivername == "sqlite":
            event.listen(engine, "connect", _write_ahead)
        with engine.connect():
            return engine
    except ArgumentError as error:
        raise ConfigError(
            f"--database {where}: no address of a database; give postgresql://USER@HOST/NAME, or a file"
        ) from error
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigError(
            f"--database {_shown(where)}: its driver is not installed: pip install 'isocost[postgresql]'"
        ) from error
    except DBAPIError as error:
        raise ConfigError(
            f"--database {_shown(where)}: the results database cannot be reached ({_first_line(error.orig)})"
        ) from error


def run_transaction(
    engine: Engine, work: Callable[[Session], T], timeout_s: float = TRANSACTION_TIMEOUT_S, conflicts: int = MAX_CONFLICTS
) -> T:
    """What `work` gives in one transaction; tried again for a while where the results database is away or locked.

    Another may write the same row in the same moment; then it is tried again, `conflicts` times.

    Raises:
        IntegrityError: it came to that every time.
        RunError: it stayed away.
    """
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            with Session(engine) as session, session.begin():
                return work(session)
        except IntegrityError:
            if not conflicts:
                raise
            conflicts -= 1
        except (OperationalError, InterfaceError) as error:
            if time.monotonic() > give_up:
                raise RunError(
                    f"the results database cannot be reached ({_first_line(error.orig)}); what is done stays, run again when it is back"
                ) from error
            time.sleep(RETRY_S)


def _shown(where: str | Path) -> str:
    """Without the password."""
    return make_url(str(where)).render_as_string(hide_password=True) if "://" in str(where) else str(where)


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def _write_ahead(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
