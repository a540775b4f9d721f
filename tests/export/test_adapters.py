"""tpx.safetensors: adapters round-trip, attach only to a matching base, and change nothing before training."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tpx_export.adapters import FILE, FORMAT, VERSION, AdapterInfo, attach, load_adapters, save_adapters
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.model import MMDiT, MMDiTSpec, ThinkingSpec
from tpx_export.model.thinking import Thinking
from tpx_runtime.errors import BadInput, TpxError

SPEC = MMDiTSpec(
    latent_size=(8, 8),
    width=64,
    heads=2,
    blocks=14,
    context_tokens=5,
    context_width=16,
    pooled_width=16,
    dual_blocks=(4,),
)
PAPER = ThinkingSpec(blocks=(4, 8, 12), experts=2, rank=128, max_depth=2, temperature=5.0)
SMALL = ThinkingSpec(blocks=(0, 2), experts=3, rank=4, max_depth=2)


def base(seed: int = 0, spec: MMDiTSpec = SPEC) -> MMDiT:
    torch.manual_seed(seed)
    model = MMDiT(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def randomise_adapters(model: MMDiT, seed: int = 1) -> MMDiT:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".thinking." in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    tensors = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 16)
    latents, context, pooled = (value.to(dtype) for value in tensors)
    return latents, torch.tensor([900.0, 30.0]), context, pooled


def error_message(act: Callable[[], object], kind: type[TpxError] = CheckpointInvalid) -> str:
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message and "found" in message
    return message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapters(
        randomise_adapters(attach(base(), SMALL)), tmp_path / FILE, "shapes", {"steps": 3, "data": "shapes"}
    )
    return tmp_path / FILE


def rewrite(path: Path, state: dict[str, Tensor] | None = None, **changes: object) -> Path:
    """Rewrite the file with another state, or with other fields in its header (... removes a field)."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["tpx"])
    header = {name: value for name, value in {**header, **changes}.items() if value is not ...}
    save_file(load_file(path) if state is None else state, path, metadata={"tpx": json.dumps(header)})
    return path


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_untrained_adapters_do_not_change_the_base_output(experts: int) -> None:
    model = base()
    expected, no_routes = model(*inputs(), 1)
    assert no_routes.shape[1] == 0
    attach(model, replace(PAPER, experts=experts))
    for depth in (1, 2):
        found, routes = model(*inputs(), depth)
        assert torch.equal(found, expected)
        assert routes.shape == (2, 3 * depth, 16)


def test_adapters_are_attached_only_to_their_blocks() -> None:
    model = attach(base(), PAPER)
    assert [i for i, block in enumerate(model.blocks) if block.thinking is not None] == [4, 8, 12]
    assert model.spec == replace(SPEC, thinking=PAPER)
    assert model.state_dict().keys() == MMDiT(model.spec).state_dict().keys()


def test_attach_keeps_the_base_tensors_and_only_adapters_are_trainable() -> None:
    model = base()
    before = dict(model.named_parameters())
    attach(model, SMALL)
    after = dict(model.named_parameters())
    assert all(after[name] is value for name, value in before.items())
    assert {name for name, value in after.items() if value.requires_grad} == after.keys() - before.keys()
    plain = attach(base(), replace(SMALL, modulation=False))
    assert {n.rsplit(".", 1)[1] for n, p in plain.named_parameters() if p.requires_grad}.isdisjoint(
        {"scale", "shift"}
    )


def test_adapters_take_the_training_mode_of_the_model() -> None:
    """In training mode, Thinking draws its routes at random."""
    assert not any(module.training for module in attach(base(), SMALL).modules())
    assert all(module.training for module in attach(base().train(), SMALL).modules())


