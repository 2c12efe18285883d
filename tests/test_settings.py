"""Settings of a study: YAML without surprises, and one line for every value that a setting cannot have."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import plain_study
from isocost.cli.options import read_study
from isocost.config.base import Spec, parse_spec, scalar_types, specs_in
from isocost.config.finetune import DistillSpec, DreamboothSpec, SuperresSpec
from isocost.config.model import ModelSpec
from isocost.config.pretrained import NoiseSpec, PretrainedSpec
from isocost.config.study import StudySpec
from isocost.config.study_yaml import dump_study, parse_override
from isocost.config.sweep import PointSpec
from isocost.config.yaml_text import format_yaml, parse_yaml
from isocost.errors import ConfigError
from isocost.models.unet import build_unet
from isocost.pipeline.pipeline import Pipeline


def study_with(tmp_path: Path, section: str, text: str) -> Path:
    """A study file whose last line is `section: text`, in the words of a user."""
    plain = {name: value for name, value in plain_study().items() if name != section}
    file = tmp_path / "study.yaml"
    file.write_text(f"{yaml.safe_dump(plain)}{section}: {text}\n", encoding="utf-8")
    return file


def refusal(file: Path, overrides: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_study(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- YAML ---


@pytest.mark.parametrize(
    ("section", "text", "message"),
    [
        ("sweep", "{num_steps: [1], guidance: [yes, 2]}", "sweep.guidance.0 = 'yes': this is text; give a number"),
        ("sweep", "{num_steps: [1], guidance: [true]}", "sweep.guidance.0 = True: this is a truth value; give a number"),
        ("sweep", "{num_steps: [1], guidance: [1], seed: no}", "sweep.seed = 'no'"),
        ("sweep", "{num_steps: [1], guidance: [1], seed: off}", "sweep.seed = 'off'"),
        ("sweep", "{num_steps: [0100], guidance: [1]}", "sweep.num_steps.0 = '0100'"),
        ("sweep", "{num_steps: [1:30], guidance: [1]}", "sweep.num_steps.0 = '1:30'"),
        ("sweep", "{num_steps: [1_0], guidance: [1]}", "sweep.num_steps.0 = '1_0'"),
        ("sweep", "{num_steps: ['4'], guidance: [1]}", "sweep.num_steps.0 = '4'"),
        ("train", "{num_images: 100, microbatch: 08}", "train.microbatch = '08'"),
        ("train", "{num_images: 100, adam_betas: [0.9, 1:0]}", "train.adam_betas.1 = '1:0'"),
        ("name", "2024", "name = 2024: this is not text; give text, in quotes if it looks like a number"),
    ],
)
def test_a_scalar_of_another_type_is_refused_with_its_key(section: str, text: str, message: str, tmp_path: Path) -> None:
    file = study_with(tmp_path, section, text)
    assert refusal(file).startswith(f"{file}: {message}")


def test_a_key_that_occurs_twice_is_refused_with_its_lines(tmp_path: Path) -> None:
    file = study_with(tmp_path, "train", "{num_images: 4096}\n# pasted\ntrain: {num_images: 64}")
    lines = file.read_text().splitlines()
    first = next(number for number, line in enumerate(lines, 1) if line.startswith("train:"))
    assert refusal(file) == f"{file}: line {len(lines)}: the key 'train' is already in line {first}; remove one of the two"
    assert "the key 'lr'" in refusal(study_with(tmp_path, "train", "{num_images: 64, lr: 1.0e-3, lr: 2.0e-3}"))
    assert "the key 'a'" in refusal(study_with(tmp_path, "scales", "{tiny: {a: 1, 'a': 2}}"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("yes", "yes"), ("No", "No"), ("on", "on"), ("0100", "0100"), ("1:30", "1:30"), ("1_000", "1_000"), ("=", "=")),
        *(("2024-01-01", "2024-01-01"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None)),
        *(
            ("1e-3", 1e-3),
            ("1E3", 1000.0),
            (".5", 0.5),
            ("-1.", -1.0),
            ("0x1F", 31),
            ("0o17", 15),
            ("+3", 3),
            ("-.inf", -math.inf),
        ),
    ],
)
def test_scalars_are_those_of_the_core_schema(text: str, value: Any) -> None:
    assert parse_yaml(f"[{text}]" if text else "[~]", "text") == [value]
    assert type(parse_yaml(text, "text")) is type(value)


def test_text_that_looks_like_another_type_survives_a_round_trip() -> None:
    texts = [
        "yes",
        "no",
        "0100",
        "1:30",
        "1e5",
        "0o17",
        "2024-01-01",
        "=",
        "<<",
        "",
        "~",
        "null",
        "1_0",
        "true",
        "a #b",
        "é: x",
    ]
    values = [1e-5, 1e30, 0.1, -3, None, True, 1e16, *texts]
    assert parse_yaml(format_yaml(values), "again") == values
    plain = plain_study(report={"metric": "1e5"})
    study = parse_spec(StudySpec, plain, "study")
    assert parse_spec(StudySpec, parse_yaml(dump_study(study), "again"), "again") == study


def test_mappings_are_merged_and_a_merged_key_may_be_replaced() -> None:
    text = "base: &base {x: 1, y: 2}\nouter: {deep: &deep {<<: *base, x: 3}}\nlast: {<<: *deep, y: 4}"
    assert parse_yaml(text, "text")["outer"] == {"deep": {"x": 3, "y": 2}}
    assert parse_yaml(text, "text")["last"] == {"x": 3, "y": 4}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a: [",
            "[" * 5000,
            "a: b: c",
            "!!int x",
            "!!bool x",
            "!!float x",
            "!!timestamp x",
            "!!python/object:os.x {}",
            "? [a]\n: 1",
        ),
        *("a: *b", "a: 1\n---\nb: 2", "\t", "\0", "9" * 5000, "!!binary 'x'", "%YAML 3.0\n---\na", "<<: 3", "{a: 1, a: 1}"),
    ],
)
def test_text_that_is_not_yaml_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"\Afile: .+\Z"):
        parse_yaml(text, "file")


def test_a_file_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes("name: café".encode("latin-1"))
    assert "save it as UTF-8" in refusal(file)


# --- --set ---


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.train.path", "my #1 pics", "my #1 pics"),
        ("data.reference.path", "yes", "yes"),
        ("data.reference.path", "a: b, [c] & *d", "a: b, [c] & *d"),
        ("data.train.path", '"my pics"', "my pics"),
        ("autoencoder.path", "2024", "2024"),
        ("text_encoder.path", "~/encoder #2", "~/encoder #2"),
        ("train.cache_dir", "s3://bucket/#1", "s3://bucket/#1"),
        ("train.cache_dir", "null", None),
        ("superres.train.cache_dir", "1:30", "1:30"),
        ("protocol.weights.inception", "C:\\w #1", "C:\\w #1"),
        ("dreambooth.subjects.path", "#", "#"),
        ("name", "0100", "0100"),
        ("train.lr", "1e-4", 1e-4),
        ("family.widths", "[64]", [64]),
        ("checkpoints", "[a, b]", ["a", "b"]),
        ("protocol.features", "inception", "inception"),
        ("sweep.dtype", "bf16", "bf16"),
        ("no.such.key", "1", 1),
    ],
)
def test_the_value_of_an_option_is_text_where_the_setting_is_text(key: str, text: str, value: Any) -> None:
    assert parse_override(key, text) == value


def test_a_path_of_an_option_reaches_the_study_as_it_was_typed(tmp_path: Path) -> None:
    file = study_with(tmp_path, "report", "{metric: mmd_efficientnet}")
    overrides = ["data.reference={kind: folder, path: x}", "data.reference.path=my #1 pics", "train.lr=1e-4"]
    study = read_study(file, overrides)
    assert (study.data.reference.path, study.train.lr) == ("my #1 pics", 1e-4)
    assert "train.batch_size = 'yes'" in refusal(file, ["train.batch_size=yes"])
    assert "train.batch_size = '0100'" in refusal(file, ["train.batch_size=0100"])
    assert "this is not YAML" in refusal(file, ["family.widths=[8"])
    assert "scale = [1] is unknown" in refusal(file, ["scale=[1]"])


# --- bounds ---


def setting_paths(spec: type[Spec], parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[type[Spec], str], tuple[str, ...]]]:
    for name, field in spec.model_fields.items():
        yield (spec, name), (*parents, name)
        for part in specs_in(field.annotation):
            yield from setting_paths(part, (*parents, name))


PATHS = sorted(dict(reversed(list(setting_paths(StudySpec)))).values())
"""One path to every field of every spec of a study, the first in the order of the file."""
BAD_VALUES = [
    *(0, -1, 10**9, 1e9, 1e30, 1e-300, math.nan, math.inf, -math.inf, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(True, "x", "1", "yes", "\0", "\ud800", None, [], {}, [4], [-1], [1e30], [True], ["1"], [[]], [None], {"a": 1}),
]
SECTIONS = {
    "superres": {"train": {"num_images": 64}, "sweep": {"num_steps": [1]}, "distill": {"train": {"num_images": 64}}},
    "distill": {"train": {"num_images": 64}, "sweep": {"guidance": [1]}},
    "dreambooth": {"subjects": {"kind": "scenes"}, "train": {"num_images": 64}},
    "seed_replicates": {"seeds": [7]},
}


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A study of all parts in which one setting has another value."""
    plain = copy.deepcopy(plain_study(**SECTIONS))
    section = plain
    for parent in path[:-1]:
        section = section.setdefault(parent, {})
    section[path[-1]] = value
    return plain


