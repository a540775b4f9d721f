"""Export of a model's parts to a bundle (docs/bundle.md), which is published only after verification."""

import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from tpx_export.atomic_folder import atomic_folder, check_output_folder
from tpx_export.description import build_manifest, check_description, scheduler_config
from tpx_export.fusion import FLOAT_TYPES, MIN_FUSED_TOKENS, fuse_attention, fused_variant
from tpx_export.golden import Golden, conditioning_inputs, text_golden, transformer_golden, vae_golden
from tpx_export.graphs import (
    ConditionsGraph,
    DecoderGraph,
    EncoderGraph,
    Graph,
    TextEncoderGraph,
    TransformerGraph,
)
from tpx_export.pipeline import Pipeline, TextPart
from tpx_export.precision import QUANTISED_PRECISIONS, TOLERANCES, cast_to_precision, unquantised_precision
from tpx_export.quantise.quantiser import (
    QuantisationOptions,
    Quantiser,
    Tasks,
    complete_fp32_bundle,
)
from tpx_export.quantise.verdict import Refused, rejection
from tpx_export.routing import routing_variants
from tpx_export.step import step_graph
from tpx_export.summary import Summary, folder_bytes
from tpx_export.tracing import to_onnx
from tpx_export.weights import WeightFile
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
    GraphVariant,
    describe_files,
    transformer_name,
)
from tpx_runtime.engine import resolve
from tpx_runtime.environment import compiled_next_to_bundles, openvino_folder
from tpx_runtime.errors import BadInput
from tpx_runtime.files import check_free_space
from tpx_runtime.sampling import Array
from tpx_runtime.verify import (
    PartReport,
    load_golden,
    require_ok,
    verify_bundle,
    verify_step,
    verify_transformers,
)

# Bytes per weight of the parts that an export writes, at least. Where only weights are quantised, text encoders and
# transformer are also written in fp32, to compare with; int8 leaves the text encoders as they are stored.
_LEAST_BYTES = {"fp32": 4, "fp16": 2, "int8": 2, "int8-weights": 4, "int4-weights": 4}

Progress = Callable[[str, int, int], None]  # (name of the next task, tasks done, total)


def export_bundle(
    pipeline: Pipeline,
    out: Path,
    depth: int | None = None,
    precision: str | None = None,
    force: bool = False,
    progress: Progress = lambda task, done, total: None,
    quantisation: QuantisationOptions | None = None,
) -> Summary:
    """Write the bundle of `pipeline` to `out`, with the transformer at every depth 1..`depth` (by default all).

    The default precision is the pipeline's: that of a base's stored weights, fp32 for a TPX checkpoint. The bundle is
    written to a hidden folder next to `out`, verified with ONNX Runtime against PyTorch, and then renamed: an export that
    fails or is interrupted leaves nothing behind. Raises BadInput for an invalid depth, precision, path, `quantisation` or
    setting of `pipeline`, EngineFailed for a graph that is out of tolerance, Refused for a quantised bundle that loses too
    much or gains nothing, unless `quantisation.accept_loss`.
    """
    max_depth, precision = pipeline.model.depths[-1], precision or pipeline.precision
    depth = max_depth if depth is None else depth
    if not 1 <= depth <= max_depth:
        raise BadInput(f"expected a depth of 1..{max_depth} (this model's), found {depth}")
    check_arguments(out, depth, precision, force, quantisation)
    depths = tuple(range(1, depth + 1))
    check_description(pipeline, depths, precision)
    check_free_space(out, least_bytes(pipeline, precision))
    quantiser = (
        Quantiser(pipeline, precision, quantisation or QuantisationOptions())
        if precision in QUANTISED_PRECISIONS
        else None
    )
    quantiser_tasks = quantiser.task_count(depths) if quantiser else 0
    tasks = _Tasks(progress, total=len(pipeline.text) + len(depths) + 5 + quantiser_tasks)
    golden: Golden = {}
    with atomic_folder(out, force) as folder, compiled_next_to_bundles():
        compiled = openvino_folder(out)
        fp32 = folder.with_name("fp32")  # deleted with the folder that both are in
        output = _Output(folder, fp32, quantiser)
        for part in pipeline.text:
            with tasks(part.spec.folder.replace("_", " ")):
                golden |= _write_text_encoder(pipeline, part, output, precision)
        golden |= _write_transformer(pipeline, output, precision, depths, golden, tasks)
        with tasks("decoder and encoder"):
            vae_precision = unquantised_precision(precision, pipeline.precision)
            golden |= _write_autoencoder(pipeline, folder, vae_precision, golden.pop("end"))  # type: ignore[arg-type]
        (folder / GOLDEN).parent.mkdir()
        np.savez(folder / GOLDEN, **golden)  # type: ignore[arg-type]
        _write_json(folder / SCHEDULER, scheduler_config(pipeline))
        if (graph := step_graph(pipeline.model)) is not None:
            onnx.save_model(graph, folder / STEP)
        with tasks("hashes"):
            manifest = build_manifest(pipeline, depths, precision, describe_files(folder))
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        bundle = Bundle.open(folder, verify=False)  # not what was meant, but what a user will open
        # Tracing leaves the modules in reference cycles, and the engines need their memory.
        gc.collect()
        with tasks("verification"):
            reports = verify(bundle)
        summary = Summary(reports, tasks.seconds, folder_bytes(folder))
        if quantiser:
            with tasks("fp32 bundle"):
                fp32_bundle = complete_fp32_bundle(fp32, bundle, pipeline)
            report = quantiser.report(bundle, fp32_bundle, tasks)
            summary = replace(summary, quantisation=report, rejection=rejection(report))
            if summary.rejection and not quantiser.options.accept_loss:
                raise Refused(
                    f"{summary.rejection}; nothing was written, add --accept-loss to keep the bundle", summary
                )
    # Of the bundle that was replaced: its key has that bundle's hash, so nothing would ever read or remove it.
    shutil.rmtree(compiled, ignore_errors=True)
    return summary


