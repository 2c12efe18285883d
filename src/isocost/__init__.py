"""isocost: which diffusion model, solver, steps and guidance give the best images for an inference budget.

The commands as functions, for scripts and notebooks:

    study = isocost.load_study("studies/fashion.yaml")
    result = isocost.run(study, "runs/fashion")         # images to report; what exists is skipped
    result.table                                         # one row a point, a pandas DataFrame
    isocost.recommend(result.table, "nfe", 16)           # the best configuration within a budget
    isocost.sample(checkpoint, ["a red bag"]).sheet()    # a PIL image
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isocost.analysis.pareto import best_guidance, pareto
    from isocost.analysis.recommend import recommend
    from isocost.analysis.results_table import read_table
    from isocost.config.study import StudySpec
    from isocost.config.study_yaml import load_study
    from isocost.errors import ConfigError, RunError
    from isocost.evaluation.score_folder import score_folder
    from isocost.models.checkpoint import load_checkpoint
    from isocost.models.export_diffusers import export
    from isocost.models.flops import family_table
    from isocost.pipeline.pipeline import Pipeline
    from isocost.report.build import run
    from isocost.report.markdown import markdown_summary
    from isocost.sampling.sample import sample

_HOMES = {
    "Pipeline": "isocost.pipeline.pipeline",
    "ConfigError": "isocost.errors",
    "StudySpec": "isocost.config.study",
    "RunError": "isocost.errors",
    "best_guidance": "isocost.analysis.pareto",
    "export": "isocost.models.export_diffusers",
    "family_table": "isocost.models.flops",
    "load_checkpoint": "isocost.models.checkpoint",
    "load_study": "isocost.config.study_yaml",
    "markdown_summary": "isocost.report.markdown",
    "pareto": "isocost.analysis.pareto",
    "read_table": "isocost.analysis.results_table",
    "recommend": "isocost.analysis.recommend",
    "run": "isocost.report.build",
    "sample": "isocost.sampling.sample",
    "score_folder": "isocost.evaluation.score_folder",
}

__all__ = [
    "ConfigError",
    "Pipeline",
    "RunError",
    "StudySpec",
    "best_guidance",
    "export",
    "family_table",
    "load_checkpoint",
    "load_study",
    "markdown_summary",
    "pareto",
    "read_table",
    "recommend",
    "run",
    "sample",
    "score_folder",
]


def __getattr__(name: str) -> Any:
    """Import a name from its home on first use, so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'isocost' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
