"""The tables of the ledger."""

from __future__ import annotations

from sqlalchemy import Boolean, Float, ForeignKey, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from isocost.evaluation.confidence_intervals import Interval


class Base(DeclarativeBase):
    """All tables."""


OF_THE_MACHINE = ["ms_per_picture", "seconds", "peak_memory_mib", "created", "provenance"]
"""Columns of a table that differ from one machine or moment to another; all others do not."""


class SchemaRow(Base):
    """The version of the tables."""

    __tablename__ = "schema"
    version: Mapped[int] = mapped_column(Integer, primary_key=True)


class PointRow(Base):
    """One scored point: coordinate, costs, provenance."""

    __tablename__ = "points"
    point: Mapped[str] = mapped_column(String(32), primary_key=True)
    checkpoint: Mapped[str] = mapped_column(String(32), index=True)
    protocol: Mapped[str] = mapped_column(String(32), index=True)
    task: Mapped[str | None] = mapped_column(String(32))
    size: Mapped[str] = mapped_column(String(64))
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
    peak_memory_mib: Mapped[float | None] = mapped_column(Float)
    flagged: Mapped[bool] = mapped_column(Boolean)
    created: Mapped[str] = mapped_column(String(40))
    provenance: Mapped[str] = mapped_column(Text)


class ScoreRow(Base):
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


class ProtocolRow(Base):
    """What a protocol's id stands for: its parts as JSON, so that two of them can be told apart in words."""

    __tablename__ = "protocols"
    protocol: Mapped[str] = mapped_column(String(32), primary_key=True)
    parts: Mapped[str] = mapped_column(Text)


class RaceRow(Base):
    """What the race of a cell found, and which point is scored for it; none where `stopped` says why."""

    __tablename__ = "races"
    cell: Mapped[str] = mapped_column(String(32), primary_key=True)
    point: Mapped[str] = mapped_column(String(32), index=True)
    checkpoint: Mapped[str] = mapped_column(String(32), index=True)
    protocol: Mapped[str] = mapped_column(String(32))
    metric: Mapped[str] = mapped_column(String(64))
    sampler: Mapped[str] = mapped_column(String(64))
    num_steps: Mapped[int] = mapped_column(Integer)
    guidance: Mapped[float] = mapped_column(Float)
    guidance_low: Mapped[float] = mapped_column(Float)
    guidance_high: Mapped[float] = mapped_column(Float)
    num_pictures: Mapped[int] = mapped_column(Integer)
    pictures_at: Mapped[str] = mapped_column(Text)
    regret: Mapped[float] = mapped_column(Float)
    is_decided: Mapped[bool] = mapped_column(Boolean)
    is_at_edge: Mapped[bool] = mapped_column(Boolean)
    warnings: Mapped[str] = mapped_column(Text)
    stopped: Mapped[str | None] = mapped_column(Text)


class EventRow(Base):
    """Something a reader of the study must know: a failure, pictures that were skipped."""

    __tablename__ = "events"
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    created: Mapped[str] = mapped_column(String(40))
    stage: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)


class ShardRow(Base):
    """Some pictures of a point that were made at once, while the point is not whole; gone when it is."""

    __tablename__ = "shards"
    shard: Mapped[str] = mapped_column(String(32), primary_key=True)
    point: Mapped[str] = mapped_column(String(32), index=True)
    first: Mapped[int] = mapped_column(Integer)
    stop: Mapped[int] = mapped_column(Integer)
    host: Mapped[str] = mapped_column(String(255))
    created: Mapped[str] = mapped_column(String(40))


class ClaimRow(Base):
    """One piece of work in somebody's hands."""

    __tablename__ = "claims"
    work: Mapped[str] = mapped_column(String(128), primary_key=True)
    worker: Mapped[str] = mapped_column(String(64), index=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    beat: Mapped[float] = mapped_column(Float)