def test_round_trip(saved: Path) -> None:
    thinking, state, info = load_adapters(saved)
    assert thinking == SMALL
    assert info == AdapterInfo(64, "shapes", {"steps": 3, "data": "shapes"})
    expected = randomise_adapters(attach(base(), SMALL))
    found = attach(base(), thinking, state)
    for depth in (1, 2):
        for a, b in zip(found(*inputs(), depth), expected(*inputs(), depth), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(found(*inputs(), 1)[0], base()(*inputs(), 1)[0])
    assert set(state) == {name for name in expected.state_dict() if ".thinking." in name}


def test_tensors_are_those_of_the_documentation(saved: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/checkpoint.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(blocks\.N\.thinking\..*?)` \| \[(.*?)\]", page, re.MULTILINE)
    sizes = {"M": 3, "r": 4, "T": 2, "D": 64, "3D": 192, "64": 64}
    documented = {
        name.replace("N", str(block)): [sizes[size] for size in shape.split(", ")]
        for name, shape in rows
        for block in SMALL.blocks
    }
    assert documented == {name: list(tensor.shape) for name, tensor in load_file(saved).items()}


def test_loads_the_file_in_a_given_folder(saved: Path) -> None:
    assert load_adapters(saved.parent).thinking == SMALL
    saved.unlink()
    assert FILE in error_message(lambda: load_adapters(saved.parent))


def test_attached_tensors_are_not_shared_with_other_models_or_the_file(saved: Path) -> None:
    adapters, content = load_adapters(saved), saved.read_bytes()
    first, second = (attach(base(), adapters.thinking, adapters.state) for _ in range(2))
    before = {name: value.clone() for name, value in second.state_dict().items()}
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in second.state_dict().items())
    assert saved.read_bytes() == content


def test_attaching_again_replaces_earlier_adapters(saved: Path) -> None:
    thinking, state, _ = load_adapters(saved)
    model = attach(attach(base(), PAPER), thinking, state)
    assert [i for i, block in enumerate(model.blocks) if block.thinking is not None] == [0, 2]
    assert torch.equal(model(*inputs(), 2)[0], attach(base(), thinking, state)(*inputs(), 2)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_stay_in_float32_on_a_base_of_lower_precision(saved: Path, dtype: torch.dtype) -> None:
    low_precision_base = base().to(dtype)
    for part in (low_precision_base.time, low_precision_base.pooled):
        part.float()
    thinking, state, _ = load_adapters(saved)
    with torch.no_grad():
        expected, expected_routes = attach(base(), thinking, state)(*inputs(), 2)
    # First as for export, then as for training.
    for adapter_dtype, expected_dtype in ((None, dtype), (torch.float32, torch.float32)):
        model = attach(low_precision_base, thinking, state, adapter_dtype)
        for name, value in model.state_dict().items():
            if ".thinking." in name:
                assert value.dtype == (torch.float32 if ".gate." in name else expected_dtype), name
            if ".gate." in name:
                assert torch.equal(value, state[name]), name
        with torch.no_grad():
            found, routes = model(*inputs(dtype), 2)
        assert found.dtype == dtype
        max_error = float((found.float() - expected).abs().max() / expected.abs().max())
        assert max_error < (0.01 if dtype == torch.float16 else 0.1)
        assert float((routes == expected_routes).float().mean()) > 0.9


def test_float32_adapters_get_gradients_on_a_float16_base() -> None:
    model = base().half()
    for part in (model.time, model.pooled):
        part.float()
    randomise_adapters(attach(model, SMALL, dtype=torch.float32)).train()
    model(*inputs(torch.float16), 2)[0].float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".thinking." in name), name
        assert parameter.grad is None or parameter.grad.dtype == torch.float32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.thinking: Thinking | None = None


class OtherBase(nn.Module):
    """A base that is not an MMDiT."""

    def __init__(self) -> None:
        super().__init__()
        self.spec: Any = replace(SPEC, width=8, heads=1, blocks=3, dual_blocks=())
        self.blocks = nn.ModuleList(Block() for _ in range(3))


def test_adapters_attach_to_any_base_with_blocks(tmp_path: Path) -> None:
    model = attach(OtherBase(), SMALL)
    save_adapters(model, tmp_path / FILE, "other")
    thinking, state, info = load_adapters(tmp_path / FILE)
    loaded = attach(OtherBase(), thinking, state)
    assert info == AdapterInfo(8, "other")
    for name, value in model.state_dict().items():
        assert ".thinking." not in name or torch.equal(loaded.state_dict()[name], value)


def test_rejects_adapters_of_another_base(saved: Path) -> None:
    thinking, state, _ = load_adapters(saved)
    deep = attach(base(), PAPER)
    shallow = base(spec=replace(SPEC, blocks=5))
    message = error_message(lambda: attach(shallow, PAPER))
    assert "0..4" in message and "[4, 8, 12]" in message
    assert all(block.thinking is None for block in shallow.blocks)
    wide = base(spec=replace(SPEC, width=128))
    message = error_message(lambda: attach(wide, thinking, state))
    assert "width 128" in message and "blocks.0.thinking.a is [3, 64, 4], not [3, 128, 4]" in message
    assert all(block.thinking is None for block in wide.blocks) and wide.spec.thinking is None
    error_message(lambda: attach(deep, PAPER, state))
    assert deep.spec.thinking == PAPER and deep.blocks[8].thinking is not None


def test_save_rejects_a_model_without_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="thinking blocks"):
        save_adapters(base(), tmp_path / FILE, "shapes")
    assert not list(tmp_path.iterdir())


def test_failed_save_keeps_the_existing_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, content = attach(base(), PAPER), saved.read_bytes()

    def save_on_full_disk(state: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tpx_export.tensor_files.save_file", save_on_full_disk)
    assert "No space left" in error_message(lambda: save_adapters(model, saved, "shapes"), BadInput)
    assert saved.read_bytes() == content
    assert list(saved.parent.iterdir()) == [saved]


def test_save_rejects_a_missing_folder_and_a_folder_as_path(tmp_path: Path) -> None:
    model = attach(base(), SMALL)
    error_message(lambda: save_adapters(model, tmp_path / "no" / FILE, "shapes"), BadInput)
    (tmp_path / "folder").mkdir()
    error_message(lambda: save_adapters(model, tmp_path / "folder", "shapes"), BadInput)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_rejects_files_that_are_not_adapters(tmp_path: Path) -> None:
    path = tmp_path / FILE
    assert "none" in error_message(lambda: load_adapters(path))
    save_file({"x": torch.zeros(1)}, path)
    assert "another project" in error_message(lambda: load_adapters(path))
    for header in ("{", "[]", "3", '{"format": 3}', "[" * 100_000):
        save_file({"x": torch.zeros(1)}, path, metadata={"tpx": header})
        error_message(lambda: load_adapters(path))
    save_file({"x": torch.zeros(1)}, path, metadata={"tpx": '{"format": "tpx-model", "version": 1}'})
    assert "tpx-model" in error_message(lambda: load_adapters(path))
    path.write_bytes(b"not a safetensors file")
    assert "damaged" in error_message(lambda: load_adapters(path))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_rejects_truncated_files(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    error_message(lambda: load_adapters(saved))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": 2}, "version 1"),
        ({"version": ...}, "version 1"),
        ({"width": ...}, "width"),
        ({"width": "64"}, "int"),
        ({"width": 0}, "width"),
        ({"width": 32}, "blocks.0.thinking.a"),
        ({"width": 10**30}, "too large"),
        ({"base": 3}, "str"),
        ({"training": []}, "dict"),
        ({"extra": 1}, "extra"),
        ({"spec": ...}, "ThinkingSpec"),
        ({"spec": []}, "ThinkingSpec"),
        ({"spec": {**asdict(SMALL), "hidden": 3}}, "hidden"),
        ({"spec": {**asdict(SMALL), "blocks": [2, 0]}}, "blocks"),
        ({"spec": {**asdict(SMALL), "blocks": [0, 0]}}, "blocks"),
        ({"spec": {**asdict(SMALL), "blocks": []}}, "blocks"),
        ({"spec": {**asdict(SMALL), "blocks": [-1, 2]}}, "blocks"),
        ({"spec": {**asdict(SMALL), "blocks": ["0", "2"]}}, "int"),
        ({"spec": {**asdict(SMALL), "blocks": 2}}, "tuple"),
        ({"spec": {**asdict(SMALL), "rank": 2.5}}, "int"),
        ({"spec": {**asdict(SMALL), "rank": 0}}, "rank"),
        ({"spec": {**asdict(SMALL), "rank": 10**30}}, "too large"),
        ({"spec": {**asdict(SMALL), "experts": True}}, "int"),
        ({"spec": {**asdict(SMALL), "temperature": float("nan")}}, "temperature"),
        ({"spec": {**asdict(SMALL), "modulation": 1}}, "bool"),
    ],
)
def test_rejects_an_invalid_header(saved: Path, changes: dict[str, Any], named: str) -> None:
    assert named in error_message(lambda: load_adapters(rewrite(saved, **changes)))


def test_missing_header_fields_have_their_defaults(saved: Path) -> None:
    spec = {name: value for name, value in asdict(SMALL).items() if name != "base_every_step"}
    assert load_adapters(rewrite(saved, spec=spec)).thinking == SMALL
    assert load_adapters(rewrite(saved, training=...)).info.training == {}


@pytest.mark.parametrize("fault", ["missing", "unknown", "short", "nan", "integer"])
def test_error_names_an_invalid_tensor(saved: Path, fault: str) -> None:
    state, name = load_file(saved), "blocks.2.thinking.b"
    if fault == "missing":
        del state[name]
    elif fault == "unknown":
        name = "blocks.5.thinking.b"
        state[name] = torch.zeros(1)
    elif fault == "short":
        state[name] = state[name][:1].contiguous()
    elif fault == "nan":
        state[name][0, 0, 0] = float("nan")
    else:
        state[name] = state[name].to(torch.int32)
    thinking = load_adapters(saved).thinking
    assert name in error_message(lambda: attach(base(), thinking, state))
    assert name in error_message(lambda: load_adapters(rewrite(saved, state)))


def test_header_has_the_documented_fields(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["tpx"])
    assert header == {
        "format": FORMAT,
        "version": VERSION,
        "spec": {**asdict(SMALL), "blocks": [0, 2]},
        "width": 64,
        "base": "shapes",
        "training": {"steps": 3, "data": "shapes"},
    }
