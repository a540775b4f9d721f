"""The naive baseline: `torch.onnx.export` of the model without this project's rewrites, in sessions with default options.

`export` needs torch and onnx and runs in a separate process; the sessions need only their engine. The operator
tpx::RoutedLora, which no engine implements, is replaced by masked standard operators.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from tpx_runtime.bundle import Bundle

from .process import MeasurementFailed
from .runner import Runner, Workload
from .sampling import BaselineGenerator

DENOISER_FILE = "transformer-depth-{depth}.onnx"


def export(ckpt: str, depths: Sequence[int], out: str) -> None:
    """Write the transformer of each depth, every text encoder (FOLDER.onnx) and vae_decoder.onnx into the folder `out`."""
    import torch

    from .baselines import Decoder, Denoiser, open_pipeline

    folder, pipeline = Path(out), open_pipeline(Path(ckpt))
    model, conditioning = pipeline.model, []
    for part in pipeline.text:
        encoder = part.load().eval()
        _write(encoder, [torch.from_numpy(part.ids)], folder / f"{part.spec.folder}.onnx")
    if model.classes:
        conditioning = [torch.zeros(2, dtype=torch.int64)]
    else:
        conditioning = [torch.zeros(2, *model.input_shapes[name]) for name in ("context", "pooled")]
    latents = torch.zeros(2, *model.latent_shape)
    for depth in depths:
        denoiser = Denoiser(pipeline, depth).eval()
        _write(
            denoiser,
            [latents, torch.full((2,), 500.0), *conditioning],
            folder / DENOISER_FILE.format(depth=depth),
        )
    _write(Decoder(pipeline).eval(), [latents], folder / "vae_decoder.onnx")


def _write(module: Any, example: Sequence[Any], path: Path) -> None:
    """Export with default options and a dynamic batch."""
    import warnings

    import onnx
    import onnx.inliner
    import torch

    from tpx_export.operator import OPSET, TRANSLATIONS, register_schema
    from tpx_export.routing import masked
    from tpx_export.tracing import dynamic_batch

    register_schema()
    operator = torch.ops.tpx.RoutedLora.default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic_batch(module, len(example)),
            custom_translation_table={operator: TRANSLATIONS[operator]},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    model.functions.append(masked())
    onnx.save(
        onnx.inliner.inline_local_functions(model),
        str(path),
        save_as_external_data=True,
        location=f"{path.name}.data",
    )


class _OnnxRuntime:
    """A session with default options."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        self._session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_inputs()]

    def __call__(self, *arrays: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
        outputs: Sequence[npt.NDArray[Any]] = self._session.run(
            None, dict(zip(self._names, arrays, strict=True))
        )
        return outputs


class _OpenVino:
    """A compiled model with default options except the precision."""

    def __init__(self, path: Path, precision: str) -> None:
        from tpx_runtime.engine.openvino import core

        capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in capabilities:
            raise MeasurementFailed(
                f"expected a CPU with bf16 for OpenVINO, found {', '.join(capabilities)}; leave it out"
            )
        hint = {"fp32": "f32", "bf16": "bf16"}[precision]
        self._model = core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": hint})

    def __call__(self, *arrays: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
        outputs = self._model(list(arrays))
        return [outputs[index].copy() for index in range(len(self._model.outputs))]


def naive_runner(workload: Workload, options: dict[str, Any]) -> Runner:
    """Run the exported files with options["framework"] in options["precision"]."""
    assert workload.export_folder is not None
    folder, bundle = workload.export_folder, Bundle.open(workload.bundle)

    def load(name: str) -> Any:
        path = folder / name
        return (
            _OnnxRuntime(path)
            if options["framework"] == "onnxruntime"
            else _OpenVino(path, options["precision"])
        )

    others = {encoder.folder: load(f"{encoder.folder}.onnx") for encoder in bundle.manifest.text_encoders}
    others["vae_decoder"] = load("vae_decoder.onnx")
    denoiser = load(DENOISER_FILE.format(depth=workload.depth))
    return Runner(BaselineGenerator(bundle, options["name"], denoiser, others), workload)