def least_bytes(pipeline: Pipeline, precision: str) -> int:
    """A lower bound of the space that an export takes, from the number of weights alone."""
    weights = pipeline.parameters + sum(part.parameters for part in pipeline.text)
    return _LEAST_BYTES[precision] * weights


@dataclass(frozen=True)
class _Output:
    """The folders that graphs are written to: the bundle's, and one for fp32 if a quantiser compares with it."""

    folder: Path
    fp32: Path
    quantiser: Quantiser | None


def _write_text_encoder(pipeline: Pipeline, part: TextPart, output: _Output, precision: str) -> Golden:
    folder, quantiser = output.folder, output.quantiser
    _write_json(folder / part.spec.tokenizer / VOCABULARY, part.vocabulary)
    module = part.load()
    golden = text_golden(part, module)
    if quantiser:
        quantiser.add_text_encoder(part, module)
    if quantiser and quantiser.weights_only:
        cast_to_precision(module, "fp32")
        _write_encoder_graph(part, module, output.fp32)
        quantiser.quantise_text_encoder(module)
    else:
        cast_to_precision(module, unquantised_precision(precision, pipeline.precision))
    _write_encoder_graph(part, module, folder)
    return golden


def _write_encoder_graph(part: TextPart, module: nn.Module, folder: Path) -> None:
    graph = Graph(TextEncoderGraph(module), {"ids": torch.from_numpy(part.ids)}, part.spec.outputs)
    with WeightFile(folder / part.spec.folder) as weights:
        weights.write(weights.externalise(to_onnx(graph)), MODEL)


def _write_transformer(
    pipeline: Pipeline,
    output: _Output,
    precision: str,
    depths: tuple[int, ...],
    golden: Golden,
    tasks: "_Tasks",
) -> Golden:
    model, quantiser = pipeline.model, output.quantiser
    with tasks("transformer in PyTorch"):
        module = pipeline.transformer()
        inputs = conditioning_inputs(pipeline.text, golden, model)
        transformer = transformer_golden(module, model, inputs, pipeline.schedule_shift, depths)
    if quantiser:
        cast_to_precision(module, "fp32")
        _write_transformer_graphs(
            module, pipeline, transformer, output.fp32, depths, lambda task: tasks(f"{task}, fp32")
        )
        quantiser.quantise_transformer(module, depths, tasks)
    else:
        cast_to_precision(module, precision)
    half_on_gpus = quantiser is not None and quantiser.weights_only
    _write_transformer_graphs(module, pipeline, transformer, output.folder, depths, tasks, half_on_gpus)
    return transformer


