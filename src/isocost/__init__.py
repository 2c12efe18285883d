"""isocost: which diffusion model, guidance, solver and number of steps give the best images for an inference budget.

In a notebook:

    study = isocost.Study.from_yaml("studies/fashion.yaml")
    run = isocost.run(study, "runs/fashion")             # trains, sweeps, scores, reports; skips finished work
    run.results                                           # one row per point, a pandas DataFrame
    run.recommend(nfe=16)                                 # the best configuration within a budget
    run.plot("quality_vs_cost", cost="gflop")

    model = isocost.load_checkpoint("runs/fashion/artefacts/checkpoint/DIGEST")
    model.sample(["a red bag"], solver="dpmsolver++2m", num_steps=16, guidance=3.0, seed=0).images

    isocost.score(images, reference, metrics=["mmd"])     # arrays, tensors or folders, with intervals
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import version as _version

    from isocost.analysis.frontier_ci import frontier_bands
    from isocost.analysis.joint_scaling_law import frontier_law
    from isocost.analysis.metric_front import metric_front
    from isocost.analysis.pareto import best_guidance, pareto
    from isocost.api import (
        Study,
        StudyResult,
        list_extractors,
        list_metrics,
        list_plots,
        list_solvers,
        load_checkpoint,
        plot,
        read_resamples,
        read_results,
        recommend,
        run,
        score,
    )
    from isocost.config.sampling import SolverSpec
    from isocost.diffusion.solvers import register_solver
    from isocost.errors import ConfigError, RunError
    from isocost.evaluation.metric_registry import register_metric
    from isocost.evaluation.score_folder import score_folder
    from isocost.metrics.feature_extractors import register_extractor
    from isocost.models.export_diffusers import export
    from isocost.models.flops import family_table
    from isocost.pipeline.compare import compare
    from isocost.sampling.latency import latency
    from isocost.sampling.sample import sample
    from isocost.sampling.upscale import upscale

    __version__ = _version("isocost")

_MODULES = {
    "ConfigError": "isocost.errors",
    "RunError": "isocost.errors",
    "SolverSpec": "isocost.config.sampling",
    "Study": "isocost.api",
    "StudyResult": "isocost.api",
    "best_guidance": "isocost.analysis.pareto",
    "compare": "isocost.pipeline.compare",
    "export": "isocost.models.export_diffusers",
    "family_table": "isocost.models.flops",
    "frontier_bands": "isocost.analysis.frontier_ci",
    "frontier_law": "isocost.analysis.joint_scaling_law",
    "latency": "isocost.sampling.latency",
    "list_extractors": "isocost.api",
    "list_metrics": "isocost.api",
    "list_plots": "isocost.api",
    "list_solvers": "isocost.api",
    "load_checkpoint": "isocost.api",
    "metric_front": "isocost.analysis.metric_front",
    "pareto": "isocost.analysis.pareto",
    "plot": "isocost.api",
    "read_resamples": "isocost.api",
    "read_results": "isocost.api",
    "recommend": "isocost.api",
    "register_extractor": "isocost.metrics.feature_extractors",
    "register_metric": "isocost.evaluation.metric_registry",
    "register_solver": "isocost.diffusion.solvers",
    "run": "isocost.api",
    "sample": "isocost.sampling.sample",
    "score": "isocost.api",
    "score_folder": "isocost.evaluation.score_folder",
    "upscale": "isocost.sampling.upscale",
}

__all__ = [
    "ConfigError",
    "RunError",
    "SolverSpec",
    "Study",
    "StudyResult",
    "__version__",
    "best_guidance",
    "compare",
    "export",
    "family_table",
    "frontier_bands",
    "frontier_law",
    "latency",
    "list_extractors",
    "list_metrics",
    "list_plots",
    "list_solvers",
    "load_checkpoint",
    "metric_front",
    "pareto",
    "plot",
    "read_resamples",
    "read_results",
    "recommend",
    "register_extractor",
    "register_metric",
    "register_solver",
    "run",
    "sample",
    "score",
    "score_folder",
    "upscale",
]


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that `import isocost` and the command line start without torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("isocost")
    if name not in _MODULES:
        raise AttributeError(f"module 'isocost' has no attribute {name!r}; it has {', '.join(_MODULES)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
