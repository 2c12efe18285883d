"""Costs of an image of published models, by part: prompt, denoiser and decoder at 1, 4, 20 and 50 steps.

    python benchmarks/published_costs.py [--quick] [--json] [--write]

The configs are those of the repositories (`tests/published_configs.py`). GFLOP are counted on the meta device with the modules
of diffusers and transformers; nothing is measured, and no weights are needed. 1 and 4 steps take one pass each, as few-step
students do; 20 and 50 steps take two passes each with classifier-free guidance, and one where guidance is an input of the
network. `--write` writes the table into docs/checkpoints.md. The last line is JSON.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from results import Row, argument_parser, print_results

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from isocost.models.component_costs import pipeline_components  # noqa: E402
from published_configs import PIPELINES, published_info  # noqa: E402

TABLE_FILE = ROOT / "docs" / "checkpoints.md"
TABLE_START, TABLE_END = "<!-- costs of published models -->", "<!-- end of costs of published models -->"
STEPS = (1, 4, 20, 50)
FEW_STEPS = 4
"""Up to here a step takes one pass."""
QUICK = "stable-diffusion-v1-5/stable-diffusion-v1-5"
PARTS = ("text", "denoiser", "decoder")


def costs_of(name: str) -> Row:
    """GFLOP of the parts of an image, and of a pass of the denoiser."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pipeline"
        PIPELINES[name].write_configs(folder)
        info = published_info(name, folder)
        components = pipeline_components(info)
    costs: Row = {
        "what": name,
        "resolution": info.resolution,
        "text": components.gflop_text,
        "pass": info.gflop_per_forward,
        "decoder": components.gflop_decoder,
    }
    for steps in STEPS:
        passes = steps * (1 if steps <= FEW_STEPS else PIPELINES[name].passes_per_step)
        parts = (components.gflop_text, passes * info.gflop_per_forward, components.gflop_decoder)
        shares = {part: gflop / sum(parts) for part, gflop in zip(PARTS, parts, strict=True)}
        costs[f"{steps} steps"] = {"gflop": sum(parts), **shares}
    return costs


def table(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    titles = ["model", "pixels", "prompt", "one pass", "decoder", *(f"{n} step{'s' if n > 1 else ''}" for n in STEPS)]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "--:|" * (len(titles) - 1)]
    for row in rows:
        cells = [row["what"], row["resolution"], *(f"{row[part] / 1e3:,.2f}" for part in ("text", "pass", "decoder"))]
        for steps in STEPS:
            cost = row[f"{steps} steps"]
            shares = " / ".join(f"{100 * cost[part]:.0f}" for part in PARTS)
            cells.append(f"{cost['gflop'] / 1e3:,.1f} ({shares} %)")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__, "only Stable Diffusion 1.5")
    parser.add_argument("--write", action="store_true", help="write the table into docs/checkpoints.md")
    options = parser.parse_args()
    rows = [costs_of(name) for name in ([QUICK] if options.quick else PIPELINES)]
    if options.write:
        text = TABLE_FILE.read_text(encoding="utf-8")
        before, _, rest = text.partition(TABLE_START)
        _, _, after = rest.partition(TABLE_END)
        TABLE_FILE.write_text(f"{before}{TABLE_START}\n{table(rows)}\n{TABLE_END}{after}", encoding="utf-8")
    if not options.json:
        print(table(rows))
    print_results("published_costs", rows, [])


if __name__ == "__main__":
    main()