def _write_transformer_graphs(
    module: nn.Module,
    pipeline: Pipeline,
    golden: Golden,
    folder: Path,
    depths: tuple[int, ...],
    tasks: Tasks,
    half_on_gpus: bool = False,
) -> None:
    """Write the graphs of a transformer. With `half_on_gpus` it is converted to float16 after the variants for CPUs."""
    model = pipeline.model
    condition_inputs = {name: _two_rows(golden[name]) for name in model.conditions_inputs}
    denoise_inputs = {name: _two_rows(golden[name]) for name in model.transformer_inputs}
    routed = bool(model.thinking_blocks)
    outputs = (model.prediction, "routes") if routed else (model.prediction,)
    with WeightFile(folder / "transformer") as weights:

        def routing(depth: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
            graph = Graph(TransformerGraph(module, depth, routed), denoise_inputs, outputs)
            return routing_variants(weights.externalise(to_onnx(graph)), model.visual_tokens)

        def for_gpus(operator: onnx.ModelProto) -> dict[GraphVariant, onnx.ModelProto | None]:
            return {"operator": operator, "fused": fused_variant(operator, folder / "transformer")}

        def write(depth: int, variants: Mapping[GraphVariant, onnx.ModelProto | None]) -> None:
            for variant, proto in variants.items():
                if proto is not None:
                    weights.write(proto, Path(transformer_name(depth, variant)).name)

        with tasks("transformer conditions"):
            graph = Graph(ConditionsGraph(module), condition_inputs, ("conditions",))
            weights.write(weights.externalise(to_onnx(graph)), Path(CONDITIONS).name)
        for depth in depths:
            with tasks(f"transformer depth {depth}"):
                operator, plain = routing(depth)
                if model.visual_tokens >= MIN_FUSED_TOKENS:
                    plain = fuse_attention(plain, FLOAT_TYPES) or plain
                write(depth, {"plain": plain})
                if not half_on_gpus:
                    write(depth, for_gpus(operator))
        if half_on_gpus:
            cast_to_precision(module, "fp16")
            for depth in depths:
                with tasks(f"transformer depth {depth}, fp16"):
                    write(depth, for_gpus(routing(depth)[0]))


def _write_autoencoder(pipeline: Pipeline, folder: Path, precision: str, end: Array) -> Golden:
    module = pipeline.autoencoder()
    golden = vae_golden(module, end, pipeline.latent)
    cast_to_precision(module, precision)
    decoder = Graph(DecoderGraph(module), {"latents": _two_rows(golden["decoder_latents"])}, ("image",))
    encoder = Graph(EncoderGraph(module), {"image": _two_rows(golden["image"])}, ("latents",))
    for name, graph in ((VAE_DECODER, decoder), (VAE_ENCODER, encoder)):
        with WeightFile((folder / name).parent) as weights:
            weights.write(weights.externalise(to_onnx(graph)), Path(name).name)
    return golden


def _two_rows(values: npt.NDArray[np.generic]) -> torch.Tensor:
    """`values` with two rows: an example input of one row would fix the batch size at 1."""
    return torch.from_numpy(values if len(values) == 2 else np.concatenate([values, values]))


def verify(bundle: Bundle) -> dict[str, list[PartReport]]:
    """Compare every graph in ONNX Runtime with the golden tensors, transformers in every variant of the bundle.

    Raises EngineFailed for a part that is out of tolerance.
    """
    engine, golden = resolve("onnxruntime"), load_golden(bundle)
    reports: dict[str, list[PartReport]] = {engine.variant: verify_bundle(bundle, engine)}
    max_depth = bundle.manifest.model.depths[-1]
    for variant in get_args(GraphVariant):
        if variant not in reports and transformer_name(max_depth, variant) in bundle.manifest.files:
            reports[variant] = verify_transformers(bundle, replace(engine, variant=variant), golden)
    reports[engine.variant] += verify_step(bundle, engine)
    for variant, parts in reports.items():
        require_ok(parts, f"{engine.name} ({variant} variant)")
    return reports


class _Tasks:
    """Measures the time of each task and reports progress: `with tasks("decoder"): ...`."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._total = progress, total

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._progress(name, len(self.seconds), self._total)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self._progress(name, len(self.seconds), self._total)


def check_arguments(
    out: Path | None,
    depth: int | None,
    precision: str | None,
    force: bool,
    quantisation: QuantisationOptions | None,
) -> None:
    """Check the arguments of `export_bundle` as far as possible without the model; None is the default. Raises BadInput."""
    if depth is not None and depth < 1:
        raise BadInput(f"expected a depth of 1 or more, found {depth}")
    if precision is not None and precision not in TOLERANCES:
        raise BadInput(f"expected a precision of {', '.join(TOLERANCES)}, found {precision!r}")
    if quantisation is not None:
        quantisation.check(precision)
    if out is not None:
        check_output_folder(out, force)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
