"""Quantisation: the layers, the grids, calibration, the graphs, the report, and the deletion of rejected bundles."""

import copy
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny import make_tiny, make_tiny_classes
from torch import nn

from tpx_export import checkpoint, exporter
from tpx_export.cli import main
from tpx_export.exporter import Summary, export_bundle, least_bytes
from tpx_export.golden import text_golden
from tpx_export.graphs import Graph
from tpx_export.model import (
    MMDiT,
    TextToImage,
    ThinkingSpec,
)
from tpx_export.model.conditions import Modulation
from tpx_export.model.mmdit import MMDiTSpec
from tpx_export.pipeline import Pipeline
from tpx_export.quantise import measure, quantiser, speed
from tpx_export.quantise import score as scoring
from tpx_export.quantise.activation_grid import BINS, QMAX, MagnitudeHistogram
from tpx_export.quantise.calibration import SEED, CalibrationInputs, HistogramAndGram, collect_activations
from tpx_export.quantise.layers import Layers, block_linears, encoder_linears, modulations
from tpx_export.quantise.linear import QuantisedLinear, replace_layers
from tpx_export.quantise.pack import pack_int4
from tpx_export.quantise.prompts import PromptFile, choose_subjects, default_prompts
from tpx_export.quantise.quantiser import QuantisationOptions
from tpx_export.quantise.report import DepthReport, NotScored, Report, ScoreReport, SpeedReport, as_text
from tpx_export.quantise.verdict import Refused, rejection
from tpx_export.quantise.weight_grid import (
    INT8,
    INT8_BY_INT8,
    WeightGrid,
    dequantise_weight,
    int4,
    int4_grid,
    quantise_weight,
)
from tpx_export.tracing import to_onnx
from tpx_runtime.bundle import CONDITIONS, Bundle, transformer_name
from tpx_runtime.engine import ENGINES, resolve
from tpx_runtime.errors import EngineFailed
from tpx_runtime.evaluation.statistics import Estimate
from tpx_runtime.generator import Generator
from tpx_runtime.noise import batch_noise
from tpx_runtime.prompts import read_prompt_lines
from tpx_runtime.sampling.flow import FLOW_SAMPLERS
from tpx_runtime.verify import verify_bundle

# Of the tiny model, which has three blocks; the last one computes no text after its attention.
LAYERS = {
    *(f"blocks.{b}.visual.{part}" for b in range(3) for part in ("qkv", "proj", "mlp_in", "mlp_out")),
    *(f"blocks.{b}.text.{part}" for b in range(2) for part in ("qkv", "proj", "mlp_in", "mlp_out")),
    "blocks.2.text.qkv",
}


def one_block() -> TextToImage:
    """A model smaller than the tiny one, for tests that do not check the exported graphs."""
    spec = make_tiny(ThinkingSpec(blocks=(0,), experts=3, rank=4, max_depth=1)).spec
    torch.manual_seed(0)
    model = TextToImage(replace(spec, transformer=replace(spec.transformer, blocks=1)))
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval().requires_grad_(False)


def entry_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


# Selected layers


def test_selects_the_expected_layers(tiny_model: TextToImage) -> None:
    transformer = tiny_model.transformer
    assert set(block_linears(transformer)) == LAYERS
    streams = {f"blocks.{b}.{stream}.modulation" for b in range(3) for stream in ("visual", "text")}
    assert set(modulations(transformer)) == streams | {"out_modulation"}
    linears = {f"layers.0.{part}" for part in ("qkv", "proj", "mlp_in", "mlp_out")}
    assert set(encoder_linears(tiny_model.text_encoder)) == linears


def test_selects_the_second_attention_of_dual_blocks(tiny_model: TextToImage) -> None:
    spec = MMDiTSpec(**{**vars(tiny_model.spec.transformer), "dual_blocks": (1,), "thinking": None})
    assert set(block_linears(MMDiT(spec))) == LAYERS | {"blocks.1.second.qkv", "blocks.1.second.proj"}


# The grid


@pytest.mark.parametrize("grid", [INT8, INT8_BY_INT8])
def test_quantised_weights_are_within_half_a_step(grid: WeightGrid) -> None:
    weight = (
        torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 48)[:, None]
    )
    weight[7] = 0
    values, steps = quantise_weight(weight, grid)
    assert (values.dtype, values.shape, steps.shape) == (torch.int8, (64, 48), (48,))
    assert (values.float() * steps - weight.t()).abs().le(steps * 0.5001).all()
    # Each channel uses the whole grid.
    assert values.abs().amax(0)[weight.any(1)].eq(grid.highest).all()
    assert not values[:, 7].any() and torch.isfinite(steps).all()


def test_int4_weights_use_the_whole_grid_in_each_group() -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=rng) * torch.logspace(-4, 3, 48)[:, None]
    weight[7, 16:32] = 0
    values, steps = quantise_weight(weight, int4(16))
    assert (values.dtype, values.shape, steps.shape) == (torch.int8, (64, 48), (4, 48))
    assert (values.min(), values.max()) == (-8, 7) and torch.isfinite(steps).all()
    values, groups = values.t().unflatten(1, (4, 16)), weight.unflatten(1, (4, 16))
    found = values * steps.t().unsqueeze(2)
    assert not values[7, 1].any()
    some = groups.any(2)
    assert values[some].amin(1).eq(-8).all()  # the largest in magnitude, which is exact
    torch.testing.assert_close(found.abs().amax(2), groups.abs().amax(2))
    # All others are within half a step, or a whole one at the end of the grid.
    errors = (found - groups).abs() / steps.t().abs().unsqueeze(2)
    assert errors[values < 7].max() <= 0.5001 and errors.max() <= 1.0001
    assert 0.2 < errors[some].mean() < 0.3


