"""Exported bundles: what they contain, agreement with PyTorch, and failed exports, which leave nothing behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from PIL import Image
from tiny import make_tiny
from torch import nn

from tpx_export import checkpoint, exporter, routing
from tpx_export.atomic_folder import atomic_folder
from tpx_export.cli import main, table
from tpx_export.exporter import Summary, export_bundle, least_bytes
from tpx_export.graphs import Graph
from tpx_export.model.conditions import GATE_WIDTH, ConditionProjection, Modulation, compute_conditions
from tpx_export.model.text_to_image import TextToImage
from tpx_export.operator import DOMAIN, NAME
from tpx_export.pipeline import Pipeline
from tpx_export.precision import TOLERANCES
from tpx_export.routing import MAX_MASKED_WORK, masked, routing_variants
from tpx_export.tracing import to_onnx
from tpx_runtime.bundle import CONDITIONS, Bundle, GraphVariant, transformer_name
from tpx_runtime.engine import ENGINES, resolve
from tpx_runtime.errors import BadInput, EngineFailed
from tpx_runtime.generator import Generator
from tpx_runtime.manifest import Defaults
from tpx_runtime.verify import verify_bundle

DEPTHS = (1, 2, 3)


def graph(bundle: Path, depth: int, variant: GraphVariant) -> onnx.ModelProto:
    return onnx.load(bundle / transformer_name(depth, variant), load_external_data=False)


def make_bundle(folder: Path) -> Path:
    """A folder that counts as a bundle, of another version."""
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text('{"format": "tpx-bundle", "version": 4}')
    return folder


def test_every_graph_is_compared_with_pytorch(tiny_export: tuple[Path, Summary]) -> None:
    reports, depths = tiny_export[1].reports, [f"transformer depth {depth}" for depth in DEPTHS]
    assert list(reports) == ["plain", "operator"]
    assert [report.part for report in reports["operator"]] == depths
    vae = ["vae_decoder", "vae_encoder"]
    assert [report.part for report in reports["plain"]] == [
        "text_encoder",
        "transformer conditions",
        *depths,
        *vae,
        "scheduler step",
    ]
    for variant in reports.values():
        for report in variant:
            assert report.tolerance <= 1e-4
            assert report.error <= report.tolerance
            assert report.routing_agreement in (None, 1.0)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_cpu_engines_pass_verification(tiny_bundle: Path, name: str) -> None:
    assert all(report.ok for report in verify_bundle(Bundle.open(tiny_bundle), resolve(name)))


def test_golden_transformer_tensors_match_the_model(tiny_bundle: Path, tiny_model: TextToImage) -> None:
    golden = np.load(tiny_bundle / "golden/golden.npz")
    inputs = [torch.from_numpy(golden[name]) for name in ("latents", "timestep", "context", "pooled")]
    for depth in DEPTHS:
        velocity, routes = tiny_model.transformer(*inputs, depth)
        np.testing.assert_allclose(velocity.numpy(), golden[f"velocity_{depth}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(routes.numpy(), golden[f"routes_{depth}"])
    conditions = tiny_model.transformer.conditions(inputs[1], inputs[3])
    np.testing.assert_allclose(conditions.numpy(), golden["conditions"], rtol=1e-5, atol=1e-6)
    # With a single expert for all tokens, routing would not be tested.
    assert len(np.unique(golden["routes_3"])) > 1


def test_generator_generates_the_image_of_pytorch(tiny_bundle: Path, tiny_model: TextToImage) -> None:
    """The whole path from prompt to pixels, compared with direct calls of the PyTorch modules."""
    from tpx_runtime.noise import batch_noise
    from tpx_runtime.sampling.flow import FLOW_SAMPLERS

    generator = Generator.load(tiny_bundle, engine="onnxruntime")
    [image] = generator("a red cube on a blue sphere", seed=5, steps=6, guidance=3.0, depth=3)
    assert generator.text is not None
    [tokenizer] = generator.text.tokenizers
    ids = torch.tensor([tokenizer.encode_empty().ids, tokenizer.encode("a red cube on a blue sphere").ids])
    context, pooled = tiny_model.text_encoder(ids)

    def velocity(x: np.ndarray, timestep: float) -> np.ndarray:
        latents = torch.from_numpy(np.concatenate([x, x]).astype(np.float32))
        out, _ = tiny_model.transformer(latents, torch.full((2,), timestep), context, pooled, 3)
        unconditional, conditional = out.numpy()
        return (unconditional + 3.0 * (conditional - unconditional))[None]

    sampler = FLOW_SAMPLERS["euler"]
    *_, x = sampler.sample(velocity, batch_noise([5], (4, 8, 8)), sampler.schedule(6, 1.0))
    expected = tiny_model.autoencoder.decode(torch.from_numpy(x.astype(np.float32)))[0]
    pixels = ((expected.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(image, np.float32) - pixels).max() <= 1


def test_golden_encoder_and_autoencoder_tensors_match_the_model(
    tiny_bundle: Path, tiny_model: TextToImage
) -> None:
    golden = {
        name: torch.from_numpy(array) for name, array in np.load(tiny_bundle / "golden/golden.npz").items()
    }
    context, pooled = tiny_model.text_encoder(golden["text_encoder.ids"])
    torch.testing.assert_close(context, golden["text_encoder.context"])
    torch.testing.assert_close(pooled, golden["text_encoder.pooled"])
    # With one encoder, its output is the transformer's conditioning.
    torch.testing.assert_close(context, golden["context"])
    torch.testing.assert_close(pooled, golden["pooled"])
    autoencoder = tiny_model.autoencoder
    torch.testing.assert_close(autoencoder.decoder(golden["decoder_latents"]).clamp(-1, 1), golden["image"])
    torch.testing.assert_close(autoencoder.encoder(golden["image"])[0], golden["encoder_latents"])


def test_edit_encodes_an_image_as_pytorch_does(tiny_bundle: Path, tiny_model: TextToImage) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    edit = Generator.load(tiny_bundle, engine="onnxruntime").edit(Image.fromarray(image))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(
        torch.from_numpy(edit.latents), tiny_model.autoencoder.encode(pixels), rtol=1e-4, atol=1e-4
    )


def test_all_depths_share_one_weight_file(tiny_bundle: Path) -> None:
    folder = tiny_bundle / "transformer"
    names = {path.name for path in folder.iterdir()}
    assert names == {"weights.data", "conditions.onnx"} | {
        Path(transformer_name(d, variant)).name for d in DEPTHS for variant in ("operator", "plain")
    }
    stored_ranges = set()
    for path in folder.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                location = {entry.key: entry.value for entry in tensor.external_data}
                assert location["location"] == "weights.data"
                stored_ranges.add((int(location["offset"]), int(location["length"])))
            else:
                assert len(tensor.raw_data) <= 1024
    assert sum(length for _, length in stored_ranges) <= (folder / "weights.data").stat().st_size
    parameters = sum(p.numel() for p in make_tiny(None).transformer.parameters())
    # No weight is stored twice.
    assert sum(length for _, length in stored_ranges) < 4 * parameters * 1.2


def test_nodes_of_the_operator_and_plain_variants(tiny_bundle: Path) -> None:
    for depth in DEPTHS:
        operator, plain = graph(tiny_bundle, depth, "operator"), graph(tiny_bundle, depth, "plain")
        routing_nodes = [
            node for node in operator.graph.node if (node.domain, node.op_type) == (DOMAIN, NAME)
        ]
        # There are two thinking blocks.
        assert len(routing_nodes) == 2 * depth
        for node in routing_nodes:
            # These attributes make TensorRT look for its plugin first.
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes == {"plugin_namespace": b"tpx", "aot": 1}
        assert [(f.domain, f.name) for f in operator.functions] == [(DOMAIN, NAME)]
        # TensorRT rejects NonZero, a model this small needs none on a CPU, and OpenVINO rejects functions.
        nodes = [*operator.graph.node, *operator.functions[0].node, *plain.graph.node]
        assert "NonZero" not in {node.op_type for node in nodes}
        assert not plain.functions
        assert {node.domain for node in plain.graph.node} == {""}
        onnx.checker.check_model(str(tiny_bundle / transformer_name(depth)))


@pytest.mark.parametrize(
    ("tokens", "gathers"), [(MAX_MASKED_WORK // 12, False), (MAX_MASKED_WORK // 12 + 1, True)]
)
def test_plain_variant_gathers_if_masking_wastes_too_much_work(
    tiny_bundle: Path, tokens: int, gathers: bool
) -> None:
    """With 3 experts of rank 4."""
    model = graph(tiny_bundle, 2, "operator")
    del model.functions[:]
    operator, plain = routing_variants(model, tokens)
    assert "NonZero" not in {node.op_type for node in operator.functions[0].node}
    assert ("NonZero" in {node.op_type for node in plain.graph.node}) == gathers


def test_conditions_and_depths_share_no_layer(tiny_bundle: Path) -> None:
    """Layers of the conditions graph, which runs once for all steps, are not repeated in the graph of a step."""
    conditions = onnx.load(tiny_bundle / CONDITIONS, load_external_data=False).graph
    step = graph(tiny_bundle, 3, "operator").graph
    assert [value.name for value in conditions.input] == ["timestep", "pooled"]
    assert [value.name for value in step.input] == ["latents", "conditions", "context"]
    names = [
        {tensor.name for tensor in found.initializer if len(tensor.dims) == 2} for found in (conditions, step)
    ]
    assert not names[0] & names[1]
    assert all(
        "modulation" in name or "time" in name or "pooled" in name or "gate.condition" in name
        for name in names[0]
    )
    assert not [name for name in names[1] if "modulation" in name or "gate.condition" in name]


class _ManyLayers(nn.Module):
    """As many adaLNs and expert gates as the largest Stable Diffusion 3.5 has, and more."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(40):
            self.layers += [Modulation(4, 2), ConditionProjection(4, 1, GATE_WIDTH), Modulation(4, 1)]

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return compute_conditions(self, y)


