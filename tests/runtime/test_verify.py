"""Verification: real engines reproduce the golden outputs, and every error is reported for its part."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tpx_runtime.bundle import GOLDEN, STEP, Bundle
from tpx_runtime.engine import Arrays, resolve
from tpx_runtime.errors import BundleInvalid, EngineFailed
from tpx_runtime.verify import (
    PartReport,
    load_golden,
    relative_error,
    require_ok,
    routing_agreement,
    verify_bundle,
    verify_step,
)

from .fakes import (
    CLASSES,
    FAKE,
    THREE_ENCODERS,
    FakeEngine,
    Function,
    conditions,
    golden,
    seal,
    text_encoder,
    transformer,
    vae_decoder,
    vae_encoder,
    without_encoder,
)

TRANSFORMERS = [f"transformer depth {depth}" for depth in FAKE.model.depths]
PARTS = ["text_encoder", "transformer conditions", *TRANSFORMERS, "vae_decoder", "vae_encoder"]


def tamper(root: Path, **arrays: np.ndarray | None) -> Bundle:
    """The bundle with changed golden arrays, without those that are None, and with a matching manifest."""
    changed = {**golden(), **arrays}
    np.savez(root / GOLDEN, **{name: array for name, array in changed.items() if array is not None})
    return seal(root)


def wrong_parts(bundle: Bundle, engine: object = None) -> list[str]:
    reports = verify_bundle(bundle, engine or FakeEngine())  # type: ignore[arg-type]
    assert [report.part for report in reports] == PARTS
    return [report.part for report in reports if not report.ok]


def test_the_engine_that_made_the_golden_arrays_reproduces_them(fake_bundle: Path) -> None:
    reports = verify_bundle(Bundle.open(fake_bundle), FakeEngine())  # type: ignore[arg-type]
    assert [(report.part, report.error, report.ok) for report in reports] == [
        (part, 0, True) for part in PARTS
    ]
    assert [report.routing_agreement for report in reports] == [None, None, 1, 1, 1, None, None]
    require_ok(reports, "fake")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_real_bundle_passes_on_a_real_engine(tiny_bundle: Path, name: str) -> None:
    reports = verify_bundle(Bundle.open(tiny_bundle), resolve(name))
    assert all(report.ok for report in reports)
    assert all(report.error < 1e-5 for report in reports)
    assert [report.routing_agreement for report in reports[2:5]] == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("text_encoder.context", "text_encoder"),
        ("text_encoder.pooled", "text_encoder"),
        ("velocity_1", "transformer depth 1"),
        ("velocity_4", "transformer depth 4"),
        ("image", "vae_decoder"),
        ("encoder_latents", "vae_encoder"),
    ],
)
def test_one_changed_golden_number_is_detected(fake_bundle: Path, name: str, part: str) -> None:
    array = golden()[name].copy()
    array.flat[-1] += 1e-3 * np.abs(array).max()
    found = wrong_parts(tamper(fake_bundle, **{name: array}))
    assert part in found
    # The golden image is also the input of the VAE encoder.
    assert set(found) - {part} <= ({"vae_encoder"} if name == "image" else set())


@pytest.mark.parametrize("name", ["context", "latents", "conditions"])
def test_a_changed_input_of_the_transformer_is_detected_at_every_depth(fake_bundle: Path, name: str) -> None:
    found = wrong_parts(tamper(fake_bundle, **{name: golden()[name] * np.float32(1.1)}))
    assert found == (["transformer conditions"] if name == "conditions" else []) + TRANSFORMERS


@pytest.mark.parametrize("name", ["pooled", "timestep"])
def test_a_changed_input_of_the_conditions_is_reported_for_them_alone(fake_bundle: Path, name: str) -> None:
    """The transformers get the golden conditions, so that an error is reported for the graph that causes it."""
    assert wrong_parts(tamper(fake_bundle, **{name: golden()[name] * np.float32(1.1)})) == [
        "transformer conditions"
    ]


def test_a_change_within_tolerance_passes(fake_bundle: Path) -> None:
    velocity = golden()["velocity_2"] * np.float32(1 + 5e-5)
    assert wrong_parts(tamper(fake_bundle, velocity_2=velocity)) == []


def test_too_many_tokens_routed_to_another_expert_are_detected(fake_bundle: Path) -> None:
    routes = golden()["routes_2"].copy()
    routes.flat[: routes.size // 20] ^= 1  # 5 % differ, 10 % are allowed
    assert wrong_parts(tamper(fake_bundle, routes_2=routes)) == []
    routes.flat[: routes.size // 5] ^= 1
    assert wrong_parts(tamper(fake_bundle, routes_2=routes)) == ["transformer depth 2"]


def test_a_tampered_real_bundle_fails(copy: Path) -> None:
    manifest, arrays = Bundle.open(copy).manifest, load_golden(Bundle.open(copy))
    arrays["velocity_3"] = arrays["velocity_3"] * 1.01
    np.savez(copy / GOLDEN, **arrays)
    with pytest.raises(BundleInvalid, match=r"golden\.npz: expected "):
        Bundle.open(copy)
    seal(copy, manifest)
    reports = verify_bundle(Bundle.open(copy), resolve("onnxruntime"))
    assert [report.part for report in reports if not report.ok] == ["transformer depth 3"]


def with_outputs(function: Function, **changes: object) -> Function:
    """`function` with changed outputs, without those that are None."""

    def run(inputs: Arrays) -> Arrays:
        outputs = function(inputs)
        for name, change in changes.items():
            if change is None:
                del outputs[name]
            else:
                outputs[name] = change(outputs[name])  # type: ignore[operator]
        return outputs

    return run


@pytest.mark.parametrize(
    "change",
    [
        None,
        lambda array: array[:1],
        lambda array: array[..., :-1],
        lambda array: np.full_like(array, np.nan),
        lambda array: np.full_like(array, np.inf),
        lambda array: -array,
        lambda array: array * 1.001,
        lambda array: np.where(np.arange(array.size).reshape(array.shape) == 1, np.nan, array),
    ],
)
@pytest.mark.parametrize(
    ("key", "name", "function", "part"),
    [
        ("context", "text_encoder/model.onnx", text_encoder, "text_encoder"),
        ("pooled", "text_encoder/model.onnx", text_encoder, "text_encoder"),
        ("conditions", "transformer/conditions.onnx", conditions(), "transformer conditions"),
        ("velocity", "transformer/depth-2.onnx", transformer(2), "transformer depth 2"),
        ("image", "vae_decoder/model.onnx", vae_decoder, "vae_decoder"),
        ("latents", "vae_encoder/model.onnx", vae_encoder, "vae_encoder"),
    ],
)
def test_wrong_outputs_fail_without_a_warning(
    fake_bundle: Path, key: str, name: str, function: Callable, part: str, change: Callable | None
) -> None:
    engine = FakeEngine({name: with_outputs(function, **{key: change})})
    assert wrong_parts(Bundle.open(fake_bundle), engine) == [part]


@pytest.mark.parametrize("change", [None, lambda routes: routes[:, :1], lambda routes: 1 - routes])
def test_wrong_routes_fail(fake_bundle: Path, change: Callable | None) -> None:
    engine = FakeEngine({"transformer/depth-1.onnx": with_outputs(transformer(1), routes=change)})
    assert wrong_parts(Bundle.open(fake_bundle), engine) == ["transformer depth 1"]


def test_a_bundle_without_vae_encoder_is_verified_without_that_part(fake_bundle: Path) -> None:
    tamper(fake_bundle, encoder_latents=None)
    reports = verify_bundle(without_encoder(fake_bundle), FakeEngine())  # type: ignore[arg-type]
    assert [report.part for report in reports] == PARTS[:-1]
    assert all(report.ok for report in reports)


def test_three_text_encoders_are_three_parts(three_encoders: Path) -> None:
    reports = verify_bundle(Bundle.open(three_encoders), FakeEngine(manifest=THREE_ENCODERS))  # type: ignore[arg-type]
    assert [report.part for report in reports] == [
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        *PARTS[1:],
    ]
    assert all(report.ok for report in reports)
    np.savez(
        three_encoders / GOLDEN,
        **{k: v for k, v in golden(THREE_ENCODERS).items() if k != "text_encoder_3.context"},
    )
    with pytest.raises(BundleInvalid, match=r"the array text_encoder_3\.context, found none"):
        verify_bundle(seal(three_encoders, THREE_ENCODERS), FakeEngine(manifest=THREE_ENCODERS))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", ["", "_2", "_3"])
def test_a_wrong_text_encoder_is_reported_by_its_name(three_encoders: Path, number: str) -> None:
    path = f"text_encoder{number}/model.onnx"
    engine = FakeEngine(manifest=THREE_ENCODERS)
    engine.functions[path] = with_outputs(engine.functions[path], context=lambda array: array * 1.001)
    reports = verify_bundle(Bundle.open(three_encoders), engine)  # type: ignore[arg-type]
    assert [report.part for report in reports if not report.ok] == [f"text_encoder{number}"]


def test_a_class_conditional_bundle_is_verified_by_its_epsilon(classes: Path) -> None:
    def reports(engine: FakeEngine) -> list[PartReport]:
        return verify_bundle(Bundle.open(classes), engine)  # type: ignore[arg-type]

    engine = FakeEngine(manifest=CLASSES)
    assert [report.part for report in reports(engine)] == [
        "transformer conditions",
        "transformer depth 1",
        "vae_decoder",
        "vae_encoder",
    ]
    assert all(report.ok and report.routing_agreement is None for report in reports(engine))
    path = "transformer/depth-1.onnx"
    engine.functions[path] = with_outputs(engine.functions[path], epsilon=lambda array: array[:, :4])
    assert [report.part for report in reports(engine) if not report.ok] == ["transformer depth 1"]


def test_a_model_without_thinking_blocks_needs_no_routes(fake_bundle: Path) -> None:
    tamper(fake_bundle, routes_1=None, routes_2=None, routes_4=None)
    plain = replace(FAKE.model, experts=0, thinking_blocks=())
    bundle = seal(fake_bundle, replace(FAKE, model=plain))
    reports = verify_bundle(bundle, FakeEngine())  # type: ignore[arg-type]
    assert all(report.ok and report.routing_agreement is None for report in reports)


@pytest.mark.parametrize(
    "name",
    [
        *("text_encoder.ids", "text_encoder.context", "text_encoder.pooled", "context", "pooled", "latents"),
        *("timestep", "conditions", "velocity_4", "routes_2", "decoder_latents", "image", "encoder_latents"),
    ],
)
def test_a_missing_golden_array_is_named(fake_bundle: Path, name: str) -> None:
    with pytest.raises(BundleInvalid, match=f"expected the array {name}, found none; export again"):
        verify_bundle(tamper(fake_bundle, **{name: None}), FakeEngine())  # type: ignore[arg-type]


def test_only_arrays_that_are_compared_are_read(fake_bundle: Path) -> None:
    bundle = tamper(fake_bundle, unused=np.full(5, 1234.5))
    assert "unused" in load_golden(bundle) and load_golden(bundle, ["image"]).keys() == {"image"}
    data = (fake_bundle / GOLDEN).read_bytes()
    damaged = data.replace(np.full(5, 1234.5).tobytes(), np.zeros(5).tobytes())
    assert damaged != data
    (fake_bundle / GOLDEN).write_bytes(damaged)
    with pytest.raises(BundleInvalid, match="Bad CRC-32"):
        load_golden(seal(fake_bundle))
    assert all(report.ok for report in verify_bundle(seal(fake_bundle), FakeEngine()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [NotImplementedError("method 99"), RuntimeError("encrypted"), MemoryError("1 PiB")]
)
def test_every_error_of_a_damaged_golden_file_is_one_line(
    fake_bundle: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(BundleInvalid, match=rf"golden\.npz: expected arrays by name, found none \({error}\)"):
        load_golden(Bundle.open(fake_bundle))


@pytest.mark.parametrize("content", ["empty", "text", "array", "truncated", "pickle"])
def test_rejects_a_golden_file_that_is_not_an_archive_of_arrays(fake_bundle: Path, content: str) -> None:
    path, original = fake_bundle / GOLDEN, (fake_bundle / GOLDEN).read_bytes()
    if content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "pickle":
        with path.open("wb") as file:
            np.savez(file, ids=np.array([{}], dtype=object))
    else:
        path.write_bytes(
            {"empty": b"", "text": b"no archive", "truncated": original[: len(original) // 2]}[content]
        )
    with pytest.raises(BundleInvalid, match=r"golden\.npz: expected arrays by name, found none \("):
        load_golden(seal(fake_bundle))


def test_relative_error() -> None:
    expected = np.array([1.0, -4.0], np.float32)
    assert relative_error(expected, expected) == 0
    assert relative_error(np.array([1.0, -3.0]), expected) == 0.25
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.ones(2), np.zeros(2)) == np.inf
    assert relative_error(expected, np.array([1.0, np.nan])) == np.inf
    assert relative_error(np.array([np.inf, 1.0]), np.array([np.inf, 1.0])) == np.inf
    assert relative_error(expected[:1], expected) == np.inf
    assert relative_error(None, expected) == np.inf
    assert relative_error(np.float32([3e38]), np.float32([-3e38])) == np.inf


def test_routing_agreement() -> None:
    routes = np.array([[0, 1, 2, 3]])
    assert routing_agreement(routes, routes) == 1
    assert routing_agreement(np.array([[0, 1, 2, 0]]), routes) == 0.75
    assert routing_agreement(routes[:, :2], routes) == 0
    assert routing_agreement(None, routes) == 0


def test_values_at_the_limits_pass() -> None:
    assert PartReport("a", error=1e-4, tolerance=1e-4, routing_agreement=0.9, min_agreement=0.9).ok
    assert not PartReport("a", error=1.1e-4, tolerance=1e-4).ok
    assert not PartReport("a", error=0, tolerance=1e-4, routing_agreement=0.89, min_agreement=0.9).ok


def test_the_error_names_the_first_wrong_part_and_counts_the_others() -> None:
    good = PartReport("text_encoder", 0.0, 1e-4)
    routed = PartReport("transformer depth 1", 0.031, 1e-4, 0.5, 0.99)
    plain = PartReport("vae_decoder", 0.2, 1e-4)
    with pytest.raises(EngineFailed) as caught:
        require_ok([good, routed, plain], "openvino")
    assert str(caught.value) == (
        "expected the golden outputs from engine openvino, found transformer depth 1 with a relative error "
        "of 3.1e-02 (tolerance 1e-04) and 50.00% of routes (at least 99.00%), and 1 more; "
        "use another engine or a bundle of higher precision"
    )
    with pytest.raises(EngineFailed, match=r"found vae_decoder with .* \(tolerance 1e-04\); use another"):
        require_ok([good, plain], "openvino")


def test_the_step_graph_is_verified_for_an_engine_with_a_device_loop(tiny_bundle: Path) -> None:
    bundle, engine = Bundle.open(tiny_bundle), resolve("onnxruntime")
    assert "scheduler step" not in [report.part for report in verify_bundle(bundle, engine)]
    report = verify_bundle(bundle, replace(engine, has_device_loop=True))[-1]
    assert report.part == "scheduler step" and report.ok


@pytest.mark.parametrize(
    ("node", "other"), [("GreaterOrEqual", "Greater"), ("MatMul", "Add"), ("Where", None), ("Gather", None)]
)
def test_a_wrong_step_graph_fails(tiny_bundle: Path, tmp_path: Path, node: str, other: str | None) -> None:
    """The last node of a type has another operator, swapped inputs (Where) or a negated input (Gather)."""
    root = shutil.copytree(tiny_bundle, tmp_path / "tiny")
    graph = onnx.load(root / STEP)
    changed = [candidate for candidate in graph.graph.node if candidate.op_type == node][-1]
    if other:
        changed.op_type = other
    elif node == "Where":
        changed.input[1], changed.input[2] = changed.input[2], changed.input[1]
    else:
        changed.input[0] = "conditions_before"
        negated = onnx.helper.make_node("Neg", ["ahead"], ["conditions_before"])
        graph.graph.node.insert(len(graph.graph.node) - 1, negated)
    onnx.save_model(graph, root / STEP)
    engine, bundle = resolve("onnxruntime"), seal(root)
    try:
        (report,) = verify_step(bundle, engine)
    except EngineFailed:
        return  # it does not even run
    assert not report.ok


def test_a_bundle_without_a_step_graph_has_none_to_verify(fake_bundle: Path) -> None:
    assert verify_step(Bundle.open(fake_bundle), FakeEngine()) == []  # type: ignore[arg-type]
