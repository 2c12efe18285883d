"""The ledger: every point, its scores with intervals, its costs and where it was made; every failure and skipped picture.

SQLite by default, any SQLAlchemy URL otherwise. A point's row and its scores are written in one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from sqlalchemy import (
    Boolean,
    Float,
    ForeignKey,
    Integer,
    String,
    Text,
    create_engine,
    delete,
    event,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from isocost.errors import RequestError
from isocost.score.intervals import Interval

SCHEMA_VERSION = 3
"""2: points carry all of their numerics. 3: and their task; none is text-to-image."""


class _Base(DeclarativeBase):
    pass


class SchemaRow(_Base):
    """The version of the tables."""

    __tablename__ = "schema"
    version: Mapped[int] = mapped_column(Integer, primary_key=True)


class PointRow(_Base):
    """One scored point: coordinate, costs, provenance."""

    __tablename__ = "points"
    point: Mapped[str] = mapped_column(String(32), primary_key=True)
    checkpoint: Mapped[str] = mapped_column(String(32), index=True)
    protocol: Mapped[str] = mapped_column(String(32), index=True)
    task: Mapped[str | None] = mapped_column(String(32))
    size: Mapped[str] = mapped_column(String(32))
    width: Mapped[int] = mapped_column(Integer)
    num_parameters: Mapped[int] = mapped_column(Integer)
    images_seen: Mapped[int] = mapped_column(Integer)
    training_gflop: Mapped[float] = mapped_column(Float)
    sampler: Mapped[str] = mapped_column(String(64))
    num_steps: Mapped[int] = mapped_column(Integer)
    guidance: Mapped[float] = mapped_column(Float)
    num_pictures: Mapped[int] = mapped_column(Integer)
    num_not_finite: Mapped[int] = mapped_column(Integer)
    seed: Mapped[int] = mapped_column(Integer)
    precision: Mapped[str] = mapped_column(String(8))
    compiled: Mapped[bool | None] = mapped_column(Boolean)
    bucket_size: Mapped[int | None] = mapped_column(Integer)
    least_bucket_size: Mapped[int | None] = mapped_column(Integer)
    paper_cost: Mapped[float] = mapped_column(Float)
    nfe: Mapped[float] = mapped_column(Float)
    gflop: Mapped[float] = mapped_column(Float)
    ms_per_picture: Mapped[float] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    flagged: Mapped[bool] = mapped_column(Boolean)
    created: Mapped[str] = mapped_column(String(40))
    provenance: Mapped[str] = mapped_column(Text)


class ScoreRow(_Base):
    """One score of a point, with its 95 % interval."""

    __tablename__ = "scores"
    point: Mapped[str] = mapped_column(ForeignKey("points.point"), primary_key=True)
    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[float] = mapped_column(Float)
    low: Mapped[float] = mapped_column(Float)
    high: Mapped[float] = mapped_column(Float)

    @classmethod
    def of(cls, point: str, metric: str, interval: Interval) -> ScoreRow:
        """A score as it is kept."""
        return cls(point=point, metric=metric, value=interval.value, low=interval.low, high=interval.high)


class ProtocolRow(_Base):
    """What a protocol's id stands for: its parts as JSON, so that two of them can be told apart in words."""

    __tablename__ = "protocols"
    protocol: Mapped[str] = mapped_column(String(32), primary_key=True)
    parts: Mapped[str] = mapped_column(Text)


class EventRow(_Base):
    """Something a reader of the study must know: a failure, pictures that were skipped."""

    __tablename__ = "events"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    created: Mapped[str] = mapped_column(String(40))
    stage: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)


