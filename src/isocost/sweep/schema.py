"""Tables of the results database."""

from __future__ import annotations

import numpy as np
from sqlalchemy import Boolean, Float, ForeignKey, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from isocost.evaluation.confidence_intervals import Interval
from isocost.metrics.arrays import Array


class Base(DeclarativeBase):
    """Base class of all tables."""


HARDWARE_COLUMNS = ["ms_per_image", "latency_ms", "joules_per_image", "seconds", "peak_memory_mib", "created", "provenance"]
"""Columns of the results table that depend on the machine or on the time; all other columns are reproducible."""

GFLOP_PARTS = ("gflop_text", "gflop_encoder", "gflop_denoiser", "gflop_decoder")
"""Columns of the results table whose sum is `gflop`, the cost of the whole image."""


class SchemaRecord(Base):
    """Version of the tables, one row."""

    __tablename__ = "schema"
    version: Mapped[int] = mapped_column(Integer, primary_key=True)


class PointRecord(Base):
    """One scored point: its coordinate, costs and provenance (JSON).

    A column that is added to a released table is nullable: databases from before have no value for it (`isocost.sweep.db`).
    The column `gflop` of a database is the denoiser's part.
    """

    __tablename__ = "points"
    point: Mapped[str] = mapped_column(String(32), primary_key=True)
    checkpoint: Mapped[str] = mapped_column(String(32), index=True)
    protocol: Mapped[str] = mapped_column(String(32), index=True)
    task: Mapped[str] = mapped_column(String(32))
    size: Mapped[str] = mapped_column(String(64))
    width: Mapped[int] = mapped_column(Integer)
    num_parameters: Mapped[int] = mapped_column(Integer)
    images_seen: Mapped[int] = mapped_column(Integer)
    training_gflop: Mapped[float] = mapped_column(Float)
    solver: Mapped[str] = mapped_column(String(64))
    num_steps: Mapped[int] = mapped_column(Integer)
    guidance: Mapped[float] = mapped_column(Float)
    num_images: Mapped[int] = mapped_column(Integer)
    num_nonfinite: Mapped[int] = mapped_column(Integer)
    seed: Mapped[int] = mapped_column(Integer)
    dtype: Mapped[str] = mapped_column(String(8))
    compiled: Mapped[bool] = mapped_column(Boolean)
    batch_size: Mapped[int] = mapped_column(Integer)
    min_batch_size: Mapped[int] = mapped_column(Integer)
    normalized_cost: Mapped[float] = mapped_column(Float)
    nfe: Mapped[float] = mapped_column(Float)
    gflop_denoiser: Mapped[float] = mapped_column("gflop", Float)
    gflop_text: Mapped[float | None] = mapped_column(Float)
    gflop_encoder: Mapped[float | None] = mapped_column(Float)
    gflop_decoder: Mapped[float | None] = mapped_column(Float)
    ms_per_image: Mapped[float] = mapped_column(Float)
    latency_ms: Mapped[float | None] = mapped_column(Float)
    joules_per_image: Mapped[float | None] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float)
    peak_memory_mib: Mapped[float | None] = mapped_column(Float)
    has_too_few_samples: Mapped[bool] = mapped_column(Boolean)
    guide: Mapped[str | None] = mapped_column(String(96))
    guide_checkpoint: Mapped[str | None] = mapped_column(String(32))
    guide_null_prompt: Mapped[bool | None] = mapped_column(Boolean)
    guide_nfe: Mapped[float | None] = mapped_column(Float)
    guidance_interval: Mapped[str | None] = mapped_column(Text)
    guidance_schedule: Mapped[str | None] = mapped_column(Text)
    created: Mapped[str] = mapped_column(String(40))
    provenance: Mapped[str] = mapped_column(Text)


class VaeRecord(Base):
    """Settings of the autoencoder of a point, if they are not the defaults."""

    __tablename__ = "vae_settings"
    point: Mapped[str] = mapped_column(ForeignKey("points.point"), primary_key=True)
    vae_dtype: Mapped[str] = mapped_column(String(8))
    vae_tile_size: Mapped[int | None] = mapped_column(Integer)
    vae_slicing: Mapped[bool] = mapped_column(Boolean)


