"""Evaluation of pretrained checkpoints: each is a run whose only checkpoint exists already."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial

from torch import nn

from isocost.config.sampling import SolverSpec, VaeSpec
from isocost.config.study import StudySpec
from isocost.config.sweep import GuideSpec, SweepSpec
from isocost.config.training import TrainSpec
from isocost.diffusion.noise_schedule import NoiseSchedule
from isocost.diffusion.solvers import solver_coefficients
from isocost.errors import ConfigError
from isocost.evaluation.paired import PairedComparer
from isocost.evaluation.protocol import Protocol
from isocost.experiments.base import EvalContext, EvalJob, Experiment, TrainingRun
from isocost.experiments.study_assets import StudyAssets
from isocost.models.checkpoint import CheckpointInfo, pretrained_info
from isocost.models.component_costs import ComponentCosts, pipeline_components
from isocost.models.components import DownsamplingDecoder, load_pipeline_autoencoder
from isocost.models.pretrained.lora import split_loras
from isocost.models.pretrained.pipeline_config import display_name, find_base_folder, source_digest
from isocost.models.pretrained.prompt_encoder import PipelineTextEncoder
from isocost.sampling.generate import PromptEmbeds, schedule_of
from isocost.sampling.guides import check_guide, check_same_latent_space
from isocost.sweep.grid import NO_GUIDES, Guides
from isocost.training.objectives import Objective
from isocost.utils.device import best_device

TRAINED_ELSEWHERE = TrainSpec(num_images=1, batch_size=1)
"""Placeholder for the training configuration of a run that is not trained here."""


class PretrainedExperiment(Experiment):
    """Sweep over the pretrained checkpoints that a study lists in its key `checkpoints`.

    A few-step student is swept with the solver `lcm` only, other checkpoints with all solvers except `lcm`. LoRAs may turn a
    checkpoint into a student, so a checkpoint with LoRAs is swept with every solver that its noise schedule supports. Images
    larger than `data.resolution` are downsampled to it before scoring.
    """

    def __init__(self, study: StudySpec, assets: StudyAssets) -> None:
        self.study, self.assets = study, assets
        self.sweep, self.protocol_spec, self.metric = study.sweep, study.protocol, study.report.metric
        self._components: dict[tuple[str, VaeSpec, str | None], ComponentCosts] = {}

    @cached_property
    def infos(self) -> dict[str, CheckpointInfo]:
        """Metadata of the checkpoints by the digest of their content.

        Raises:
            ConfigError: isocost cannot read a checkpoint, or two checkpoints have the same content or the same label.
        """
        infos: dict[str, CheckpointInfo] = {}
        path_by_label: dict[str, str] = {}
        for path in self.study.checkpoints:
            info, name = pretrained_info(path), source_digest(path)
            if info.label in path_by_label and info.pretrained is not None:  # two owners of one name
                info = info.model_copy(update={"variant": display_name(info.pretrained.path, num_parts=2)})
            if info.label in path_by_label:
                earlier = path_by_label[info.label]
                raise ConfigError(f"checkpoints: {path} and {earlier} are both called {info.label}; rename a folder")
            if name in infos:
                raise ConfigError(f"checkpoints: {path} has the same files as another checkpoint; remove one of the two")
            infos[name], path_by_label[info.label] = info, path
        return infos

    @cached_property
    def runs(self) -> list[TrainingRun]:
        """One run per checkpoint, smallest network first."""
        by_size = sorted(self.infos.items(), key=lambda item: (item[1].num_parameters, item[1].label))
        return [
            TrainingRun("text2image", info.model, TRAINED_ELSEWHERE, name, {0: name}, variant=info.variant, is_pretrained=True)
            for name, info in by_size
        ]

    def pretrained(self, run: TrainingRun) -> CheckpointInfo:
        """Return the metadata of the run's checkpoint."""
        return self.infos[run.final]

    def schedule(self, run: TrainingRun) -> NoiseSchedule:
        """Return the noise schedule of the run's checkpoint."""
        return schedule_of(self.pretrained(run))

    @cached_property
    def selected_guides(self) -> list[tuple[GuideSpec, CheckpointInfo]]:
        """The guides that the sweep names, with their metadata.

        Raises:
            ConfigError: isocost cannot read a guide, or a guide is requested by size.
        """
        selected = []
        for selection in self.sweep.guide_selections:
            if selection.checkpoint is None:
                raise ConfigError(
                    f"sweep.guides: {selection.title}: published checkpoints are no family; "
                    "give checkpoint: FOLDER or OWNER/NAME"
                )
            spec = GuideSpec(checkpoint=source_digest(selection.checkpoint), null_prompt=selection.null_prompt)
            selected.append((spec, pretrained_info(selection.checkpoint)))
        return selected

    def external_guides(self, run: TrainingRun) -> dict[str, CheckpointInfo]:
        """Return the guides that fit a checkpoint: others with its latent space and noise schedule that cost no more a pass."""
        return {spec.checkpoint: info for spec, info in self.selected_guides if not self._problem(run, spec.checkpoint, info)}

    def _problem(self, run: TrainingRun, name: str, guide: CheckpointInfo) -> str:
        """Why a guide does not fit a checkpoint, or nothing."""
        main = self.pretrained(run)
        if name == run.final:
            return f"{guide.label} would guide itself; give another checkpoint"
        try:
            check_guide(main, guide)
        except ConfigError as error:
            return str(error)
        if guide.gflop_per_forward > main.gflop_per_forward:
            return f"{guide.label} costs more a pass than {main.label}; exchange the two"
        return ""

    def guides(self, run: TrainingRun) -> Guides:
        """Return the guides of a checkpoint."""
        fitting = self.external_guides(run)
        selected: list[GuideSpec | None] = [None] if self.sweep.includes_no_guide else []
        selected += [spec for spec, _ in self.selected_guides if spec.checkpoint in fitting]
        return tuple(dict.fromkeys(selected)) or NO_GUIDES

    def check_guidance(self, run: TrainingRun) -> None:
        """Check that every guide fits a checkpoint, by its metadata and by its autoencoder.

        Raises:
            ConfigError: a guide fits none of the checkpoints, or decodes latents to other images.
        """
        super().check_guidance(run)
        for spec, guide in self.selected_guides:
            problems = [self._problem(other, spec.checkpoint, guide) for other in self.runs]
            if all(problems):
                raise ConfigError(f"sweep.guides: {problems[-1]}")
        info = self.pretrained(run)
        assert info.pretrained is not None
        for guide in self.external_guides(run).values():
            assert guide.pretrained is not None
            folders = [find_base_folder(part.path) for part in (info.pretrained, guide.pretrained)]
            main_autoencoder, guide_autoencoder = (load_pipeline_autoencoder(folder) for folder in folders)
            check_same_latent_space(main_autoencoder, guide_autoencoder, guide.label)

    def components(self, checkpoint: str, vae: VaeSpec, guide: str | None) -> ComponentCosts:
        """Return the costs of the pipeline's text encoders and autoencoder; a guide encodes the prompts with its own."""
        key = (checkpoint, vae, guide)
        if key not in self._components:
            guides = {spec.checkpoint: info for spec, info in self.selected_guides}
            guide_info = None if guide is None else guides[guide]
            self._components[key] = pipeline_components(self.infos[checkpoint], guide_info, vae)
        return self._components[key]

    def objective(self, run: TrainingRun, network: nn.Module) -> Objective:
        """Not available: pretrained checkpoints are not trained."""
        raise AssertionError("a pretrained checkpoint is not trained")

    def network(self, run: TrainingRun) -> nn.Module:
        """Not available: pretrained checkpoints are not trained."""
        raise AssertionError("a pretrained checkpoint is not trained")

    def validate(self) -> None:
        """Check that every checkpoint supports the sweep, and compute the features of the reference images.

        Raises:
            ConfigError: a checkpoint generates images smaller than data.resolution, or does not support a solver.
        """
        for run in self.runs:
            info = self.pretrained(run)
            if info.resolution < self.study.data.resolution:
                raise ConfigError(
                    f"data.resolution: {self.study.data.resolution}, but {info.variant} generates {info.resolution} pixels; "
                    "images are downsampled, never upsampled: set it to the smallest resolution among the checkpoints"
                )
            self.sweep.vae.check_resolution(info.resolution, f"{info.variant}: sweep.vae.tile_size")
            sweep = self.sweeps[run.final]
            for solver in sweep.solvers:
                for num_steps in sweep.step_counts(solver):
                    solver_coefficients(solver, num_steps, schedule_of(info))
        self.assets.prepare_reference()

    @cached_property
    def sweeps(self) -> dict[str, SweepSpec]:
        """The sweep of every checkpoint, by its digest: with the solvers that it supports, and with its values of guidance.

        Raises:
            ConfigError: the sweep has no solver for a checkpoint, or isocost lacks the solver that a folder names.
        """
        return {name: self._sweep_of(info) for name, info in self.infos.items()}

    def _sweep_of(self, info: CheckpointInfo) -> SweepSpec:
        solvers = tuple(dict.fromkeys(info.resolve_solver(solver) for solver in self.sweep.solvers))
        guidance = tuple(dict.fromkeys(info.effective_guidance(value) for value in self.sweep.guidance))
        sweep = self.sweep.model_copy(update={"guidance": guidance})
        if info.pretrained is not None and split_loras(info.pretrained.path)[1]:
            return self._sweep_with_loras(info, sweep, solvers)
        is_student = info.nearest_solver.name == "lcm"
        supported = tuple(solver for solver in solvers if (solver.name == "lcm") is is_student)
        if not supported:
            reason = "a few-step student: add lcm" if is_student else "not a few-step student: add a solver other than lcm"
            raise ConfigError(f"sweep.solvers: none of them supports {info.variant}, which is {reason}")
        return sweep.model_copy(update={"solvers": supported})

    def _sweep_with_loras(self, info: CheckpointInfo, sweep: SweepSpec, solvers: tuple[SolverSpec, ...]) -> SweepSpec:
        supported = tuple(solver for solver in solvers if not (solver.name == "lcm" and schedule_of(info).is_flow))
        if not supported:
            raise ConfigError(
                f"sweep.solvers: none of them supports {info.variant}, which is a flow model: add a solver other than lcm"
            )
        return sweep.model_copy(update={"solvers": supported})

    def jobs(self, run: TrainingRun) -> list[EvalJob]:
        """Return the grid or the search cells of the checkpoint."""
        return self.eval_jobs_of_run(run, self.sweeps[run.final], self.protocol, partial(self._eval_context, run))

    def _eval_context(self, run: TrainingRun) -> EvalContext:
        """Build the context with the reference prompts in the checkpoint's own embedding, and its own autoencoder."""
        assets, info = self.assets, self.pretrained(run)
        assert info.pretrained is not None
        folder = find_base_folder(info.pretrained.path)
        prompts = self._prompts_of(info)
        autoencoder = load_pipeline_autoencoder(folder, best_device(), self.sweep.vae)
        resolution = self.study.data.resolution
        if info.resolution != resolution:
            autoencoder = DownsamplingDecoder(autoencoder, resolution)
        guide_prompts = {name: partial(self._prompts_of, guide) for name, guide in self.external_guides(run).items()}
        return EvalContext(
            assets.reference,
            prompts,
            assets.saved_indices,
            self.protocol_spec.metrics,
            autoencoder=autoencoder,
            guide_prompts=guide_prompts,
        )

    def _prompts_of(self, info: CheckpointInfo) -> PromptEmbeds:
        assert info.pretrained is not None
        folder = find_base_folder(info.pretrained.path)
        return PromptEmbeds.encode(self.assets.reference.prompts, PipelineTextEncoder(folder, info, best_device()))

    @property
    def protocol(self) -> Protocol:
        """The protocol of the study."""
        return self.assets.protocol

    def comparer(self) -> PairedComparer:
        """Return the paired differences between points, by the reference set of the study."""
        return self.assets.comparer(lambda: self.assets.reference, self.protocol_spec.metrics)

    @property
    def protocol_summary(self) -> str:
        """One sentence about the study's protocol."""
        return self.assets.protocol.sentence()

    def replaced_schedulers(self) -> Mapping[tuple[str, str], str]:
        """Scheduler classes that isocost does not have, and for which the study asked for the nearest solver."""
        return {
            (name, info.nearest_solver.label): replaced
            for name, info in self.infos.items()
            for solver in self.sweep.solvers
            if (replaced := info.replaced_scheduler(solver))
        }

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """No scores: without training images there are no real images besides the reference."""
        return {"real": {}}

    @property
    def sample_labels(self) -> list[str]:
        """Prompts of the saved samples."""
        return [self.assets.reference.prompts[i] for i in self.assets.saved_indices]
