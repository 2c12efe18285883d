"""The results database: points with scores, intervals, costs and provenance; races; failures and skipped images.

It is an SQLite file by default, or any database with a SQLAlchemy URL. A point and its scores are written in one transaction.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pandas as pd
from sqlalchemy import Float, Row, delete, func, inspect, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from isocost.errors import ConfigError, RunError
from isocost.evaluation.confidence_intervals import Interval
from isocost.evaluation.paired import PointResamples
from isocost.metrics.arrays import Array
from isocost.sweep.db import (
    READ_ONLY,
    add_missing_columns,
    connect,
    read_missing_columns_as_null,
    run_transaction,
    without_password,
)
from isocost.sweep.schema import (
    GFLOP_PARTS,
    Base,
    DecisionRecord,
    EventRecord,
    PointRecord,
    ProtocolRecord,
    RaceRecord,
    SchemaRecord,
    ScoreRecord,
    ShardRecord,
    VaeRecord,
)

SCHEMA_VERSION = 7
"""Version of the tables. isocost 0.1 wrote versions 1 to 6."""
MAX_ATTEMPTS = 10
TIMED_WITH = "timed_with"
"""In the provenance of a point: device and conditions of a measurement of its times by `isocost remeasure`."""


class ResultsDB:
    """An open results database. Its tables are created if they are missing."""

    def __init__(self, address: str | Path, keep_tables: bool = False, read_only: bool = False) -> None:
        """
        Args:
            address: a SQLAlchemy URL, or the path of an SQLite file.
            keep_tables: do not add the columns that an earlier release did not write, but read them as NULL: for a database
                that is only read.
            read_only: open an SQLite file without any change to it or to its folder.

        Raises:
            ConfigError: the database cannot be reached, or another version of isocost wrote it.
            RunError: it lacks columns, and the account may not add them.
        """
        self.engine = connect(address, read_only)
        version = self._version()
        if version is None:
            self._create_tables()
        elif version != SCHEMA_VERSION:
            self.engine.dispose()
            writer, remedy = "isocost 0.1", "run the study again with 0.2"
            if version > SCHEMA_VERSION:
                writer, remedy = "a newer isocost", "upgrade isocost"
            raise ConfigError(
                f"{without_password(address)}: results database of version {version}, made by {writer}; "
                f"this isocost reads version {SCHEMA_VERSION}: {remedy}"
            )
        elif keep_tables:
            read_missing_columns_as_null(self.engine, Base.metadata)
        else:
            add_missing_columns(self.engine, Base.metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close all connections. The last one to close moves SQLite's write-ahead log into the database file."""
        self.engine.dispose()

    def _version(self) -> int | None:
        def read(session: Session) -> int | None:
            if not inspect(session.connection()).has_table(SchemaRecord.__tablename__):
                return None
            return session.scalar(select(SchemaRecord.version))

        return run_transaction(self.engine, read)

    def _create_tables(self) -> None:
        """Create the tables and write their version; several processes may do it at the same time."""

        def write(session: Session) -> None:
            Base.metadata.create_all(session.connection())
            session.execute(delete(SchemaRecord))
            session.add(SchemaRecord(version=SCHEMA_VERSION))

        for attempt in range(MAX_ATTEMPTS):
            try:
                run_transaction(self.engine, write)
                return
            except (DBAPIError, RunError):
                if self._version() == SCHEMA_VERSION:
                    return
                if attempt == MAX_ATTEMPTS - 1:
                    raise
                time.sleep(0.2)

    def points(self) -> set[str]:
        """Return the digests of all scored points."""
        return run_transaction(self.engine, lambda session: set(session.scalars(select(PointRecord.point))))

    def checkpoints(self) -> set[str]:
        """Digests of the checkpoints that have a scored point or a finished race."""

        def read(session: Session) -> set[str]:
            return {*session.scalars(select(PointRecord.checkpoint)), *session.scalars(select(RaceRecord.checkpoint))}

        return run_transaction(self.engine, read)

    def add_point(
        self,
        row: Mapping[str, Any],
        scores: Mapping[str, Interval],
        provenance: Mapping[str, str],
        protocol_parts: Mapping[str, Any],
        vae: Mapping[str, Any] | None = None,
        resamples: Mapping[str, Array] | None = None,
    ) -> None:
        """Write a point with its scores and its protocol, replace an earlier record of it, and delete its shards.

        The times that `set_time` has written into an earlier record stay: they belong to the settings of the point.

        Args:
            row: the columns of `PointRecord` except `created` and `provenance`.
            scores: interval by metric.
            provenance: code version, device and the like.
            protocol_parts: see `ProtocolRecord`.
            vae: the columns of `VaeRecord` except `point`; None if the autoencoder has its default settings.
            resamples: scores of the bootstrap resamples by metric, [1 + R], for paired differences.
        """
        resampled = resamples or {}
        if vae is not None:
            self._create_table(VaeRecord)

        def write(session: Session) -> None:
            parts = json.dumps(dict(protocol_parts), ensure_ascii=False)
            session.merge(ProtocolRecord(protocol=row["protocol"], parts=parts))
            if vae is not None:
                session.execute(delete(VaeRecord).where(VaeRecord.point == row["point"]))
            columns = (
                PointRecord.ms_per_image,
                PointRecord.latency_ms,
                PointRecord.joules_per_image,
                PointRecord.provenance,
            )
            earlier = session.execute(select(*columns).where(PointRecord.point == row["point"])).one_or_none()
            for table in (ScoreRecord, PointRecord, ShardRecord):
                session.execute(delete(table).where(table.point == row["point"]))
            record = PointRecord(**row, created=_now(), provenance=json.dumps(dict(provenance)))
            if earlier is not None and TIMED_WITH in json.loads(earlier.provenance):
                _take_times(record, earlier)
            session.add(record)
            session.flush()
            session.add_all(
                ScoreRecord.from_interval(row["point"], metric, interval, resampled.get(metric))
                for metric, interval in scores.items()
            )
            if vae is not None:
                session.add(VaeRecord(point=row["point"], **vae))

        run_transaction(self.engine, write)

    def set_decision(self, cost: str, budget: float, metric: str, points: tuple[str, str], text: str) -> None:
        """Write a sentence on two points within a budget that fresh images compared, and replace an earlier one on them."""
        self._create_table(DecisionRecord)
        record = {"cost": cost, "budget": budget, "metric": metric, "text": text, "created": _now()}
        row = DecisionRecord(**record, first=points[0], second=points[1])
        run_transaction(self.engine, lambda session: session.merge(row))

    def decisions(self, metric: str) -> list[dict[str, Any]]:
        """Return the columns of `DecisionRecord` of the decisions by a metric, by cost and budget."""
        names = ("cost", "budget", "first", "second", "text")

        def read(session: Session) -> list[dict[str, Any]]:
            if not inspect(session.connection()).has_table(DecisionRecord.__tablename__):
                return []
            rows = select(DecisionRecord).where(DecisionRecord.metric == metric)
            ordered = session.scalars(rows.order_by(DecisionRecord.cost, DecisionRecord.budget))
            return [{name: getattr(row, name) for name in names} for row in ordered]

        return run_transaction(self.engine, read)

    def _create_table(self, record: type[Base]) -> None:
        """Create a table that older databases do not have."""
        table = Base.metadata.tables[record.__tablename__]
        run_transaction(self.engine, lambda session: table.create(session.connection(), checkfirst=True))

    def set_time(
        self,
        point: str,
        ms_per_image: float,
        timed_with: Mapping[str, Any],
        latency_ms: float | None = None,
        joules_per_image: float | None = None,
    ) -> None:
        """Replace the measured times of a recorded point, and add `timed_with` to its provenance.

        Args:
            point: digest of the point.
            ms_per_image: milliseconds per image at full batches.
            timed_with: device and conditions of the measurement.
            latency_ms: milliseconds of one image alone; None if they were not measured on this device.
            joules_per_image: energy of one image at full batches; None if the device does not report it.
        """

        def write(session: Session) -> None:
            row = session.get_one(PointRecord, point)
            row.ms_per_image, row.latency_ms, row.joules_per_image = ms_per_image, latency_ms, joules_per_image
            row.provenance = json.dumps({**json.loads(row.provenance), TIMED_WITH: dict(timed_with)})

        run_transaction(self.engine, write)

    def set_component_gflop(self, parts: Mapping[str, Mapping[str, float]]) -> None:
        """Fill the costs of the components of points that an earlier version recorded without them.

        Args:
            parts: point -> `gflop_text`, `gflop_encoder` and `gflop_decoder`. A read-only database stays as it is.
        """
        if not parts or self.engine.get_execution_options().get(READ_ONLY):
            return

        def write(session: Session) -> None:
            for point, columns in parts.items():
                session.execute(update(PointRecord).where(PointRecord.point == point).values(**columns))

        run_transaction(self.engine, write)

    def add_shard(self, shard: str, point: str, images: range) -> None:
        """Record a finished shard of a point."""
        columns = {"first": images.start, "stop": images.stop, "host": platform.node(), "created": _now()}

        def write(session: Session) -> None:
            session.merge(ShardRecord(shard=shard, point=point, **columns))

        run_transaction(self.engine, write)

    def num_shards(self) -> int:
        """Return the number of finished shards of points that are not complete yet."""
        return run_transaction(
            self.engine, lambda session: int(session.scalar(select(func.count()).select_from(ShardRecord)) or 0)
        )

    def add_race(self, row: Mapping[str, Any]) -> None:
        """Write the result of a race, the columns of `RaceRecord`, and replace an earlier record of its cell."""
        run_transaction(self.engine, lambda session: session.merge(RaceRecord(**row)))

    def set_dominated(self, cell: str, reason: str | None) -> None:
        """Record why a cell is not scored; None if it is scored."""
        statement = update(RaceRecord).where(RaceRecord.cell == cell).values(dominated_by=reason)
        run_transaction(self.engine, lambda session: session.execute(statement))

    def races(self) -> dict[str, dict[str, Any]]:
        """Return the results of all races: the columns of `RaceRecord` by cell."""

        def read(session: Session) -> dict[str, dict[str, Any]]:
            columns = [column.name for column in RaceRecord.__table__.columns]
            return {row.cell: {name: getattr(row, name) for name in columns} for row in session.scalars(select(RaceRecord))}

        return run_transaction(self.engine, read)

    def add_scores(self, point: str, scores: Mapping[str, Interval]) -> None:
        """Add scores to a recorded point."""

        def write(session: Session) -> None:
            for metric, interval in scores.items():
                session.merge(ScoreRecord.from_interval(point, metric, interval))

        run_transaction(self.engine, write)

    def metrics(self) -> dict[str, set[str]]:
        """Return the metrics of which every point has a score."""

        def read(session: Session) -> dict[str, set[str]]:
            metrics: dict[str, set[str]] = {point: set() for point in session.scalars(select(PointRecord.point))}
            for point, metric in session.execute(select(ScoreRecord.point, ScoreRecord.metric)):
                metrics[point].add(metric)
            return metrics

        return run_transaction(self.engine, read)

    def resamples(self, point: str) -> PointResamples | None:
        """Return the bootstrap resamples of a point; None if it is not here, or was scored before version 0.2."""

        def read(session: Session) -> PointResamples | None:
            row = session.get(PointRecord, point)
            columns = select(ScoreRecord.metric, ScoreRecord.value, ScoreRecord.resamples).where(
                ScoreRecord.point == point, ScoreRecord.resamples.is_not(None)
            )
            by_metric = {name: ScoreRecord.unpack(value, packed or b"") for name, value, packed in session.execute(columns)}
            return PointResamples(row.protocol, row.num_images, by_metric) if row is not None and by_metric else None

        return run_transaction(self.engine, read)

    def resamples_of_metric(self, metric: str, points: Iterable[str]) -> dict[str, Array]:
        """Return the bootstrap resamples by one metric, float64 [1 + R], of those of the points that have them."""
        wanted = set(points)
        columns = select(ScoreRecord.point, ScoreRecord.value, ScoreRecord.resamples).where(
            ScoreRecord.metric == metric, ScoreRecord.resamples.is_not(None)
        )

        def read(session: Session) -> dict[str, Array]:
            rows = session.execute(columns.order_by(ScoreRecord.point))
            return {point: ScoreRecord.unpack(value, packed or b"") for point, value, packed in rows if point in wanted}

        return run_transaction(self.engine, read)

    def import_from(self, other: ResultsDB) -> int:
        """Copy points with scores and protocols, races and events that are missing here.

        A point that both have takes the other's times, if only the other measured its latency.

        Returns:
            The number of copied points.
        """
        known_points, known_races, known_events = self.points(), self.races(), self.events()

        def read(session: Session) -> tuple[list[Any], list[Any], dict[str, PointRecord]]:
            has_vae, has_decisions = (
                inspect(session.connection()).has_table(record.__tablename__) for record in (VaeRecord, DecisionRecord)
            )
            all_points = session.scalars(select(PointRecord)).all()
            points = [row for row in all_points if row.point not in known_points]
            timed = {row.point: row for row in all_points if row.point in known_points and row.latency_ms is not None}
            digests, protocol_ids = {row.point for row in points}, {row.protocol for row in points}
            scores = [row for row in session.scalars(select(ScoreRecord)) if row.point in digests]
            protocols = [row for row in session.scalars(select(ProtocolRecord)) if row.protocol in protocol_ids]
            races = [row for row in session.scalars(select(RaceRecord)) if row.cell not in known_races]
            vae = [row for row in session.scalars(select(VaeRecord)) if row.point in digests] if has_vae else []
            decisions = list(session.scalars(select(DecisionRecord))) if has_decisions else []
            session.expunge_all()  # the rows outlive this session
            return [*protocols, *points], [*scores, *races, *vae, *decisions], timed

        first, second, timed = run_transaction(other.engine, read)
        for record in (VaeRecord, DecisionRecord):
            if any(isinstance(row, record) for row in second):
                self._create_table(record)
        events = [event for event in other.events() if event not in known_events]

        def write(session: Session) -> None:
            for row in first:
                session.merge(row)
            session.flush()
            for row in second:
                if isinstance(row, DecisionRecord):
                    key = (row.cost, row.budget, row.metric, row.first, row.second)
                    known = session.get(DecisionRecord, key)
                    if known is not None and known.created >= row.created:
                        continue
                session.merge(row)
            session.add_all(EventRecord(**event) for event in events)
            for row in session.scalars(select(PointRecord).where(PointRecord.latency_ms.is_(None))):
                if row.point in timed:
                    _take_times(row, timed[row.point])

        run_transaction(self.engine, write)
        return sum(isinstance(row, PointRecord) for row in first)

    def set_events(self, stage: str, events: Sequence[tuple[str, str]]) -> None:
        """Write (subject, message) pairs of a stage, and replace its earlier events."""

        def write(session: Session) -> None:
            session.execute(delete(EventRecord).where(EventRecord.stage == stage))
            session.add_all(
                EventRecord(created=_now(), stage=stage, subject=subject, message=message) for subject, message in events
            )

        run_transaction(self.engine, write)

    def events(self) -> list[dict[str, str]]:
        """Return all events, oldest first."""

        def read(session: Session) -> list[dict[str, str]]:
            rows = session.scalars(select(EventRecord).order_by(EventRecord.id))
            return [{"stage": r.stage, "subject": r.subject, "message": r.message, "created": r.created} for r in rows]

        return run_transaction(self.engine, read)

    def table(self) -> pd.DataFrame:
        """Return the results table: one row per point, three columns `m`, `m_low`, `m_high` per metric, ordered by coordinate.

        For a point that a race found, `guidance_low` and `guidance_high` are the interval of the best guidance, `race_images`
        is the number of images of the race, and `race_at_boundary` tells whether the race ended at the end of its grid.
        These columns are empty for points of a grid. `gflop` is the sum of its parts; it is NaN for a point of a version that
        counted the denoiser only. `vae_dtype`, `vae_tile_size` and `vae_slicing` are columns if a point has
        other settings of the autoencoder than the defaults.
        """

        def read(session: Session) -> list[pd.DataFrame]:
            tables = []
            has_vae = inspect(session.connection()).has_table(VaeRecord.__tablename__)
            for record in (PointRecord, ScoreRecord, ProtocolRecord, RaceRecord, *((VaeRecord,) if has_vae else ())):
                result = session.execute(select(*(column for column in record.__table__.columns if column.name != "resamples")))
                rows = [tuple(row) for row in result]
                tables.append(pd.DataFrame.from_records(rows, columns=list(result.keys()), coerce_float=True))
            return tables

        points, scores, protocols, races, *vae_settings = run_transaction(self.engine, read)
        numbers = [column.name for column in PointRecord.__table__.columns if isinstance(column.type, Float)]
        points = points.astype(dict.fromkeys(numbers, float))  # a column of NULLs has no dtype of its own
        protocols = protocols.set_index("protocol")
        table = with_total_gflop(points.rename(columns={"gflop": "gflop_denoiser"}).set_index("point"))
        table["protocol_parts"] = table["protocol"].map(protocols["parts"])
        if len(races):
            by_point = races.drop_duplicates("point", keep="last").set_index("point")
            by_point = by_point.assign(race_images=by_point["num_images"], race_at_boundary=by_point["is_at_boundary"])
            table = table.join(by_point[["guidance_low", "guidance_high", "race_images", "race_at_boundary"]])
        if vae_settings and len(vae_settings[0]):
            table = table.join(vae_settings[0].set_index("point"))
        for metric, group in scores.groupby("metric"):
            by_point = group.set_index("point")
            for suffix, column in (("", "value"), ("_low", "low"), ("_high", "high")):
                table[f"{metric}{suffix}"] = by_point[column]
        last = table.groupby("width")["images_seen"].transform("max") if len(table) else 0
        table["is_final"] = table["images_seen"] == last
        order = ["width", "images_seen", "solver", "num_steps", "guidance", "seed", "protocol"]
        return table.reset_index().sort_values(order, ignore_index=True)


def with_total_gflop(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the column `gflop`, the sum of `GFLOP_PARTS`; NaN where a part is unknown."""
    return table.assign(gflop=table[list(GFLOP_PARTS)].sum(axis=1, skipna=False))


def _take_times(row: PointRecord, timed: PointRecord | Row[float, float | None, float | None, str]) -> None:
    """Replace the times of a point by those of another record of it."""
    row.ms_per_image, row.latency_ms = timed.ms_per_image, timed.latency_ms
    row.joules_per_image = timed.joules_per_image
    row.provenance = json.dumps({**json.loads(row.provenance), TIMED_WITH: json.loads(timed.provenance)[TIMED_WITH]})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