class ScoreRecord(Base):
    """One score of a point with its 95 % interval.

    `resamples` has the scores of the bootstrap resamples minus `value`, float32 [R] in little-endian order, or NULL.
    """

    __tablename__ = "scores"
    point: Mapped[str] = mapped_column(ForeignKey("points.point"), primary_key=True)
    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[float] = mapped_column(Float)
    low: Mapped[float] = mapped_column(Float)
    high: Mapped[float] = mapped_column(Float)
    resamples: Mapped[bytes | None] = mapped_column(LargeBinary)

    @classmethod
    def from_interval(cls, point: str, metric: str, interval: Interval, resamples: Array | None = None) -> ScoreRecord:
        """Make the record of a score. `resamples` are the scores of the bootstrap resamples, [1 + R]."""
        packed = None if resamples is None else (resamples[1:] - resamples[0]).astype("<f4").tobytes()
        return cls(point=point, metric=metric, value=interval.value, low=interval.low, high=interval.high, resamples=packed)

    @staticmethod
    def unpack(value: float, resamples: bytes) -> Array:
        """Return the scores of the bootstrap resamples, float64 [1 + R], from the columns `value` and `resamples`."""
        return value + np.concatenate([[0.0], np.frombuffer(resamples, "<f4").astype(np.float64)])


class ProtocolRecord(Base):
    """The parts of a protocol as JSON, by its id, so that a message can name the difference between two protocols."""

    __tablename__ = "protocols"
    protocol: Mapped[str] = mapped_column(String(32), primary_key=True)
    parts: Mapped[str] = mapped_column(Text)


class RaceRecord(Base):
    """Result of the race of one cell, and the point to score.

    `images_by_guidance` and `warnings` are JSON. `dominated_by` is the reason why the point is not scored, or NULL.
    `option_index` is the winner among `SearchCell.options` and `options` has, as JSON, what was sampled of each, if guides or
    intervals raced against each other; else both are NULL.
    """

    __tablename__ = "races"
    cell: Mapped[str] = mapped_column(String(32), primary_key=True)
    point: Mapped[str] = mapped_column(String(32), index=True)
    checkpoint: Mapped[str] = mapped_column(String(32), index=True)
    protocol: Mapped[str] = mapped_column(String(32))
    metric: Mapped[str] = mapped_column(String(64))
    solver: Mapped[str] = mapped_column(String(64))
    num_steps: Mapped[int] = mapped_column(Integer)
    guidance: Mapped[float] = mapped_column(Float)
    guidance_low: Mapped[float] = mapped_column(Float)
    guidance_high: Mapped[float] = mapped_column(Float)
    num_images: Mapped[int] = mapped_column(Integer)
    images_by_guidance: Mapped[str] = mapped_column(Text)
    regret: Mapped[float] = mapped_column(Float)
    is_decided: Mapped[bool] = mapped_column(Boolean)
    is_at_boundary: Mapped[bool] = mapped_column(Boolean)
    warnings: Mapped[str] = mapped_column(Text)
    dominated_by: Mapped[str | None] = mapped_column(Text)
    option_index: Mapped[int | None] = mapped_column(Integer)
    options: Mapped[str | None] = mapped_column(Text)


class DecisionRecord(Base):
    """A sentence on two points within a budget that fresh images compared; `first` had the better score."""

    __tablename__ = "decisions"
    cost: Mapped[str] = mapped_column(String(32), primary_key=True)
    budget: Mapped[float] = mapped_column(Float, primary_key=True)
    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    first: Mapped[str] = mapped_column(String(32), primary_key=True)
    second: Mapped[str] = mapped_column(String(32), primary_key=True)
    text: Mapped[str] = mapped_column(Text)
    created: Mapped[str] = mapped_column(String(40))


class EventRecord(Base):
    """A message about the study: a failure or a skipped image."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    created: Mapped[str] = mapped_column(String(40))
    stage: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)


class ShardRecord(Base):
    """A finished shard: images `first` to `stop` - 1 of a point that is not complete yet."""

    __tablename__ = "shards"
    shard: Mapped[str] = mapped_column(String(32), primary_key=True)
    point: Mapped[str] = mapped_column(String(32), index=True)
    first: Mapped[int] = mapped_column(Integer)
    stop: Mapped[int] = mapped_column(Integer)
    host: Mapped[str] = mapped_column(String(255))
    created: Mapped[str] = mapped_column(String(40))


class LeaseRecord(Base):
    """A work item that a worker holds; `heartbeat` is a Unix time of the database's clock."""

    __tablename__ = "leases"
    work_item: Mapped[str] = mapped_column(String(128), primary_key=True)
    worker: Mapped[str] = mapped_column(String(64), index=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int] = mapped_column(Integer)
    heartbeat: Mapped[float] = mapped_column(Float)