@pytest.mark.parametrize(
    ("width", "group"), [(1536, 128), (2432, 128), (192, 64), (96, 32), (48, 16), (40, None), (7, None)]
)
def test_groups_divide_the_width(width: int, group: int | None) -> None:
    grid = int4_grid(width)
    assert (grid and grid.group) == group


def test_histogram_counts_all_values_while_its_range_grows() -> None:
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(4, 100, generator=rng) * size for size in (0.01, 1, 0.1, 100)]
    histogram = MagnitudeHistogram()
    for part in parts:
        histogram.add(part)
    values = torch.cat(parts).abs()
    assert histogram.counts.sum() == values.numel()
    assert histogram.max == values.max() and histogram.max <= histogram.range_max
    for share in (0.25, 0.5, 0.9):
        quantile = float(values.quantile(share))
        below = histogram.counts[: int(quantile / histogram.range_max * BINS) + 1].sum() / values.numel()
        assert below >= share - 0.01


def test_percentile_and_mse_step_sizes_ignore_outliers() -> None:
    histogram = MagnitudeHistogram()
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, torch.tensor([30.0])])
    histogram.add(values)
    assert histogram.step_size("max") * QMAX == pytest.approx(30)
    assert histogram.step_size("percentile") * QMAX == pytest.approx(3.9, abs=0.5)

    def error(step: float) -> float:
        return float(((values / step).round().clamp(-QMAX, QMAX) * step - values).square().mean())

    assert error(histogram.step_size("mse")) < 0.9 * min(
        error(histogram.step_size("max")), error(histogram.step_size("percentile"))
    )
    assert error(histogram.step_size("mse")) < 1.02 * min(error(end / QMAX) for end in np.arange(2, 30, 0.1))


def test_histogram_of_zeros_has_step_1_and_nan_is_rejected() -> None:
    histogram = MagnitudeHistogram()
    histogram.add(torch.zeros(3))
    assert [histogram.step_size(rule) for rule in ("max", "percentile", "mse")] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="finite activations"):
        histogram.add(torch.tensor([1.0, float("nan")]))


# Calibration


# Guidance in two of four steps.
INTERVAL = (0.3, 0.8)


@pytest.fixture(scope="module")
def calibrated(tiny_model: TextToImage) -> tuple[Pipeline, dict[int, dict[str, MagnitudeHistogram]]]:
    """The pipeline, and the histograms of each layer at depths 1 and 3, collected separately."""
    pipeline = Pipeline.from_model(tiny_model)
    pipeline = replace(pipeline, defaults=replace(pipeline.defaults, guidance_interval=INTERVAL))
    calibration = CalibrationInputs(("a red cube", "a green cube on a sphere"))
    calibration.add_text_encoder(pipeline.text[0], pipeline.text[0].load())
    found = {}
    for depth in (1, 3):
        transformer = pipeline.transformer()
        layers = block_linears(transformer)
        found[depth] = {name: MagnitudeHistogram() for name in layers}
        collect_activations(transformer, layers, found[depth], pipeline, calibration.rows(pipeline), depth)
        assert not any(layer._forward_pre_hooks for layer in layers.values())
    return pipeline, found