def test_conditions_of_many_layers_are_joined_in_few_at_a_time() -> None:
    """ONNX Runtime cannot capture a Concat of more than 32 inputs in a CUDA graph."""
    module, y = _ManyLayers(), torch.randn(2, 4)
    model = ir.to_proto(to_onnx(Graph(module, {"y": y}, ("conditions",))))
    assert max(len(node.input) for node in model.graph.node if node.op_type == "Concat") == 32
    [found] = ReferenceEvaluator(model).run(None, {"y": y.numpy()})
    act = torch.nn.functional.silu(y)
    expected = [
        layer(act)
        for kind in (Modulation, ConditionProjection)
        for layer in module.layers
        if type(layer) is kind
    ]
    np.testing.assert_allclose(found, torch.cat(expected, dim=-1).detach(), rtol=1e-5, atol=1e-6)


class _Chunks(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y.chunk(self.count, dim=-1)[-1].float()


def test_operations_are_translated_without_another_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decomposing them would take longer than the rest of an export."""
    monkeypatch.delattr(torch.export.ExportedProgram, "run_decompositions")
    model = to_onnx(Graph(_Chunks(2), {"y": torch.zeros(2, 4)}, ("z",)))
    assert [node.op_type for node in model.graph] == ["Split"]


def test_unequal_chunks_are_not_exported() -> None:
    with pytest.raises(Exception, match="only equal chunks are supported"):
        to_onnx(Graph(_Chunks(3), {"y": torch.zeros(2, 4)}, ("z",)))


def test_graphs_contain_no_paths_of_the_exporting_machine(tiny_bundle: Path) -> None:
    for path in tiny_bundle.rglob("*.onnx"):
        data = path.read_bytes()
        assert b".py" not in data
        assert str(Path.home()).encode() not in data


def test_dynamic_batch(tiny_bundle: Path) -> None:
    generator = Generator.load(tiny_bundle, engine="onnxruntime")
    for count in (1, 3, 5):
        assert len(generator("a red cube", num_images=count, steps=2)) == count


def test_fp16_graphs_have_float16_weights_but_no_float16_inputs_or_outputs(
    half_export: tuple[Path, Summary],
) -> None:
    out, summary = half_export
    assert all(report.ok for reports in summary.reports.values() for report in reports)
    assert TOLERANCES["fp16"].transformer < 0.02
    model = graph(out, 2, "operator")
    weight_types = {
        t.data_type for t in model.graph.initializer if len(t.dims) > 1 and ".gate." not in t.name
    }
    assert onnx.TensorProto.FLOAT16 in weight_types
    inputs_and_outputs = [*model.graph.input, *model.graph.output]
    assert onnx.TensorProto.FLOAT16 not in {value.type.tensor_type.elem_type for value in inputs_and_outputs}
    [image] = Generator.load(out, engine="onnxruntime")("a red cube")
    assert np.asarray(image).std() > 0


def test_exports_a_model_without_thinking(tmp_path: Path) -> None:
    export_bundle(Pipeline.from_model(make_tiny(None)), tmp_path / "base")
    bundle = Bundle.open(tmp_path / "base")
    assert bundle.manifest.model.depths == (1,)
    assert bundle.manifest.model.experts == 0
    assert len(Generator(bundle, ENGINES["onnxruntime"])("a red cube", steps=2)) == 1


def entry_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_pipeline_puts_copies_of_a_training_model_in_eval_mode(tiny_model: TextToImage) -> None:
    model = make_tiny(tiny_model.spec.transformer.thinking).train()
    pipeline = Pipeline.from_model(model)
    modules = (pipeline.transformer(), pipeline.autoencoder(), pipeline.text[0].load())
    assert not any(module.training for module in modules)
    assert model.transformer.training


SPECIAL = ("<pad>", "<bos>", "<eos>")


def with_vocabulary(model: TextToImage, vocabulary: tuple[str, ...], tokens: int) -> TextToImage:
    """A model like `model` with another vocabulary and number of text tokens."""
    spec = model.spec
    return TextToImage(
        replace(
            spec,
            text_encoder=replace(spec.text_encoder, vocabulary=vocabulary, tokens=tokens),
            transformer=replace(spec.transformer, context_tokens=tokens),
        )
    )


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "message"),
    [
        (("<pad>", "<eos>", "cube"), 12, "the token <bos>, found none in the vocabulary of tiny; correct it"),
        ((*SPECIAL, "cube", "cube"), 12, "unique tokens, found a duplicate in"),
        ((*SPECIAL, "cube"), 2, "text_tokens of at least 3, found 2 in"),
        (SPECIAL, 12, "words in the vocabulary of tiny, found only special tokens; correct it"),
    ],
)
def test_rejects_a_vocabulary_that_the_runtime_cannot_use(
    tiny_model: TextToImage, vocabulary: tuple[str, ...], tokens: int, message: str
) -> None:
    with pytest.raises(BadInput, match=f"^expected {message}"):
        Pipeline.from_model(with_vocabulary(tiny_model, vocabulary, tokens))


@pytest.mark.parametrize("tokens", [3, 4, 12])
def test_golden_ids_are_those_of_prompts(tiny_model: TextToImage, tokens: int) -> None:
    """Also for a single word, and special tokens at other places than usual."""
    [part] = Pipeline.from_model(with_vocabulary(tiny_model, ("cube", *SPECIAL), tokens)).text
    tokenizer = part.tokenizer()
    for ids in part.ids.tolist():
        assert ids == tokenizer.encode(" ".join(["cube"] * ids.count(0))).ids


@pytest.mark.parametrize("depth", [0, -1, 4])
def test_rejects_depths_that_the_checkpoint_does_not_have(
    tiny_model: TextToImage, tmp_path: Path, depth: int
) -> None:
    with pytest.raises(BadInput, match=r"expected a depth of 1\.\.3"):
        export_bundle(Pipeline.from_model(tiny_model), tmp_path / "x", depth=depth)
    assert entry_names(tmp_path) == []


@pytest.mark.parametrize(
    ("defaults", "shift", "message"),
    [
        ({"sampler": "nope"}, 1.0, r"defaults.sampler of euler, .*, found 'nope' in the settings of tiny"),
        ({"steps": 0}, 1.0, r"defaults.steps in 1\.\.1000, found 0 in"),
        ({"guidance": float("nan")}, 1.0, "defaults.guidance of at least 1, which is off, found nan in"),
        ({"guidance": 1e9}, 1.0, r"guidance to be a number in .*, found 1000000000\.0 in"),
        ({}, 200.0, r"a shift in 0\.01\.\.100, found 200 in"),
        ({}, float("nan"), "a shift in .*, found nan in"),
    ],
)
def test_rejects_settings_that_a_bundle_cannot_have_before_the_first_graph(
    tiny_model: TextToImage, tmp_path: Path, defaults: dict[str, Any], shift: float, message: str
) -> None:
    def unused() -> Any:
        raise AssertionError("a part was loaded")

    pipeline = Pipeline.from_model(tiny_model)
    text = tuple(replace(part, load=unused) for part in pipeline.text)
    changed = replace(pipeline, text=text, defaults=replace(pipeline.defaults, **defaults), shift=shift)
    with pytest.raises(BadInput, match=f"^expected {message}"):
        export_bundle(changed, tmp_path / "bundle")
    assert entry_names(tmp_path) == []


def test_a_graph_out_of_tolerance_leaves_no_bundle(
    tiny_model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = replace(TOLERANCES["fp16"], conditions=1e-7, transformer=1e-7)
    monkeypatch.setitem(exporter.TOLERANCES, "fp16", strict)
    with pytest.raises(
        EngineFailed, match=r"transformer conditions with a relative error of .* \(tolerance 1e-07\), and 1"
    ):
        export_bundle(Pipeline.from_model(tiny_model), tmp_path / "x", depth=1, precision="fp16")
    assert entry_names(tmp_path) == []


def test_wrong_routing_in_a_variant_fails_the_export(
    tiny_model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_masked() -> onnx.FunctionProto:
        body = masked()
        for node in body.node:
            if node.op_type == "Equal":
                node.op_type = "Less"
        return body

    monkeypatch.setattr(routing, "masked", wrong_masked)
    with pytest.raises(EngineFailed):
        export_bundle(Pipeline.from_model(tiny_model), tmp_path / "x", depth=1)
    assert entry_names(tmp_path) == []


def test_rejects_an_existing_folder_and_a_path_inside_a_file(tiny_model: TextToImage, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for force, reason in ((False, "exists"), (True, "expected a bundle to replace")):
        with pytest.raises(BadInput, match=reason):
            export_bundle(Pipeline.from_model(tiny_model), folder, force=force)
    for manifest in ('{"name": "a browser extension"}', "[]", "not JSON"):
        (folder / "manifest.json").write_text(manifest)
        with pytest.raises(BadInput, match="expected a bundle to replace"):
            export_bundle(Pipeline.from_model(tiny_model), folder, force=True)
    assert entry_names(folder) == ["manifest.json", "thesis.txt"]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BadInput, match=rf"expected a writable folder {file}, found: Not a directory"):
        export_bundle(Pipeline.from_model(tiny_model), file / "inside")


def test_bundle_is_replaced_completely_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_bundle(tmp_path / "bundle")
    rename = Path.rename

    def rename_on_full_disk(path: Path, target: Path) -> Path:
        if path.parent.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_on_full_disk)
        with (
            pytest.raises(BadInput, match="No space left"),
            atomic_folder(out, force=True) as folder,
        ):
            (folder / "new").touch()
    assert (entry_names(tmp_path), entry_names(out)) == (["bundle"], ["manifest.json"])
    with atomic_folder(out, force=True) as folder:
        assert entry_names(out) == ["manifest.json"]  # usable until the end
        (folder / "new").touch()
        for temporary in ("fp32", "bundle.engines"):
            folder.with_name(temporary).mkdir()
    assert (entry_names(tmp_path), entry_names(out)) == (["bundle"], ["new"])


def test_a_bundle_in_use_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, a folder cannot be renamed while a file in it is open."""
    out = make_bundle(tmp_path / "bundle")
    rename = Path.rename

    def rename_what_is_not_in_use(path: Path, target: Path) -> Path:
        if path == out:
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_what_is_not_in_use)
    worked = False
    with (
        pytest.raises(BadInput, match="found: Permission denied; free some space, close what uses it, or"),
        atomic_folder(out, force=True),
    ):
        worked = True
    assert not worked and (entry_names(tmp_path), entry_names(out)) == (["bundle"], ["manifest.json"])


