"""The results database: every point, its scores with intervals, its costs and where it was made; every failure and skipped image.

SQLite by default, any SQLAlchemy URL otherwise. A point's row and its scores are written in one transaction.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pandas as pd
from sqlalchemy import delete, func, inspect, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from isocost.errors import ConfigError
from isocost.evaluation.confidence_intervals import Interval
from isocost.sweep.db import connect, run_transaction
from isocost.sweep.schema import (
    Base,
    EventRecord,
    PointRecord,
    ProtocolRecord,
    RaceRecord,
    SchemaRecord,
    ScoreRecord,
    ShardRecord,
)

SCHEMA_VERSION = 6
"""2: points carry all of their numerics. 3: and their task; none is text-to-image. 4: shards and claims. 5: races.
6: peak memory."""
ATTEMPTS = 10


class ResultsDB:
    """Opened on a file or URL; made where absent."""

    def __init__(self, where: str | Path) -> None:
        """
        Raises:
            ConfigError: the results database cannot be reached, or was written by a newer version of isocost.
        """
        self.engine = connect(where)
        version = self._version()
        if version is not None and version > SCHEMA_VERSION:
            raise ConfigError(
                f"{where}: a results database of version {version}; this isocost reads {SCHEMA_VERSION}: upgrade isocost"
            )
        if version != SCHEMA_VERSION:
            self._make_tables()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close every connection; what SQLite wrote ahead goes into its one file with the last of them."""
        self.engine.dispose()

    def _version(self) -> int | None:
        if not inspect(self.engine).has_table(SchemaRecord.__tablename__):
            return None
        return run_transaction(self.engine, lambda session: session.scalar(select(SchemaRecord.version)))

    def _make_tables(self) -> None:
        """Make what is missing and note the version; several processes may do it at once."""
        for attempt in range(ATTEMPTS):
            try:
                Base.metadata.create_all(self.engine)
                self._add_columns()
                with Session(self.engine) as session, session.begin():
                    session.execute(delete(SchemaRecord))
                    session.add(SchemaRecord(version=SCHEMA_VERSION))
                return
            except DBAPIError:
                if attempt == ATTEMPTS - 1 or self._version() == SCHEMA_VERSION:
                    raise
                time.sleep(0.2)

    def _add_columns(self) -> None:
        """Bring an older results database's points to this version; what they do not know of themselves stays empty."""
        there = {column["name"] for column in inspect(self.engine).get_columns("points")}
        with self.engine.begin() as connection:
            for column in PointRecord.__table__.columns:
                if column.name not in there:
                    kind = column.type.compile(self.engine.dialect)
                    connection.execute(text(f"ALTER TABLE points ADD COLUMN {column.name} {kind}"))

    def points(self) -> set[str]:
        """Digests of the points that are done."""
        return run_transaction(self.engine, lambda session: set(session.scalars(select(PointRecord.point))))

    def add_point(
        self,
        row: Mapping[str, Any],
        scores: Mapping[str, Interval],
        provenance: Mapping[str, str],
        protocol_parts: Mapping[str, Any],
    ) -> None:
        """Record a point with its scores and what its protocol stands for, in place of an earlier record of it; its shards are
        forgotten."""

        def write(session: Session) -> None:
            parts = json.dumps(dict(protocol_parts), ensure_ascii=False)
            session.merge(ProtocolRecord(protocol=row["protocol"], parts=parts))
            for table in (ScoreRecord, PointRecord, ShardRecord):
                session.execute(delete(table).where(table.point == row["point"]))
            session.add(PointRecord(**row, created=_now(), provenance=json.dumps(dict(provenance))))
            session.flush()
            session.add_all(ScoreRecord.of(row["point"], metric, interval) for metric, interval in scores.items())

        run_transaction(self.engine, write)

    def set_time(self, point: str, ms_per_image: float, timed_with: Mapping[str, Any]) -> None:
        """Record what an image of a point that is there takes, measured anew, and with what."""

        def write(session: Session) -> None:
            row = session.get_one(PointRecord, point)
            row.ms_per_image = ms_per_image
            row.provenance = json.dumps({**json.loads(row.provenance), "timed_with": dict(timed_with)})

        run_transaction(self.engine, write)

    def add_shard(self, shard: str, point: str, images: range) -> None:
        """Record some images of a point that are made."""
        made = {"first": images.start, "stop": images.stop, "host": platform.node(), "created": _now()}

        def write(session: Session) -> None:
            session.merge(ShardRecord(shard=shard, point=point, **made))

        run_transaction(self.engine, write)

    def num_shards(self) -> int:
        """Shards of points that are not whole yet."""
        return run_transaction(
            self.engine, lambda session: int(session.scalar(select(func.count()).select_from(ShardRecord)) or 0)
        )

    def add_race(self, row: Mapping[str, Any]) -> None:
        """Record what the race of a cell found, in place of an earlier record of it."""
        run_transaction(self.engine, lambda session: session.merge(RaceRecord(**row)))

    def stop_cell(self, cell: str, reason: str | None) -> None:
        """Record why a cell is not scored, or that it is."""
        noted = update(RaceRecord).where(RaceRecord.cell == cell).values(stopped=reason)
        run_transaction(self.engine, lambda session: session.execute(noted))

    def races(self) -> dict[str, dict[str, Any]]:
        """What races found, by cell."""

        def read(session: Session) -> dict[str, dict[str, Any]]:
            columns = [column.name for column in RaceRecord.__table__.columns]
            return {row.cell: {name: getattr(row, name) for name in columns} for row in session.scalars(select(RaceRecord))}

        return run_transaction(self.engine, read)

    def add_scores(self, point: str, scores: Mapping[str, Interval]) -> None:
        """Record further scores of a point that is there."""

        def write(session: Session) -> None:
            for metric, interval in scores.items():
                session.merge(ScoreRecord.of(point, metric, interval))

        run_transaction(self.engine, write)

    def metrics(self) -> dict[str, set[str]]:
        """Names of the scores of every point."""

        def read(session: Session) -> dict[str, set[str]]:
            told: dict[str, set[str]] = {point: set() for point in session.scalars(select(PointRecord.point))}
            for point, metric in session.execute(select(ScoreRecord.point, ScoreRecord.metric)):
                told[point].add(metric)
            return told

        return run_transaction(self.engine, read)

    def import_from(self, other: ResultsDB) -> int:
        """Copy what this results database lacks: points with scores and protocols, races, events; returns how many points came."""
        known, raced, told_of = self.points(), self.races(), self.events()
        with Session(other.engine) as session:
            points = [row for row in session.scalars(select(PointRecord)) if row.point not in known]
            asked = {row.point for row in points}
            protocols = {row.protocol for row in points}
            scores = [row for row in session.scalars(select(ScoreRecord)) if row.point in asked]
            told = [row for row in session.scalars(select(ProtocolRecord)) if row.protocol in protocols]
            races = [row for row in session.scalars(select(RaceRecord)) if row.cell not in raced]
        new_events = [event for event in other.events() if event not in told_of]

        def write(session: Session) -> None:
            for row in (*told, *points):
                session.merge(row)
            session.flush()
            for row in (*scores, *races):
                session.merge(row)
            session.add_all(EventRecord(**event) for event in new_events)

        run_transaction(self.engine, write)
        return len(points)

    def set_events(self, stage: str, events: Sequence[tuple[str, str]]) -> None:
        """Record (subject, message) pairs of a stage, in place of what it recorded before."""

        def write(session: Session) -> None:
            session.execute(delete(EventRecord).where(EventRecord.stage == stage))
            session.add_all(
                EventRecord(created=_now(), stage=stage, subject=subject, message=message) for subject, message in events
            )

        run_transaction(self.engine, write)

    def events(self) -> list[dict[str, str]]:
        """All events, oldest first."""

        def read(session: Session) -> list[dict[str, str]]:
            rows = session.scalars(select(EventRecord).order_by(EventRecord.number))
            return [{"stage": r.stage, "subject": r.subject, "message": r.message, "created": r.created} for r in rows]

        return run_transaction(self.engine, read)

    def table(self) -> pd.DataFrame:
        """One row a point; every metric as three columns `m`, `m_low`, `m_high`; ordered by coordinate, not by arrival.

        Where guidance was raced for, `guidance_low` and `guidance_high` are the interval of the best one, `race_images` what
        the race drew, and `race_at_boundary` whether it ended at the end of its ladder; all are empty for points of a grid.
        """
        with self.engine.connect() as connection:
            points = pd.read_sql(select(PointRecord.__table__), connection)
            scores = pd.read_sql(select(ScoreRecord.__table__), connection)
            protocols = pd.read_sql(select(ProtocolRecord.__table__), connection).set_index("protocol")
            races = pd.read_sql(select(RaceRecord.__table__), connection)
        table = points.set_index("point")
        table["protocol_parts"] = table["protocol"].map(protocols["parts"])
        if len(races):
            found = races.drop_duplicates("point", keep="last").set_index("point")
            raced = found.assign(race_images=found["num_images"], race_at_boundary=found["is_at_boundary"])
            table = table.join(raced[["guidance_low", "guidance_high", "race_images", "race_at_boundary"]])
        for metric, group in scores.groupby("metric"):
            by_point = group.set_index("point")
            for suffix, column in (("", "value"), ("_low", "low"), ("_high", "high")):
                table[f"{metric}{suffix}"] = by_point[column]
        last = table.groupby("width")["images_seen"].transform("max") if len(table) else 0
        table["is_final"] = table["images_seen"] == last
        order = ["width", "images_seen", "solver", "num_steps", "guidance", "seed", "protocol"]
        return table.reset_index().sort_values(order, ignore_index=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
