"""A model's parts -> a bundle (docs/bundle.md), which is verified before anyone can load it."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from tpx_export.description import manifest, scheduler
from tpx_export.fused_attention import FLOATS, FUSED_FROM, fused
from tpx_export.golden import Golden, text_golden, told_of, transformer_golden, vae_golden
from tpx_export.graphs import (
    ConditionsGraph,
    DecoderGraph,
    EncoderGraph,
    Graph,
    TextEncoderGraph,
    TransformerGraph,
    to_onnx,
)
from tpx_export.pipeline import Pipeline, TextPart
from tpx_export.precision import QUANTISED, TOLERANCES, around, at_precision
from tpx_export.quantise.quantiser import Int8Options, Quantiser, Tasks, complete, fp32_beside
from tpx_export.quantise.verdict import Refused, verdict
from tpx_export.routing import variants_of
from tpx_export.step import step
from tpx_export.summary import Summary, folder_bytes
from tpx_export.weights import WeightFile
from tpx_export.whole_folder import check_place, whole_folder
from tpx_runtime.bundle import (
    CONDITIONS,
    GOLDEN,
    MANIFEST,
    MODEL,
    SCHEDULER,
    STEP,
    VAE_DECODER,
    VAE_ENCODER,
    VOCABULARY,
    Bundle,
    transformer_name,
)
from tpx_runtime.engine import GraphVariant, resolve
from tpx_runtime.errors import BadInput
from tpx_runtime.sampling import Array
from tpx_runtime.verify import (
    PartReport,
    load_golden,
    require_ok,
    verify_bundle,
    verify_step,
    verify_transformers,
)

Progress = Callable[[str, int, int], None]  # (what comes next, tasks done, tasks in all)


def export_bundle(
    pipeline: Pipeline,
    out: Path,
    depth: int | None = None,
    precision: str | None = None,
    force: bool = False,
    progress: Progress = lambda task, done, total: None,
    int8: Int8Options | None = None,
) -> Summary:
    """Write the bundle of `pipeline` at `out`, with the transformer at every depth 1..`depth` (the model's own if None).

    The precision is that of the stored weights if None. The bundle is made in a hidden sibling of `out`, verified with ONNX
    Runtime against PyTorch, and renamed when complete: an export that fails or is interrupted leaves nothing. Raises
    BadInput for a depth, precision, place or `int8` that cannot be used, EngineFailed for a graph that is out of tolerance,
    Refused for an int8 bundle that is not worth having, unless `int8.accept_loss`.
    """
    deepest, precision = pipeline.model.depths[-1], precision or pipeline.precision
    depth = deepest if depth is None else depth
    if not 1 <= depth <= deepest:
        raise BadInput(f"expected a depth of 1..{deepest} (this model's), found {depth}")
    check(out, depth, precision, force, int8)
    quantiser = Quantiser(pipeline, precision, int8 or Int8Options()) if precision in QUANTISED else None
    depths = tuple(range(1, depth + 1))
    more = quantiser.tasks(depths) if quantiser else 0
    tasks = _Tasks(progress, total=len(pipeline.text) + len(depths) + 5 + more)
    golden: Golden = {}
    with whole_folder(out, force) as folder, fp32_beside(folder) as fp32:
        places = _Places(folder, fp32, quantiser)
        for part in pipeline.text:
            with tasks(part.spec.folder.replace("_", " ")):
                golden |= _write_text_encoder(pipeline, part, places, precision)
        golden |= _write_transformer(pipeline, places, precision, depths, golden, tasks)
        with tasks("decoder and encoder"):
            rest = around(precision, pipeline.precision)
            golden |= _write_autoencoder(pipeline, folder, rest, golden.pop("end"))  # type: ignore[arg-type]
        (folder / GOLDEN).parent.mkdir()
        np.savez(folder / GOLDEN, **golden)  # type: ignore[arg-type]
        _write_json(folder / SCHEDULER, scheduler(pipeline))
        if (between := step(pipeline.model)) is not None:
            onnx.save_model(between, folder / STEP)
        with tasks("hashes"):
            bundle = Bundle(folder, manifest(pipeline, depths, precision, folder))
        (folder / MANIFEST).write_text(bundle.manifest.to_json(), encoding="utf-8")
        # Modules are in reference cycles with what traced them, and engines need their memory.
        gc.collect()
        with tasks("verification"):
            reports = verify(bundle)
        summary = Summary(reports, tasks.seconds, folder_bytes(folder))
        if quantiser:
            with tasks("the same in fp32"):
                twin = complete(fp32, bundle, pipeline)
            report = quantiser.report(bundle, twin, tasks)
            summary = replace(summary, int8=report, loss=verdict(report))
            if summary.loss and not quantiser.options.accept_loss:
                raise Refused(f"{summary.loss}; nothing was written, add --accept-loss to keep it", summary)
    return summary


@dataclass(frozen=True)
class _Places:
    """Where graphs are written: the bundle's folder, and, for a quantiser to compare with, one for fp32."""

    folder: Path
    fp32: Path
    quantiser: Quantiser | None


def _write_text_encoder(pipeline: Pipeline, part: TextPart, places: _Places, precision: str) -> Golden:
    folder, quantiser = places.folder, places.quantiser
    _write_json(folder / part.spec.tokenizer / VOCABULARY, part.vocabulary)
    module = part.load()
    golden = text_golden(part, module)
    if quantiser:
        quantiser.hear(part, module)
    if quantiser and quantiser.weights_alone:
        at_precision(module, "fp32")
        _write_encoder_graph(part, module, places.fp32)
        quantiser.text_encoder(module)
    else:
        at_precision(module, around(precision, pipeline.precision))
    _write_encoder_graph(part, module, folder)
    return golden


def _write_encoder_graph(part: TextPart, module: nn.Module, folder: Path) -> None:
    outputs = ("context", "pooled") if part.spec.pooled_width else ("context",)
    graph = Graph(TextEncoderGraph(module), {"ids": torch.from_numpy(part.ids)}, outputs)
    with WeightFile(folder / part.spec.folder) as weights:
        weights.write(weights.take(to_onnx(graph)), MODEL)


def _write_transformer(
    pipeline: Pipeline,
    places: _Places,
    precision: str,
    depths: tuple[int, ...],
    golden: Golden,
    tasks: "_Tasks",
) -> Golden:
    model, quantiser = pipeline.model, places.quantiser
    with tasks("transformer in PyTorch"):
        module = pipeline.transformer()
        inputs = told_of(pipeline.text, golden, model)
        made = transformer_golden(module, model, inputs, pipeline.shift, depths)
    if quantiser:
        at_precision(module, "fp32")
        _write_transformer_graphs(
            module, pipeline, made, places.fp32, depths, lambda task: tasks(f"{task}, fp32")
        )
        quantiser.transformer(module, depths, tasks)
    else:
        at_precision(module, precision)
    _write_transformer_graphs(module, pipeline, made, places.folder, depths, tasks)
    return made


def _write_transformer_graphs(
    module: nn.Module,
    pipeline: Pipeline,
    golden: Golden,
    folder: Path,
    depths: tuple[int, ...],
    tasks: Tasks,
) -> None:
    model = pipeline.model
    known = {name: _pair(golden[name]) for name in model.conditions_inputs}
    denoise = {name: _pair(golden[name]) for name in model.transformer_inputs}
    routed = bool(model.thinking_blocks)
    outputs = (model.prediction, "routes") if routed else (model.prediction,)
    with WeightFile(folder / "transformer") as weights:
        with tasks("transformer conditions"):
            graph = Graph(ConditionsGraph(module), known, ("conditions",))
            weights.write(weights.take(to_onnx(graph)), Path(CONDITIONS).name)
        for steps in depths:
            with tasks(f"transformer depth {steps}"):
                graph = Graph(TransformerGraph(module, steps, routed), denoise, outputs)
                operator, plain = variants_of(weights.take(to_onnx(graph)), model.visual_tokens)
                variants: dict[GraphVariant, onnx.ModelProto | None] = {
                    "operator": operator,
                    "fused": fused(operator),
                    "plain": fused(plain, FLOATS) if model.visual_tokens >= FUSED_FROM else plain,
                }
                for variant, written in variants.items():
                    if written is not None:
                        weights.write(written, Path(transformer_name(steps, variant)).name)


def _write_autoencoder(pipeline: Pipeline, folder: Path, precision: str, end: Array) -> Golden:
    module = pipeline.autoencoder()
    golden = vae_golden(module, end, pipeline.latent)
    at_precision(module, precision)
    decode = Graph(DecoderGraph(module), {"latents": _pair(golden["decoder_latents"])}, ("image",))
    encode = Graph(EncoderGraph(module), {"image": _pair(golden["image"])}, ("latents",))
    for name, graph in ((VAE_DECODER, decode), (VAE_ENCODER, encode)):
        with WeightFile((folder / name).parent) as weights:
            weights.write(weights.take(to_onnx(graph)), Path(name).name)
    return golden


def _pair(values: npt.NDArray[np.generic]) -> torch.Tensor:
    """`values` with two rows: an example of one row would fix the batch at 1."""
    return torch.from_numpy(values if len(values) == 2 else np.concatenate([values, values]))


def verify(bundle: Bundle) -> dict[str, list[PartReport]]:
    """Compare every graph in ONNX Runtime with the golden tensors, transformers in every variant that was written.

    Raises EngineFailed for a part out of tolerance.
    """
    engine, golden = resolve("onnxruntime"), load_golden(bundle)
    reports: dict[str, list[PartReport]] = {engine.variant: verify_bundle(bundle, engine)}
    deepest = bundle.manifest.model.depths[-1]
    for variant in get_args(GraphVariant):
        if variant not in reports and transformer_name(deepest, variant) in bundle.manifest.files:
            reports[variant] = verify_transformers(bundle, replace(engine, variant=variant), golden)
    reports[engine.variant] += verify_step(bundle, engine)
    for variant, parts in reports.items():
        require_ok(parts, f"{engine.name} ({variant} variant)")
    return reports


class _Tasks:
    """Times tasks and announces each: `with tasks("decoder"): ...`."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._total = progress, total

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._progress(name, len(self.seconds), self._total)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self._progress(name, len(self.seconds), self._total)


def check(
    out: Path | None, depth: int | None, precision: str | None, force: bool, int8: Int8Options | None
) -> None:
    """Check what `export_bundle` can check without the model; None leaves a choice to the model. Raises BadInput."""
    if depth is not None and depth < 1:
        raise BadInput(f"expected a depth of 1 or more, found {depth}")
    if precision is not None and precision not in TOLERANCES:
        raise BadInput(f"expected a precision of {', '.join(TOLERANCES)}, found {precision!r}")
    if int8 is not None:
        int8.check(precision)
    if out is not None:
        check_place(out, force)


def _write_json(path: Path, facts: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