@pytest.mark.parametrize(
    ("force", "reason"),
    [
        (False, r"expected a new folder, found that .*bundle exists; add --force"),
        (True, "expected a bundle to replace at .*bundle, found something else"),
    ],
)
def test_folder_created_during_the_export_is_kept(tmp_path: Path, force: bool, reason: str) -> None:
    out = tmp_path / "bundle"

    def export() -> None:
        with atomic_folder(out, force) as folder:
            (folder / "new").touch()
            out.mkdir()
            (out / "of somebody else").touch()

    with pytest.raises(BadInput, match=reason):
        export()
    assert (entry_names(tmp_path), entry_names(out)) == (["bundle"], ["of somebody else"])


def test_day_old_folders_of_killed_exports_are_removed(tmp_path: Path) -> None:
    partial, replaced, *others = (
        ".bundle.7-1f.partial",
        ".bundle.7-1f.replaced",
        ".bundles.7-1f.partial",
        ".bundle.x-1f.partial",
    )
    # Of an export that may still be running.
    fresh = ".bundle.8-1f.partial"
    for name in (partial, replaced, *others, fresh):
        (tmp_path / name).mkdir()
        if name != fresh:
            os.utime(tmp_path / name, (time.time() - 25 * 3600,) * 2)
    with atomic_folder(tmp_path / "bundle") as folder:
        (folder / "new").touch()
    # The .replaced folder stays while there is no bundle, because it may be the only copy.
    assert entry_names(tmp_path) == sorted([replaced, *others, fresh, "bundle"])
    make_bundle(tmp_path / "bundle")
    with atomic_folder(tmp_path / "bundle", force=True) as folder:
        (folder / "new").touch()
    assert entry_names(tmp_path) == sorted([*others, fresh, "bundle"])