def study_or_message(plain: dict[str, Any]) -> tuple[StudySpec | None, str]:
    try:
        return parse_spec(StudySpec, plain, "study.yaml"), ""
    except ConfigError as error:
        return None, str(error)


def test_the_study_of_all_parts_is_valid() -> None:
    parse_spec(StudySpec, with_value(("name",), "all-parts"), "study")


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(section, marks=pytest.mark.slow if section in ("superres", "dreambooth", "distill") else ())
        for section in sorted({path[0] for path in PATHS})
    ],
)
@pytest.mark.fast_cases(2)
def test_every_value_of_every_setting_is_taken_or_refused_in_one_line(section: str) -> None:
    started = time.monotonic()
    for path in (path for path in PATHS if path[0] == section):
        for value in BAD_VALUES:
            study, message = study_or_message(with_value(path, value))
            if study is not None:
                assert parse_spec(StudySpec, study.model_dump(mode="json"), "again") == study
                continue
            assert message.startswith("study.yaml: ")
            assert "\n" not in message
            assert len(message.encode()) < 500
    assert time.monotonic() - started < 60


def numeric_fields(spec: type[Spec], seen: set[type[Spec]]) -> Iterator[tuple[type[Spec], str]]:
    if spec in seen:
        return
    seen.add(spec)
    for name, field in spec.model_fields.items():
        if scalar_types(field.annotation) & {int, float}:
            yield spec, name
        for part in specs_in(field.annotation):
            yield from numeric_fields(part, seen)


