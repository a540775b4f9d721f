"""The manifest and the scheduler configuration of a bundle (docs/bundle.md)."""

from dataclasses import asdict, replace

from tpx_export.pipeline import Pipeline
from tpx_export.precision import tolerance_of
from tpx_runtime import __version__
from tpx_runtime.bundle import SHIFT_RANGE
from tpx_runtime.errors import BadInput, BundleInvalid
from tpx_runtime.manifest import FileEntry, Manifest
from tpx_runtime.sampling import TRAIN_TIMESTEPS
from tpx_runtime.sampling.diffusion import FIRST_BETA, LAST_BETA
from tpx_runtime.settings import Settings


def check_description(pipeline: Pipeline, depths: tuple[int, ...], precision: str) -> None:
    """Check, before anything is exported, that a bundle of `pipeline` can be opened and run. Raises BadInput."""
    low, high = SHIFT_RANGE
    try:
        if not low <= pipeline.schedule_shift <= high:
            raise BundleInvalid(f"expected a shift in {low:g}..{high:g}, found {pipeline.schedule_shift:g}")
        manifest = build_manifest(pipeline, depths, precision, {})
        class_id = 0 if manifest.model.classes else None
        Settings("", "", seed=0, class_id=class_id, **asdict(manifest.defaults)).check(manifest)
    except (BadInput, BundleInvalid) as error:
        raise BadInput(f"{error} in the settings of {pipeline.name}; correct it") from None


def build_manifest(
    pipeline: Pipeline, depths: tuple[int, ...], precision: str, files: dict[str, FileEntry]
) -> Manifest:
    """The manifest of a bundle of `pipeline` with these files. Raises BundleInvalid."""
    return Manifest(
        name=pipeline.name,
        license=pipeline.license,
        producer=f"tpx {__version__}",
        precision=precision,
        model=replace(pipeline.model, depths=depths),
        text_encoders=tuple(part.spec for part in pipeline.text),
        latent=pipeline.latent,
        defaults=replace(pipeline.defaults, depth=min(pipeline.defaults.depth, depths[-1])),
        tolerance=tolerance_of(precision, pipeline.precision),
        files=files,
    )


def scheduler_config(pipeline: Pipeline) -> dict[str, object]:
    """diffusers' scheduler configuration for the schedule that the model was trained with."""
    if pipeline.shift is None:
        learned = pipeline.model.out_channels > pipeline.model.latent_channels
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": TRAIN_TIMESTEPS,
            "beta_start": FIRST_BETA,
            "beta_end": LAST_BETA,
            "beta_schedule": "linear",
            "variance_type": "learned_range" if learned else "fixed_large",
            "clip_sample": False,
        }
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "shift": pipeline.shift,
        "use_dynamic_shifting": False,
    }
