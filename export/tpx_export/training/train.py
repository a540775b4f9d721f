"""Training of adapters from a base and a folder of images, with one part of the base in memory at a time.

images ──VAE──▶ cache        captions ──each text encoder──▶ cache        cache ──transformer──▶ adapters
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpx_export.adapters import save_adapters, state_path
from tpx_export.base.dit_pipeline import is_dit_checkpoint
from tpx_export.base.pipeline import open_base
from tpx_export.fingerprint import base_fingerprint
from tpx_export.pipeline import Pipeline
from tpx_export.training import state
from tpx_export.training.cache import Cache
from tpx_export.training.data import Data
from tpx_export.training.diffusion import DiffusionLoss
from tpx_export.training.encode import encode_captions, encode_images
from tpx_export.training.flow import FlowLoss
from tpx_export.training.frozen import checkpoint_blocks, thinking_model
from tpx_export.training.images import Example, read_folder
from tpx_export.training.loop import Job, Objective, Outcome, TrainingFailed, fit
from tpx_export.training.settings import Settings, check_device, limit_to_base
from tpx_runtime.errors import BadInput, Cancelled
from tpx_runtime.files import try_writing_into
from tpx_runtime.image_size import format_size

SD3_SIZE_PX = (512, 512)


@dataclass(frozen=True)
class Request:
    """The base, data, output and options of a run. `blocks_explicit`: the user named the blocks of the settings."""

    base: Path
    data: Path
    out: Path
    steps: int
    components: Path | None = None
    cache_folder: Path | None = None
    image_size_px: tuple[int, int] | None = None
    t5: bool = True
    blocks_explicit: bool = False
    skip_broken: bool = False
    gradient_checkpointing: bool = True
    device: str = "cpu"

    @property
    def state(self) -> Path:
        return state_path(self.out)

    @property
    def cache(self) -> Path:
        return self.cache_folder or self.out.with_name(f"{self.out.name}.cache")


def train(request: Request, settings: Settings) -> Outcome:
    """Train adapters and write them to `request.out`; a stopped run is resumed.

    Everything is checked before encoding starts, except whether images can be read. Raises BadInput, CheckpointInvalid,
    TrainingFailed, Cancelled.
    """
    _check(request)
    with _memory_for(f"the base on {request.device}", "use --no-t5 if it has T5, or --device cpu"):
        return _train(request, settings)


@contextmanager
def _memory_for(what: str, advice: str) -> Iterator[None]:
    """Raise TrainingFailed with this advice if memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainingFailed(f"expected memory for {what}, found too little; {advice}") from None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; torch has an exception of its own only for that of a GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def _train(request: Request, settings: Settings) -> Outcome:
    size = request.image_size_px
    if size is None and not is_dit_checkpoint(request.base):
        size = SD3_SIZE_PX
    pipeline = open_base(request.base, request.components, size, t5=request.t5)
    examples = read_folder(request.data, pipeline.model.classes)
    base = base_fingerprint(request.base, request.components, (request.out, request.state))
    settings = dataclasses.replace(
        settings, thinking=limit_to_base(settings.thinking, pipeline.blocks, request.blocks_explicit)
    )
    identity = {
        **settings.options(),
        "--image-size": format_size(pipeline.model.image_size_px),
        "--no-t5": bool(pipeline.text) and not pipeline.t5,
        "base": base,
    }
    if request.state.exists():
        state.read(request.state, identity, request.steps)
    data = _encode(request, pipeline, examples, base)
    identity["pictures and captions"] = data.fingerprint
    model = thinking_model(
        pipeline.transformer(), settings.thinking, settings.precision, request.device, settings.seed
    )
    if request.gradient_checkpointing:
        checkpoint_blocks(model)
    job = Job(model, objective_of(pipeline), data, settings, request.device)
    with _memory_for(
        f"{settings.batch} images per step on {request.device}",
        "use a smaller --batch or --image-size, and keep --gradient-checkpointing on",
    ):
        outcome = fit(job, request.steps, request.state, identity)
    _write(request, pipeline, job, outcome, identity)
    return outcome


def objective_of(pipeline: Pipeline) -> Objective:
    """The loss that the base was trained with: flow matching or diffusion."""
    if pipeline.model.prediction == "velocity":
        return FlowLoss(pipeline.schedule_shift)
    return DiffusionLoss(pipeline.model.out_channels > pipeline.model.latent_channels)


def _encode(request: Request, pipeline: Pipeline, examples: list[Example], base: str) -> Data:
    cache = Cache(request.cache)
    try:
        latents = encode_images(examples, pipeline, base, cache, request.device, request.skip_broken)
        conditions = tuple(example.condition for example in latents)
        texts = ["", *(c for c in conditions if isinstance(c, str))] if pipeline.text else []
        captions = encode_captions(texts, pipeline, base, cache, request.device)
    except KeyboardInterrupt:
        raise Cancelled(
            f"cancelled; the data encoded so far is in {cache.folder}, the same command continues"
        ) from None
    return Data(pipeline.model, cache, tuple(latents.values()), conditions, captions)


def _write(
    request: Request, pipeline: Pipeline, job: Job, outcome: Outcome, identity: dict[str, Any]
) -> None:
    training = dataclasses.asdict(job.settings)
    del training["thinking"]  # the adapter file has it as its specification
    training |= {
        "objective": pipeline.model.prediction,
        "image_size": format_size(pipeline.model.image_size_px),
        "t5": pipeline.t5,
        "pictures": len(job.data),
        "data": job.data.fingerprint,
        "base_sha256": identity["base"],
        "weights": "average",
        **dataclasses.asdict(outcome),
    }
    save_adapters(job.model, request.out, pipeline.name, training)


def _check(request: Request) -> None:
    """Check what can be checked without opening the base. Raises BadInput."""
    if request.steps < 1:
        raise BadInput(f"expected --steps of 1 or more, found {request.steps}")
    check_device(request.device)
    out = request.out
    if out.suffix != ".safetensors":
        raise BadInput(f"expected --out to end in .safetensors, found {out}")
    try:
        if out.is_dir():
            raise BadInput(f"expected --out to name a file, found the folder {out}; name a file in it")
        resumed = request.state.exists()  # its name is longer than that of `out`, so it may be too long
        if out.exists() and not resumed:
            raise BadInput(
                f"expected a new file, found that {out} exists without the state of its run; choose another path"
            )
        try_writing_into(out.parent)
    except OSError as error:
        raise BadInput(
            f"expected a writable path for {out}, found: {error.strerror}; choose another"
        ) from None