def test_bundle_can_be_replaced_from_inside(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    monkeypatch.chdir(inside)
    with atomic_folder(Path(), force=True) as folder:
        (folder / "new").touch()
    assert (entry_names(tmp_path), entry_names(inside)) == (["bundle"], ["new"])


def test_symlink_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    target, out = make_bundle(tmp_path / "kept"), tmp_path / "bundle"
    out.symlink_to(target)
    with atomic_folder(out, force=True) as folder:
        (folder / "new").touch()
    assert (entry_names(tmp_path), entry_names(out), entry_names(target)) == (
        ["bundle", "kept"],
        ["new"],
        ["manifest.json"],
    )


def test_errors_distinguish_unreadable_and_unwritable_files(tmp_path: Path) -> None:
    out, missing = tmp_path / "bundle", tmp_path / "shard-2.safetensors"
    message = f"expected to read {missing}, found: No such file or directory; check the path"
    with pytest.raises(BadInput, match=message), atomic_folder(out):
        missing.read_bytes()
    with (
        pytest.raises(BadInput, match=f"expected to write {out}, found: Is a directory; free some space"),
        atomic_folder(out) as folder,
    ):
        folder.write_bytes(b"")
    assert entry_names(tmp_path) == []


def test_a_name_without_room_for_those_of_the_work_is_rejected(tmp_path: Path) -> None:
    message = f"expected a writable folder {tmp_path}, found: File name too long; choose another path"
    with pytest.raises(BadInput, match=message), atomic_folder(tmp_path / ("x" * 250)):
        raise AssertionError("not reached")
    assert entry_names(tmp_path) == []


def run_export(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_command_exports_and_replaces_only_with_force(tiny_model: TextToImage, tmp_path: Path) -> None:
    ckpt, out = tmp_path / "model.pt", tmp_path / "bundle"
    checkpoint.save(tiny_model, ckpt)
    code, stdout, stderr = run_export("--ckpt", str(ckpt), "--depth", "1", "--out", str(out))
    assert (code, stdout) == (0, f"{out}\n")
    assert "transformer depth 1" in stderr and "transformer depth 2" not in stderr
    assert Bundle.open(out).manifest.model.depths == (1,)
    code, _, stderr = run_export("--ckpt", str(ckpt), "--out", str(out))
    assert code == 2 and "--force" in stderr
    engines = tmp_path / "bundle.engines"
    (compiled := engines / "openvino/transformer.depth-3.plain.f32").mkdir(parents=True)
    for file in (compiled / "any.1.blob", engines / "vae-decoder.fp32.b1-2.tensorrt-rtx.sm89.engine"):
        file.touch()
    code, _, _ = run_export("--ckpt", str(ckpt), "--depth", "9", "--out", str(out), "--force")
    assert code == 2 and entry_names(compiled) == ["any.1.blob"]
    defaults = ("--default-steps", "4", "--default-guidance", "1", "--default-sampler", "heun")
    code, _, _ = run_export("--ckpt", str(ckpt), "--depth", "1", "--out", str(out), "--force", *defaults)
    manifest = Bundle.open(out).manifest
    assert (code, manifest.defaults) == (0, Defaults(sampler="heun", steps=4, guidance=1.0, depth=1))
    assert entry_names(engines) == ["vae-decoder.fp32.b1-2.tensorrt-rtx.sm89.engine"]


def test_a_disk_with_too_little_space_is_noticed_before_the_work(
    tiny_model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Begun(Exception):
        pass

    def begin(*_: object) -> None:
        raise Begun

    pipeline = Pipeline.from_model(tiny_model)
    need = least_bytes(pipeline, "fp32")
    assert need == 4 * sum(parameter.numel() for parameter in tiny_model.parameters())
    monkeypatch.setattr(exporter, "to_onnx", begin)
    for free, error in ((need - 1, BadInput), (need, Begun)):
        usage = SimpleNamespace(total=2 * need, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        with pytest.raises(error):
            export_bundle(pipeline, tmp_path / "bundle")
        assert entry_names(tmp_path) == []


def test_an_export_takes_the_expected_space_or_more(
    tiny_model: TextToImage,
    tiny_export: tuple[Path, Summary],
    half_export: tuple[Path, Summary],
    int8_export: tuple[Path, Summary],
) -> None:
    pipeline = Pipeline.from_model(tiny_model)
    for precision, (_, summary) in (("fp32", tiny_export), ("fp16", half_export), ("int8", int8_export)):
        written = sum(summary.folder_bytes.values())
        if summary.quantisation:
            written += summary.quantisation.sizes["transformer"][0]  # of the fp32 bundle
        assert least_bytes(pipeline, precision) <= written


def test_the_default_folder_is_named_after_the_model_and_a_given_precision(
    tiny_model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tiny_model, Path("model.pt"))
    for precision, expected in (((), "bundles/tiny"), (("--precision", "fp16"), "bundles/tiny-fp16")):
        code, stdout, _ = run_export("--ckpt", "model.pt", "--depth", "1", *precision)
        assert (code, stdout) == (0, f"{expected}\n")
        assert Bundle.open(expected).manifest.precision == ("fp16" if precision else "fp32")


def test_command_errors_are_one_line(tiny_model: TextToImage, tmp_path: Path) -> None:
    ckpt = tmp_path / "model.pt"
    checkpoint.save(tiny_model, ckpt)
    for arguments, exit_code in (
        (("--ckpt", str(tmp_path / "none.pt")), 6),
        (("--ckpt", str(ckpt), "--depth", "9"), 2),
        (("--ckpt", str(ckpt), "--precision", "fp7"), 2),
        ((), 2),
        (("--ckpt", str(ckpt), "--base", str(ckpt)), 2),
        (("--ckpt", str(ckpt), "--no-t5"), 2),
        (("--ckpt", str(ckpt), "--image-size", "64"), 2),
    ):
        code, stdout, stderr = run_export(*arguments, "--out", str(tmp_path / "bundle"))
        assert (code, stdout) == (exit_code, "")
        [line] = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert "expected" in line and "found" in line
    assert entry_names(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("option", ["--ckpt", "--base", "--components", "--out"])
def test_a_path_that_is_too_long_is_one_line(tiny_model: TextToImage, tmp_path: Path, option: str) -> None:
    ckpt = tmp_path / "model.pt"
    checkpoint.save(tiny_model, ckpt)
    others = {"--components": ("--base", str(tmp_path)), "--out": ("--ckpt", str(ckpt))}
    arguments = others.get(option, ())
    code, stdout, stderr = run_export(*arguments, option, str(tmp_path / ("x" * 300)))
    assert code in (2, 6) and stdout == ""
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert entry_names(tmp_path) == ["model.pt"]


def test_a_folder_that_may_not_be_entered_is_one_line(
    tiny_model: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because root, which often runs the tests, may enter any folder."""
    ckpt, out, stat = tmp_path / "model.pt", tmp_path / "locked/bundle", Path.stat
    checkpoint.save(tiny_model, ckpt)

    def denied(path: Path, **options: bool) -> os.stat_result:
        if path == out:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", denied)
    code, stdout, stderr = run_export("--ckpt", str(ckpt), "--out", str(out))
    assert (code, stdout) == (2, "")
    assert stderr == f"error: expected a usable path {out}, found: Permission denied; choose another\n"


def test_a_name_that_leaves_no_room_for_the_hidden_folder_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 255)
    message = f"expected a writable folder {tmp_path}, found: File name too long; choose another path"
    with pytest.raises(BadInput, match=message), atomic_folder(out):
        pass
    assert entry_names(tmp_path) == []


def test_table_lists_errors_times_and_sizes(tiny_export: tuple[Path, Summary]) -> None:
    text = table(tiny_export[1])
    # The errors of two variants, and the time.
    assert text.count("transformer depth 2") == 3
    assert "weights" not in text and "MB" in text


def test_interrupted_export_leaves_nothing(tiny_model: TextToImage, tmp_path: Path) -> None:
    ckpt = tmp_path / "model.pt"
    checkpoint.save(tiny_model, ckpt)
    program = Path(sys.executable).with_name("tpx-export")
    process = subprocess.Popen(
        [program, "--ckpt", str(ckpt), "--out", str(tmp_path / "bundle")], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any(path.suffix == ".partial" for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: cancelled" in stderr and "Traceback" not in stderr
    assert entry_names(tmp_path) == ["model.pt"]