ALL_SPECS = (StudySpec, SuperresSpec, DistillSpec, DreamboothSpec, PointSpec, ModelSpec, NoiseSpec, PretrainedSpec)
NUMERIC_FIELDS = sorted(
    {field for spec in ALL_SPECS for field in numeric_fields(spec, set())}, key=lambda field: (field[0].__name__, field[1])
)
UNBOUNDED = {"budgets", "max_grad_norm"}
"""Fields that any positive number suits."""


def parts_of(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and the schemas in it, without those of other specs."""
    yield schema
    for part in (*schema.get("anyOf", []), *schema.get("prefixItems", []), schema.get("items", {})):
        if isinstance(part, dict) and part:
            yield from parts_of(part)


@pytest.mark.parametrize(("spec", "name"), NUMERIC_FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_number_has_bounds(spec: type[Spec], name: str) -> None:
    schema = spec.model_json_schema()["properties"][name]
    numbers = [number for number in parts_of(schema) if number.get("type") in ("integer", "number")]
    assert numbers
    for number in numbers:
        assert {"minimum", "exclusiveMinimum"} & set(number), number
        assert name in UNBOUNDED or {"maximum", "exclusiveMaximum"} & set(number), number


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("train.seed", 2**64), ("train.seed", -1), ("protocol.seed", -1), ("sweep.seed", 2**63), ("data.train.seed", -5)),
        *(("train.adam_betas", [1.0, 0.999]), ("train.adam_betas", [0.9, -0.1]), ("train.adam_betas", [0.9, 1e9])),
        *(
            ("train.batch_size", 10**9),
            ("sweep.batch_size", 10**9),
            ("train.microbatch", 10**9),
            ("sweep.guidance", [math.inf]),
        ),
        *(("family.layers_per_block", 10**6), ("family.widths", [10**9]), ("data.resolution", 10**9), ("report.budgets", [-1])),
        *(("superres.degradation.first.resize_range", [0, 1e9]), ("superres.degradation.first.jpeg_quality", [0, 1000])),
    ],
)
def test_a_number_out_of_range_is_refused_with_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"\Astudy\.yaml: {key}"):
        parse_spec(StudySpec, with_value(tuple(key.split(".")), value), "study.yaml")


@pytest.mark.parametrize(("num_levels", "times", "multiple"), [(2, "once", 2), (3, "twice", 4), (4, "three times", 8)])
def test_a_latent_must_be_halved_as_often_as_the_network_has_levels(num_levels: int, times: str, multiple: int) -> None:
    spec = ModelSpec(width=8, latent_size=multiple, cross_attention_dim=8, num_levels=num_levels)
    network = build_unet(spec)
    latents = torch.zeros(1, 4, multiple, multiple)
    assert network(latents, torch.tensor(1), torch.zeros(1, 2, 8)).sample.shape == latents.shape
    with pytest.raises(ConfigError, match=rf"{num_levels} levels halves it {times}; .* multiple of {multiple}"):
        build_unet(spec.model_copy(update={"latent_size": multiple + 1}))


def test_a_latent_that_fewer_levels_can_halve_names_them() -> None:
    with pytest.raises(ConfigError, match=r"multiple of 8, or family\.num_levels 3"):
        build_unet(ModelSpec(width=8, latent_size=12))


# --- timesteps of a solver --------------------------------------------------------------------------------------------


def sweep_with(solvers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return plain_study(sweep={"num_steps": [2, 4], "guidance": [1.0], "solvers": solvers, "snapshot_num_steps": 4, **changes})


def test_a_solver_with_timesteps_has_the_points_of_their_number_only(tmp_path: Path) -> None:
    study = parse_spec(StudySpec, sweep_with([{"name": "ddim"}, {"name": "ddim", "timesteps": [999, 400]}]), "study")
    pipeline = Pipeline(study, tmp_path / "out")
    points = pipeline.points(pipeline.runs[0])
    final = [point.spec for point in points if point.spec.checkpoint == pipeline.runs[0].final]
    assert [(spec.solver.label, spec.num_steps) for spec in final if spec.guidance == 1] == [
        ("ddim/trailing", 2),
        ("ddim/trailing", 4),
        ("ddim/999-400", 2),
    ]
    assert len({point.digest for point in points}) == len(points)


@pytest.mark.parametrize(
    ("solvers", "message"),
    [
        ([{"name": "ddim", "timesteps": [999, 500, 100]}], "ddim/999-500-100 has 3 timesteps; add this number to num_steps"),
        ([{"name": "ddim", "timesteps": [999, 400]}], "sweep.snapshot_num_steps = 4: the first solver, ddim/999-400, samples"),
        ([{"name": "ddim", "timesteps": [400, 999]}], "they must fall, from noise to clean"),
    ],
)
def test_timesteps_that_do_not_fit_the_sweep_are_one_line(solvers: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline(parse_spec(StudySpec, sweep_with(solvers), "study"), tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
