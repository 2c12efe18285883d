"""isocost: which diffusion model, sampler, steps and guidance give the best pictures for an inference budget.

The commands as functions, for scripts and notebooks:

    study = isocost.load_study("studies/fashion.yaml")
    result = isocost.run(study, "runs/fashion")         # pictures to report; what exists is skipped
    result.table                                         # one row a point, a pandas DataFrame
    isocost.recommend(result.table, "nfe", 16)           # the best configuration within a budget
    isocost.sample(checkpoint, ["a red bag"]).sheet()    # a PIL picture
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isocost.analysis.frontier import best_guidance, pareto
    from isocost.analysis.recommend import recommend
    from isocost.errors import RequestError, WorkError
    from isocost.exporting import export
    from isocost.models.checkpoint import load_checkpoint
    from isocost.models.cost import family_table
    from isocost.pipeline import Pipeline
    from isocost.report.gather import run
    from isocost.report.summary import markdown_summary
    from isocost.sampling import sample
    from isocost.score.folders import score_folder
    from isocost.study import StudySpec
    from isocost.study_file import load_study
    from isocost.sweep.ledger import read_table

_HOMES = {
    "Pipeline": "isocost.pipeline",
    "RequestError": "isocost.errors",
    "StudySpec": "isocost.study",
    "WorkError": "isocost.errors",
    "best_guidance": "isocost.analysis.frontier",
    "export": "isocost.exporting",
    "family_table": "isocost.models.cost",
    "load_checkpoint": "isocost.models.checkpoint",
    "load_study": "isocost.study_file",
    "markdown_summary": "isocost.report.summary",
    "pareto": "isocost.analysis.frontier",
    "read_table": "isocost.sweep.ledger",
    "recommend": "isocost.analysis.recommend",
    "run": "isocost.report.gather",
    "sample": "isocost.sampling",
    "score_folder": "isocost.score.folders",
}

__all__ = [
    "Pipeline",
    "RequestError",
    "StudySpec",
    "WorkError",
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