def test_calibration_ranges_cover_whole_guided_trajectories(
    tiny_model: TextToImage, calibrated: tuple[Pipeline, dict[int, dict[str, MagnitudeHistogram]]]
) -> None:
    """A sampling loop written out here records the largest input of every layer over all steps and both branches."""
    pipeline, found = calibrated
    [tokenizer] = [part.tokenizer() for part in pipeline.text]
    defaults, largest = pipeline.defaults, dict.fromkeys(LAYERS, 0.0)
    transformer = copy.deepcopy(tiny_model.transformer)

    def record_largest(name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            largest[name] = max(largest[name], float(inputs[0].abs().max()))

        return hook

    for name in LAYERS:
        transformer.get_submodule(name).register_forward_pre_hook(record_largest(name))
    for row, prompt in enumerate(("a red cube", "a green cube on a sphere"), start=1):
        ids = torch.tensor([tokenizer.encode_empty().ids, tokenizer.encode(prompt).ids])
        context, pooled = tiny_model.text_encoder(ids)

        def velocity(
            x: np.ndarray, timestep: float, context: torch.Tensor = context, pooled: torch.Tensor = pooled
        ) -> np.ndarray:
            latents = torch.from_numpy(np.concatenate([x, x]).astype(np.float32))
            out, _ = transformer(latents, torch.full((2,), timestep), context, pooled, 3)
            unconditional, conditional = out.numpy()
            guided = INTERVAL[0] <= timestep / 1000 <= INTERVAL[1]
            return (
                unconditional + defaults.guidance * (conditional - unconditional) if guided else conditional
            )[None]

        sampler = FLOW_SAMPLERS[defaults.sampler]
        noise = batch_noise([SEED + row], pipeline.model.latent_shape)
        assert len(list(sampler.sample(velocity, noise, sampler.schedule(defaults.steps, 1.0)))) == 4
    for name, histogram in found[3].items():
        assert histogram.max == pytest.approx(largest[name], rel=1e-4)


def test_each_depth_has_its_own_ranges(
    calibrated: tuple[Pipeline, dict[int, dict[str, MagnitudeHistogram]]],
) -> None:
    """So all depths are calibrated: layers after a block that thinks longer get other inputs."""
    shallow, deep = (calibrated[1][depth] for depth in (1, 3))
    assert shallow["blocks.0.visual.proj"].max != deep["blocks.0.visual.proj"].max
    assert shallow["blocks.0.visual.qkv"].counts.sum() == deep["blocks.0.visual.qkv"].counts.sum()


def test_calibration_with_classes() -> None:
    pipeline = Pipeline.from_model(make_tiny_classes(40))
    subjects = choose_subjects(pipeline)
    assert not set(subjects.calibration) & set(subjects.comparison)
    assert set(subjects.calibration) <= set(range(pipeline.model.classes))
    rows = CalibrationInputs(subjects.calibration).rows(pipeline)
    # The null class.
    assert rows["class_id"][0] == pipeline.model.classes
    transformer = pipeline.transformer()
    layers = block_linears(transformer)
    histograms = {name: MagnitudeHistogram() for name in layers}
    collect_activations(transformer, layers, histograms, pipeline, rows, 2)
    assert all(one.max > 0 for one in histograms.values())


def test_default_prompts_use_words_that_the_model_knows(tiny_model: TextToImage) -> None:
    pipeline = Pipeline.from_model(tiny_model)
    # This model does not know the words of the captions, so its prompts are random words of its vocabulary.
    assert all(default_prompts(pipeline, 4))
    from samples.shapes.captions import vocabulary

    [part] = pipeline.text
    vocabulary_of_captions = {
        **part.vocabulary,
        "tokens": ["<pad>", "<bos>", "<eos>", "<unk>", *vocabulary()],
    }
    with_caption_words = replace(
        pipeline, text=(replace(part, vocabulary={**vocabulary_of_captions, "text_tokens": 24}),)
    )
    subjects = choose_subjects(with_caption_words)
    assert len({*subjects.calibration, *subjects.comparison}) == 16
    assert subjects == choose_subjects(with_caption_words)


def test_models_whose_image_takes_minutes_get_one_subject() -> None:
    pipeline = Pipeline.from_model(make_tiny_classes(40))
    model = replace(pipeline.model, visual_tokens=1024)
    for steps, count in ((28, 1), (1, 8)):
        defaults = replace(pipeline.defaults, steps=steps)
        large = replace(pipeline, model=model, blocks=24, width=1536, defaults=defaults)
        assert len(choose_subjects(large).calibration) == count


# Quantised layers and their graphs


def test_int8_layer_is_close_to_the_float32_layer() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = layer(x)
        close = (QuantisedLinear(layer, 4 / QMAX)(x) - expected).abs().max() / expected.abs().max()
        closer = (QuantisedLinear(layer, None)(x) - expected).abs().max() / expected.abs().max()
        coarse = (QuantisedLinear(layer, 1.0)(x) - expected).abs().max() / expected.abs().max()
    assert closer < close < 0.03 < coarse


@pytest.mark.parametrize(("width", "error"), [(192, 0.15), (40, 0.01)])
def test_int4_layer_is_close_and_falls_back_to_int8(width: int, error: float) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(width, 48), torch.randn(2, 5, width)
    with torch.no_grad():
        expected = layer(x)
        found = QuantisedLinear(layer, None, bits=4)(x)
    assert error / 10 < (found - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_largest_products_do_not_saturate(name: str, tmp_path: Path) -> None:
    """On CPUs without VNNI sums of two products have 16 bits, which is too few for weights of 127 steps."""
    step, linear = 1 / 16, nn.Linear(128, 16, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1)
        linear.weight[::2] = -1
    layer = QuantisedLinear(linear, step)
    assert layer.weight.abs().eq(64).all()
    ir_model = to_onnx(Graph(layer, {"x": torch.zeros(2, 128)}, ("y",)))
    onnx_ir.save(ir_model, tmp_path / "product.onnx")
    x = torch.tensor([127.0, -128.0]).mul(step).unsqueeze(1).repeat(1, 128)
    found = resolve(name).open(tmp_path / "product.onnx").run({"x": x.numpy()})["y"]
    np.testing.assert_allclose(found, layer(x).numpy(), rtol=1e-5)


class Twice(nn.Module):
    """A layer in int4 that is used twice, and one in int8."""

    def __init__(self) -> None:
        super().__init__()
        self.four, self.eight = (QuantisedLinear(nn.Linear(192, 192), None, bits) for bits in (4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.four(self.eight(self.four(x)))
        return output


def test_int4_weights_are_stored_in_half_a_byte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Twice(), torch.randn(2, 5, 192)
    model = to_onnx(Graph(module, {"x": x}, ("y",)))
    stored = {name: value for name, value in model.graph.initializers.items() if name.endswith("weight")}
    assert {name: str(value.dtype) for name, value in stored.items()} == {
        "four.weight": "INT4",
        "eight.weight": "INT8",
    }
    tensor = stored["four.weight"].const_value
    assert tensor is not None and tensor.nbytes == len(tensor.tobytes()) == 192 * 192 / 2
    assert pack_int4(model) == 0  # nothing is left to do
    onnx_ir.save(model, tmp_path / "twice.onnx")
    onnx.checker.check_model(str(tmp_path / "twice.onnx"), full_check=True)
    with torch.no_grad():
        expected = module(x).numpy()
    for name in ("onnxruntime", "openvino"):
        found = resolve(name).open(tmp_path / "twice.onnx").run({"x": x.numpy()})["y"]
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_packing_counts_weights_and_keeps_their_meaning() -> None:
    torch.manual_seed(0)
    values, steps = quantise_weight(torch.randn(8, 64), int4(32))
    constants = {"w": values.numpy(), "s": steps.numpy()}
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "s"], [output], axis=0, block_size=32)
        for output in ("y", "z")
    ]
    ports = [onnx.helper.make_tensor_value_info(name, 1, [64, 8]) for name in ("y", "z")]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    opset = [onnx.helper.make_opsetid("", 21)]
    graph = onnx.helper.make_graph(nodes, "weights", [], ports, tensors)
    before = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    model = onnx_ir.from_proto(before)
    assert pack_int4(model) == 1
    after = onnx_ir.to_proto(model)
    assert onnx.numpy_helper.to_array(after.graph.initializer[0]).dtype == ml_dtypes.int4
    outputs = [ReferenceEvaluator(one).run(None, {}) for one in (before, after)]
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(outputs[0][0], dequantise_weight(values, steps))


def test_graph_is_symmetric_int8_only_in_the_selected_layers(
    int8_export: tuple[Path, Summary], tiny_model: TextToImage
) -> None:
    parameters = {
        f"transformer.{name}": value.numpy() for name, value in tiny_model.transformer.named_parameters()
    }
    for path in (int8_export[0] / transformer_name(2), int8_export[0] / transformer_name(2, "plain")):
        graph, stored = onnx.load(path).graph, tensors(path)
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("QuantizeLinear") == len(LAYERS)
        assert kinds.count("DequantizeLinear") == 2 * len(LAYERS)
        producers = {node.output[0]: node for node in graph.node}
        for node in graph.node:
            if node.op_type == "QuantizeLinear":
                scale, zero = (stored[name] for name in node.input[1:])
                assert scale.shape == zero.shape == () and scale > 0
                assert zero.dtype == np.int8 and zero == 0
        weights = {name for name, value in stored.items() if value.dtype == np.int8 and value.ndim == 2}
        assert {name.removeprefix("transformer.").removesuffix(".weight") for name in weights} == LAYERS
        for node in graph.node:
            if node.op_type == "MatMul" and (producer := producers.get(node.input[1])) is not None:
                if producer.op_type != "DequantizeLinear":
                    continue
                attributes = {one.name: onnx.helper.get_attribute_value(one) for one in producer.attribute}
                assert attributes == {"axis": 1, "block_size": 0}
                name = producer.input[0].removesuffix(".weight")
                values, step = (stored[given] for given in producer.input[:2])
                original = parameters[f"{name}.weight"].T
                np.testing.assert_allclose(step, np.abs(original).max(axis=0) / 64, rtol=1e-6)
                assert np.abs(values).max() == 64
                assert np.abs(values * step - original).max() < 3 * step.max()
                assert producers[node.input[0]].op_type == "DequantizeLinear"
        float32_names = [name for name in stored if ".thinking." in name or ".gate." in name]
        assert len([name for name in float32_names if name.endswith((".a", ".b"))]) == 4
        for name in float32_names:
            np.testing.assert_array_equal(stored[name], parameters[name])
    assert not [v for v in tensors(int8_export[0] / CONDITIONS).values() if v.dtype == np.int8]
    _check_rounding(
        tensors(int8_export[0] / transformer_name(2)), block_linears(tiny_model.transformer), INT8_BY_INT8
    )


def test_cpu_engines_match_pytorch_in_int8(
    int8_export: tuple[Path, Summary], tiny_model: TextToImage
) -> None:
    """Much closer than int8 is to float32, so the graph computes what the layers do."""
    out, _ = int8_export
    pipeline = Pipeline.from_model(tiny_model)
    calibration = CalibrationInputs(choose_subjects(pipeline).calibration)
    calibration.add_text_encoder(pipeline.text[0], pipeline.text[0].load())
    transformer = pipeline.transformer()
    layers = block_linears(transformer)
    records = {name: HistogramAndGram() for name in layers}
    for depth in (1, 2):
        collect_activations(transformer, layers, records, pipeline, calibration.rows(pipeline), depth)
    steps = {name: record.histogram.step_size("mse") for name, record in records.items()}
    replace_layers(transformer, layers, steps, grams={name: record.gram for name, record in records.items()})
    golden = np.load(out / "golden/golden.npz")
    inputs = {name: golden[name] for name in ("latents", "conditions", "context")}
    with torch.no_grad():
        expected = transformer.denoise(*map(torch.from_numpy, inputs.values()), 2)[0].numpy()
    for name in ("onnxruntime", "openvino"):
        engine = resolve(name)
        found = engine.open(out / transformer_name(2, engine.variant)).run(inputs)["velocity"]
        assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-3
    loss = np.abs(expected - golden["velocity_2"]).max() / np.abs(expected).max()
    assert 1e-3 < loss < 6e-2


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_cpu_engines_are_within_the_int8_tolerances(int8_export: tuple[Path, Summary], name: str) -> None:
    bundle = Bundle.open(int8_export[0])
    assert bundle.manifest.precision == "int8"
    reports = verify_bundle(bundle, resolve(name))
    assert all(report.ok for report in reports)
    assert {r.tolerance for r in reports if not r.part.startswith("transformer")} == {1e-4}


def test_onnx_runtime_multiplies_in_int8(int8_export: tuple[Path, Summary], tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    path = str(int8_export[0] / transformer_name(2, "plain"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
    kinds = [node.op_type for node in optimised.graph.node]
    assert kinds.count("MatMulIntegerToFloat") == len(LAYERS)
    assert "DequantizeLinear" not in kinds


def test_bundle_generates_and_its_report_compares_it_with_fp32(int8_export: tuple[Path, Summary]) -> None:
    out, summary = int8_export
    [image] = Generator.load(out, engine="onnxruntime")("a red cube")
    assert np.asarray(image).std() > 0
    report = summary.quantisation
    assert report is not None
    assert (report.precision, report.layers) == ("int8", len(LAYERS))
    assert [one.depth for one in report.depths] == [1, 2]
    for one in report.depths:
        # There are 4 steps per image.
        assert one.calls == 4 * one.images
        assert 0 < one.error_median <= one.error_worst < 0.1
        assert one.agreement is not None and one.agreement > 0.95
        assert 30 < one.psnr_worst_db <= one.psnr_median_db
    assert {one.engine for one in report.speeds} >= {"onnxruntime", "openvino"}
    text = as_text(report)
    assert "PSNR" in text and "images per depth, all in onnxruntime" in text
    assert "score: not measured, this model does not know the words of the shapes world" in text


# Weights only


@pytest.mark.parametrize(
    ("precision", "kind", "share"), [("int8-weights", np.int8, 0.4), ("int4-weights", ml_dtypes.int4, 0.33)]
)
def test_weight_only_precisions_store_all_large_weights_in_few_bits(
    tiny_model: TextToImage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    kind: Any,
    share: float,
) -> None:
    # Where OpenVINO must not cache what it compiles of the temporary bundles.
    monkeypatch.setenv("TPX_ENGINES", str(tmp_path / "engines"))
    graphs_in_fp32: list[str] = []

    def complete(fp32: Path, *others: Any) -> Bundle:
        bundle = quantiser.complete_fp32_bundle(fp32, *others)
        graphs_in_fp32.extend(path.name for path in (fp32 / "transformer").glob("*.onnx"))
        return bundle

    monkeypatch.setattr(exporter, "complete_fp32_bundle", complete)
    progress: list[tuple[int, int]] = []
    summary = export_bundle(
        Pipeline.from_model(tiny_model),
        tmp_path / "w",
        depth=1,
        precision=precision,
        quantisation=QuantisationOptions(accept_loss=True),
        progress=lambda task, done, total: progress.append((done, total)),
    )
    assert sorted(graphs_in_fp32) == ["conditions.onnx", "depth-1.onnx", "depth-1.plain.onnx"]
    assert progress[-1][0] == progress[-1][1]
    assert summary.quantisation.trajectories == (precision == "int4-weights")
    assert summary.quantisation is not None and summary.quantisation.layers == len(LAYERS) + 7 + 4
    sizes = [
        *summary.quantisation.sizes.values(),
        (summary.folder_bytes["vae_decoder"], summary.folder_bytes["vae_encoder"]),
    ]
    assert least_bytes(Pipeline.from_model(tiny_model), precision) <= sum(map(sum, sizes))
    kinds: dict[str, set[str]] = {}
    for name in (transformer_name(1), CONDITIONS, "text_encoder/model.onnx"):
        graph = onnx.load(tmp_path / "w" / name).graph
        kinds[name] = {node.op_type for node in graph.node}
        assert "DequantizeLinear" in kinds[name] and "QuantizeLinear" not in kinds[name]
        large = {
            key: v for key, v in tensors(tmp_path / "w" / name).items() if v.ndim == 2 and v.size > 2**12
        }
        embedders = ("transformer.time.", "transformer.pooled.")
        assert all(v.dtype == kind for key, v in large.items() if not key.startswith(embedders))
    encoder = tensors(tmp_path / "w" / "text_encoder/model.onnx").values()
    assert [v.dtype for v in encoder if v.dtype in (np.int8, ml_dtypes.int4) and v.ndim == 2] == [np.int8] * 4
    float_bytes = 4 * sum(p.numel() for p in tiny_model.transformer.parameters())
    assert (tmp_path / "w/transformer/weights.data").stat().st_size < share * float_bytes
    layers = {**block_linears(tiny_model.transformer), **modulations(tiny_model.transformer)}
    stored = {**tensors(tmp_path / "w" / transformer_name(1)), **tensors(tmp_path / "w" / CONDITIONS)}
    values = sum(v.size for v in stored.values() if v.dtype == kind and v.ndim == 2)
    assert values == sum(layer.weight.numel() for layer in layers.values())
    if precision == "int4-weights":
        _check_rounding(stored, layers)
    plain = tensors(tmp_path / "w" / transformer_name(1, "plain"))
    assert all(value.dtype != np.float16 for value in plain.values())
    for variant in ("operator", "fused"):
        _check_graph_for_gpus(tmp_path / "w" / transformer_name(1, variant), plain, kind)
    assert entry_names(tmp_path) == ["w"]
    for engine in (
        resolve("onnxruntime"),
        replace(resolve("onnxruntime"), variant="fused"),
        replace(resolve("onnxruntime"), variant="operator"),
        resolve("openvino"),
    ):
        reports = verify_bundle(Bundle.open(tmp_path / "w"), engine)
        assert all(report.ok for report in reports)
    assert {r.tolerance for r in reports if r.part.startswith("vae")} == {1e-4}


def _check_rounding(stored: dict[str, np.ndarray], layers: Layers, grid: WeightGrid | None = None) -> None:
    """Weights are not simply rounded, to int4 or the `grid`, but for the inputs of calibration."""
    for name, layer in layers.items():
        suffix = "product.weight" if isinstance(layer, Modulation) else "weight"
        plain, _ = quantise_weight(
            layer.weight.detach(), grid or cast(WeightGrid, int4_grid(layer.in_features))
        )
        share = (stored[f"transformer.{name}.{suffix}"].astype(np.int8) != plain.numpy()).mean()
        assert 0.02 < share < 0.9, name


def _check_graph_for_gpus(path: Path, others: dict[str, np.ndarray], kind: Any) -> None:
    """It computes in float16 with the same quantised weights, which are stored once."""
    nodes, stored = onnx.load(path, load_external_data=False).graph.node, tensors(path)
    weights = {name: value for name, value in stored.items() if value.dtype == kind and value.ndim == 2}
    assert len(weights) == len(LAYERS)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, others[name])
    steps = [stored[node.input[1]] for node in nodes if node.op_type == "DequantizeLinear"]
    assert len(steps) == len(LAYERS) and all(array.dtype == np.float16 for array in steps)
    products = [stored.get(node.input[1]) for node in nodes if node.op_type == "MatMul"]
    float32 = [array for array in products if array is not None and array.dtype == np.float32]
    assert len(float32) == 2 * 2  # of the gates


@pytest.mark.parametrize(("limit_s", "calls"), [(0.0, 1 + 5), (1e9, 3 + 41)])
def test_slow_models_are_timed_in_few_rounds(
    limit_s: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_MAX_SECONDS", limit_s)
    counts = [0, 0]

    def session(number: int) -> SimpleNamespace:
        return SimpleNamespace(run=lambda inputs: counts.__setitem__(number, counts[number] + 1))

    speed.time_interleaved([session(0), session(1)], {})
    assert counts == [calls, calls]


# Rejections


def with_outliers(model: TextToImage) -> TextToImage:
    """Make int8 fail where float32 works: one channel is huge before layers whose weights for it are zero."""
    with torch.no_grad():
        for block in model.transformer.blocks:
            for stream in (block.visual, block.text):
                if not hasattr(stream, "proj"):
                    continue
                width = stream.proj.in_features
                # The gates of attention and MLP.
                for gate in (2, 5):
                    stream.modulation.bias[gate * width : (gate + 1) * width] = 1
                stream.mlp_in.bias[0], stream.mlp_out.weight[:, 0] = 1e4, 0
                stream.mlp_in.weight[0] = 0
                stream.qkv.bias[2 * width], stream.proj.weight[:, 0] = 1e4, 0
    return model


def test_rejects_a_model_with_outliers(tmp_path: Path) -> None:
    pipeline = Pipeline.from_model(with_outliers(one_block()))
    with pytest.raises(EngineFailed, match=r"transformer depth 1 with a relative error of .*tolerance 6e-02"):
        export_bundle(
            pipeline,
            tmp_path / "x",
            depth=1,
            precision="int8",
            quantisation=QuantisationOptions(accept_loss=True),
        )
    assert entry_names(tmp_path) == []


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 takes twice as long as fp32 in every engine."""
    monkeypatch.setattr(
        quantiser, "speed", lambda quantised, fp32, engine: SpeedReport(engine.name, 1, 2, 1.0, 2.0)
    )


@pytest.mark.usefixtures("slow")
def test_slower_bundle_is_rejected_and_deleted_unless_accepted(tmp_path: Path) -> None:
    ckpt, out = tmp_path / "model.pt", tmp_path / "bundle"
    checkpoint.save(one_block(), ckpt)
    arguments = ["--ckpt", str(ckpt), "--depth", "1", "--out", str(out), "--precision", "int8"]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (7, "")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "expected of int8" in line and "2.00 ms per call" in line and "--accept-loss" in line
    # The measurements behind the rejection are reported.
    assert "same route" in result.stderr and "PSNR" in result.stderr
    assert entry_names(tmp_path) == ["model.pt"]
    result = CliRunner().invoke(main, [*arguments, "--accept-loss"])
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert "accepted: expected of int8" in result.stderr
    assert entry_names(tmp_path) == ["bundle", "model.pt"]
    assert Bundle.open(out).manifest.precision == "int8"


REPORT = Report(
    precision="int8",
    layers=1,
    trajectories=1,
    depths=(DepthReport("a", 1, 1, 0.01, 0.02, None, 1, float("inf"), 40.0),),
    speeds=(SpeedReport("a", 1, 2, 10.0, 7.0), SpeedReport("b", 1, 2, 8.0, 9.0)),
    score=ScoreReport("ShapesEval", 100, "b", "a", 0.9, 0.895, Estimate(-0.005, -0.02, 0.01, 20)),
    sizes={"transformer": (100, 40)},
)


def test_verdict_on_score_speed_and_size() -> None:
    assert rejection(REPORT) is None
    assert rejection(replace(REPORT, score=NotScored("of a reason"))) is None
    assert isinstance(REPORT.score, ScoreReport)
    worse_score = replace(REPORT.score, change=Estimate(-0.02, -0.04, -0.01, 20))
    lossy = replace(REPORT, score=worse_score)
    assert "-2.0 points of ShapesEval in a (95% interval -4.0 to -1.0)" in str(rejection(lossy))
    few_images = replace(REPORT, score=replace(worse_score, change=Estimate(-0.02, -0.02, -0.02, 19)))
    for text in (str(rejection(few_images)), as_text(few_images)):
        assert "95% interval not known, too few images" in text
    assert "90.0 in fp32 in b, 89.5 quantised in a, -0.5 points" in as_text(REPORT)
    # int8 has to be faster than fp32 in its fastest engine.
    slower = replace(REPORT, speeds=(SpeedReport("a", 1, 2, 10.0, 8.5), SpeedReport("b", 1, 2, 8.0, 9.0)))
    assert "8.50 ms per call in a, while fp32 takes 8.00 ms in b" in str(rejection(slower))
    weight_only = replace(slower, precision="int8-weights")
    # Weight-only int8 is for size, not speed.
    assert rejection(weight_only) is None
    assert "50% of fp32's bytes" in str(rejection(replace(weight_only, sizes={"transformer": (100, 50)})))
    assert rejection(replace(weight_only, precision="int4-weights", sizes={"transformer": (100, 34)})) is None
    in_int4 = replace(weight_only, precision="int4-weights", sizes={"transformer": (100, 35)})
    assert "less than 35% of fp32's bytes, found 35%" in str(rejection(in_int4))
    assert "same" in as_text(REPORT) and "int8, ms" in as_text(REPORT)
    assert "int4-weights, ms" in as_text(replace(REPORT, precision="int4-weights"))


def test_score_is_paired_and_wrong_images_lower_it(
    int8_export: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, engines = Bundle.open(int8_export[0]), []
    questions = scoring._prompt_questions(4)[:8]
    results = iter([[True] * 8, [True, True, True, False] + [False, True, True, True]])

    def correct(generator: Generator, questions: object) -> list[bool]:
        engines.append(generator.engine.name)
        return next(results)

    monkeypatch.setattr(scoring, "questions_for", lambda generator, per_row: questions)
    monkeypatch.setattr(scoring, "_correct", correct)
    report = scoring.score(bundle, resolve("onnxruntime"), bundle, resolve("openvino"), 4)
    assert isinstance(report, ScoreReport)
    assert (report.images, report.fp32, report.quantised, report.change.smallest_row) == (8, 1.0, 0.75, 4)
    assert report.change.mean == -0.25 and report.change.low < -0.25 < report.change.high
    assert engines == ["openvino", "onnxruntime"] == [report.fp32_engine, report.quantised_engine]


def test_score_uses_the_fastest_engine_of_each_precision(
    int8_export: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 may be fastest in one engine and fp32 in another; a score in a third one would say nothing about either."""
    milliseconds = {"onnxruntime": (5.0, 9.0), "openvino": (8.0, 4.0), "openvino-bf16": (6.0, 6.0)}
    monkeypatch.setattr(quantiser, "available_engines", lambda: [ENGINES[name] for name in milliseconds])
    monkeypatch.setattr(quantiser, "resolve", ENGINES.get)  # also on a CPU without bf16
    monkeypatch.setattr(
        quantiser, "speed", lambda quantised, fp32, one: SpeedReport(one.name, 1, 2, *milliseconds[one.name])
    )
    monkeypatch.setattr(quantiser, "compare_with_fp32", lambda *_: None)
    monkeypatch.setattr(quantiser, "score", lambda *arguments: arguments)
    bundle, int8_quantiser = (
        Bundle.open(int8_export[0]),
        quantiser.Quantiser(Pipeline.from_model(one_block()), "int8", QuantisationOptions()),
    )
    score: Any = int8_quantiser.report(bundle, bundle, lambda task: nullcontext()).score
    assert [score[1].name, score[3].name] == ["openvino", "onnxruntime"]


def fake_class_generator(**facts: Any) -> Generator:
    """A fake class-conditional generator with what `questions_for` reads: its manifest has the given fields."""
    return cast(Generator, SimpleNamespace(text=None, manifest=SimpleNamespace(**facts)))


def test_reason_for_no_score_is_reported(
    int8_export: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(generator: Generator, per_row: int = 4) -> str:
        found = scoring.questions_for(generator, per_row)
        assert isinstance(found, NotScored)
        return found.reason

    shapes_generator = Generator(Bundle.open(int8_export[0]), resolve("onnxruntime"))
    assert "does not know the words" in reason(shapes_generator)
    assert "because of --score-prompts 0" in reason(shapes_generator, per_row=0)
    other_classes = fake_class_generator(name="dit", model=SimpleNamespace(classes=32))
    assert "the scene parser only knows the classes of shape-classes" in reason(other_classes)
    any_text = cast(
        Generator, SimpleNamespace(text=SimpleNamespace(tokenizers=[shapes_generator.text, object()]))
    )
    assert "the scene parser only knows the shapes world" in reason(any_text)
    monkeypatch.setitem(sys.modules, "samples.shapes.prompt_list", None)
    assert "in the folder samples of a checkout" in reason(shapes_generator)


def test_class_score_has_equally_many_images_of_each_shape() -> None:
    from samples.shapes.captions import caption
    from samples.shapes.classes import CLASSES, prompt_of_class

    questions = scoring.questions_for(
        fake_class_generator(name="shape-classes", model=SimpleNamespace(classes=32)), 12
    )
    assert isinstance(questions, list)
    assert Counter(question.row for question in questions) == dict.fromkeys(
        {shape for _, shape in CLASSES}, 12
    )
    assert len({(question.row, question.arguments["seed"]) for question in questions}) == 48
    for question in questions:
        assert question.row in caption(prompt_of_class(question.arguments["class_id"]))
        assert question.prompt.groups[0].shape == question.row


def test_comparison_with_fp32_finds_differences(int8_export: tuple[Path, Summary], tiny_bundle: Path) -> None:
    """fp32 compared with itself shows none, int8 shows small ones; a graph that cannot take the inputs is an error."""
    fp32, quantised, engine = Bundle.open(tiny_bundle), Bundle.open(int8_export[0]), resolve("onnxruntime")
    same = measure.compare_with_fp32(fp32, fp32, engine, 2, ["a red cube"])
    assert (same.error_worst, same.agreement, same.psnr_worst_db) == (0.0, 1.0, float("inf"))
    small = measure.compare_with_fp32(quantised, fp32, engine, 2, ["a red cube"])
    assert 0 < small.error_median < 0.02 and small.psnr_worst_db < float("inf")
    totals = measure.ComparisonTotals()
    mismatched = measure._PairedSession(
        engine.open(fp32.transformer(1, engine.variant)), engine.open(fp32.conditions), "velocity", totals
    )
    golden = np.load(tiny_bundle / "golden/golden.npz")
    with pytest.raises(EngineFailed):
        mismatched.run({name: golden[name] for name in fp32.manifest.model.transformer_inputs})


def test_rejects_invalid_int8_options(tiny_model: TextToImage, tmp_path: Path) -> None:
    ckpt = tmp_path / "model.pt"
    checkpoint.save(tiny_model, ckpt)
    classes = tmp_path / "classes.pt"
    checkpoint.save(make_tiny_classes(40), classes)
    good, bad, blank, latin = (tmp_path / name for name in ("good", "bad", "blank", "latin"))
    good.write_text("a red cube\n\na green cube\n", encoding="utf-8-sig")
    assert read_prompt_lines(good) == {1: "a red cube", 3: "a green cube"}
    bad.write_text("a red cube\n\na purple elephant\n")
    blank.write_text("\n \n")
    latin.write_bytes("a caf\xe9".encode("latin-1"))
    before = entry_names(tmp_path)
    for model, precision, option, reason in (
        (ckpt, "int8", ["--calibration", bad], r"bad, line 3: expected words .* found 'purple'"),
        (ckpt, "int8", ["--calibration", blank], "expected prompts in .*, one per line, found none"),
        (ckpt, "int8", ["--calibration", latin], "expected UTF-8 text"),
        (ckpt, "int8", ["--calibration", tmp_path / "none"], "expected a file of prompts, .*: No such file"),
        (classes, "int8", ["--calibration", good], "expected no prompts for a class-conditional model"),
        (ckpt, "int8-weights", ["--calibration", good], "expected no calibration prompts for int8-weights"),
        (
            ckpt,
            "fp16",
            ["--calibration", good],
            "--accept-loss only with precision int8, int8-weights, int4-weights, found fp16",
        ),
        (
            ckpt,
            "fp32",
            ["--accept-loss"],
            "expected --calibration, --score-prompts and --accept-loss only with",
        ),
        (ckpt, "int8", ["--score-prompts", "93"], "expected 0 to 92 prompts"),
        (
            ckpt,
            "int4",
            [],
            "expected a precision of fp32, fp16, int8, int8-weights, int4-weights, found 'int4'",
        ),
    ):
        arguments = ["--ckpt", model, "--precision", precision, "--out", tmp_path / "bundle", *option]
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 2, result.output
        [line] = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert re.search(reason, line), line
        assert entry_names(tmp_path) == before


def test_arguments_are_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda path: pytest.fail("a checkpoint was read"))
    prompts, existing = tmp_path / "prompts", tmp_path / "there"
    prompts.write_text("\n")
    existing.mkdir()
    for options, reason in (
        (("--depth", 0), "expected a depth of 1 or more, found 0"),
        (("--precision", "int4"), "expected a precision of fp32"),
        (
            ("--accept-loss",),
            "--score-prompts and --accept-loss only with precision int8, int8-weights, int4-weights, found no --precision",
        ),
        (("--precision", "int8", "--score-prompts", -1), "expected 0 to 92 prompts"),
        (("--precision", "int8", "--calibration", prompts), "one per line, found none"),
        (("--precision", "int8", "--calibration", tmp_path / "none"), "No such file"),
        (("--precision", "int8-weights", "--calibration", prompts), "expected no calibration prompts"),
        (("--out", existing), "expected a new folder"),
    ):
        result = CliRunner().invoke(main, ["--ckpt", "model.pt", *map(str, options)])
        assert result.exit_code == 2 and reason in result.stderr, result.output


def test_calibration_uses_the_prompt_file(tiny_model: TextToImage, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cube\n\n  two green sphere \n")
    pipeline = Pipeline.from_model(tiny_model)
    assert choose_subjects(pipeline, PromptFile(file)).calibration == ("a red cube", "two green sphere")


@pytest.mark.parametrize("named", [False, True])
def test_calibration_reads_a_pipe_once(tiny_model: TextToImage, tmp_path: Path, named: bool) -> None:
    ckpt, pipe = tmp_path / "model.pt", tmp_path / "pipe"
    checkpoint.save(tiny_model, ckpt)
    os.mkfifo(pipe)
    # A line that the model cannot read ends the export after the last reader of the prompts.
    python = f"{sys.executable} -c 'from tpx_export.cli import main; main()'"
    command = f"{python} --ckpt {ckpt} --precision int8 --out {tmp_path / 'bundle'} --calibration"
    lines = "printf 'a red cube\\n\\na purple cube\\n'"
    shell = f"{lines} > {pipe} & {command} {pipe}" if named else f"{lines} | {command} -"
    result = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=120)
    assert f"{pipe if named else '-'}, line 3: expected words" in result.stderr and result.returncode == 2


def test_interrupt_during_the_report_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "complete_fp32_bundle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(Pipeline.from_model(one_block()), tmp_path / "x", precision="int8")
    assert entry_names(tmp_path) == []


def test_calibration_prompts_are_encoded_in_float32(tiny_model: TextToImage) -> None:
    """Also those of a model stored in half precision."""
    pipeline = Pipeline.from_model(tiny_model)
    [part] = pipeline.text
    half = part.load().half()
    single = copy.deepcopy(half).float()
    of_half, of_single = CalibrationInputs(("a red cube",)), CalibrationInputs(("a red cube",))
    of_half.add_text_encoder(part, half)
    of_single.add_text_encoder(part, single)
    np.testing.assert_array_equal(of_half.text_outputs[0][0], of_single.text_outputs[0][0])
    name = f"{part.spec.folder}.context"
    np.testing.assert_array_equal(text_golden(part, half)[name], text_golden(part, single)[name])
    assert text_golden(part, half)[name].dtype == np.float32


def test_refused_exception_carries_the_summary() -> None:
    assert Refused("expected x, found y", "a summary").summary == "a summary"