class Ledger:
    """Opened on a file or URL; made where absent."""

    def __init__(self, where: str | Path) -> None:
        """
        Raises:
            RequestError: the ledger was written by a newer version of isocost.
        """
        url = str(where) if "://" in str(where) else f"sqlite:///{where}"
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self.engine = create_engine(url)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _write_ahead)
        _Base.metadata.create_all(self.engine)
        self._add_columns()
        with Session(self.engine) as session, session.begin():
            version = session.scalar(select(SchemaRow.version))
            if version is None:
                session.add(SchemaRow(version=SCHEMA_VERSION))
            elif version < SCHEMA_VERSION:
                session.execute(update(SchemaRow).values(version=SCHEMA_VERSION))
            elif version > SCHEMA_VERSION:
                raise RequestError(
                    f"{where}: a ledger of version {version}; this isocost reads {SCHEMA_VERSION}: upgrade isocost"
                )

    def _add_columns(self) -> None:
        """Bring an older ledger's points to this version; what they do not know of themselves stays empty."""
        there = {column["name"] for column in inspect(self.engine).get_columns("points")}
        with self.engine.begin() as connection:
            for column in PointRow.__table__.columns:
                if column.name not in there:
                    kind = column.type.compile(self.engine.dialect)
                    connection.execute(text(f"ALTER TABLE points ADD COLUMN {column.name} {kind}"))

    def points(self) -> set[str]:
        """Digests of the points that are done."""
        with Session(self.engine) as session:
            return set(session.scalars(select(PointRow.point)))

    def add_point(self, row: Mapping[str, Any], scores: Mapping[str, Interval], provenance: Mapping[str, str]) -> None:
        """Record a point with its scores, in place of an earlier record of it."""
        with Session(self.engine) as session, session.begin():
            session.execute(delete(ScoreRow).where(ScoreRow.point == row["point"]))
            session.execute(delete(PointRow).where(PointRow.point == row["point"]))
            session.add(PointRow(**row, created=_now(), provenance=json.dumps(dict(provenance))))
            session.flush()
            for metric, interval in scores.items():
                session.add(ScoreRow.of(row["point"], metric, interval))

    def add_protocol(self, protocol: str, parts: Mapping[str, Any]) -> None:
        """Record what a protocol's id stands for."""
        with Session(self.engine) as session, session.begin():
            session.merge(ProtocolRow(protocol=protocol, parts=json.dumps(dict(parts), ensure_ascii=False)))

    def add_scores(self, point: str, scores: Mapping[str, Interval]) -> None:
        """Record further scores of a point that is there."""
        with Session(self.engine) as session, session.begin():
            for metric, interval in scores.items():
                session.merge(ScoreRow.of(point, metric, interval))

    def metrics_of(self, point: str) -> set[str]:
        """Names of the scores that a point has."""
        with Session(self.engine) as session:
            return set(session.scalars(select(ScoreRow.metric).where(ScoreRow.point == point)))

    def set_events(self, stage: str, events: Sequence[tuple[str, str]]) -> None:
        """Record (subject, message) pairs of a stage, in place of what it recorded before."""
        with Session(self.engine) as session, session.begin():
            session.execute(delete(EventRow).where(EventRow.stage == stage))
            session.add_all(
                EventRow(created=_now(), stage=stage, subject=subject, message=message) for subject, message in events
            )

    def events(self) -> list[dict[str, str]]:
        """All events, oldest first."""
        with Session(self.engine) as session:
            rows = session.scalars(select(EventRow).order_by(EventRow.number))
            return [{"stage": r.stage, "subject": r.subject, "message": r.message, "created": r.created} for r in rows]

    def table(self) -> pd.DataFrame:
        """One row a point; every metric as three columns `m`, `m_low`, `m_high`; ordered by coordinate, not by arrival."""
        with self.engine.connect() as connection:
            points = pd.read_sql(select(PointRow.__table__), connection)
            scores = pd.read_sql(select(ScoreRow.__table__), connection)
            protocols = pd.read_sql(select(ProtocolRow.__table__), connection).set_index("protocol")
        table = points.set_index("point")
        table["protocol_parts"] = table["protocol"].map(protocols["parts"])
        for metric, group in scores.groupby("metric"):
            by_point = group.set_index("point")
            for suffix, column in (("", "value"), ("_low", "low"), ("_high", "high")):
                table[f"{metric}{suffix}"] = by_point[column]
        last = table.groupby("width")["images_seen"].transform("max") if len(table) else 0
        table["is_final"] = table["images_seen"] == last
        order = ["width", "images_seen", "sampler", "num_steps", "guidance", "seed", "protocol"]
        return table.reset_index().sort_values(order, ignore_index=True)


def table_file(out: str | Path, task: str = "text2image", suffix: str = "parquet") -> Path:
    """Where a report leaves the points of a task: `table.parquet`, `table-superres.parquet`."""
    return Path(out) / f"table{'' if task == 'text2image' else f'-{task}'}.{suffix}"


def read_table(out: str | Path, task: str = "text2image") -> pd.DataFrame:
    """The points of a task as the last report of an output folder left them.

    Raises:
        RequestError: there is none.
    """
    file = table_file(out, task)
    if not file.is_file():
        raise RequestError(f"{out}: no {file.name}; an output folder has one after `isocost run` or `isocost report`")
    return pd.read_parquet(file)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_ahead(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
