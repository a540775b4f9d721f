"""CLIP and T5 text encoders imported from folders and single files, compared with transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_parity import TIGHT, randomise, relative, run_onnx, same_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from tpx_export.base.tensors import open_tensors
from tpx_export.base.text_encoders import (
    CLIP_G,
    CLIP_L,
    T5,
    clip_from_tensors,
    load_clip,
    load_t5,
    t5_from_tensors,
)
from tpx_export.checkpoint import CheckpointInvalid
from tpx_export.graphs import TextEncoderGraph
from tpx_export.model.clip import CLIPText, CLIPTextSpec
from tpx_export.model.t5 import Linear, T5Encoder, T5Spec, relative_position_bucket
from tpx_export.precision import in_float32

VOCAB_SIZE, EOS_ID, MAX_TOKENS = 120, 119, 20
KINDS = {
    "L": {"hidden_act": "quick_gelu", "num_hidden_layers": 3, "hidden_size": 128, "projection_dim": 128},
    "G": {"hidden_act": "gelu", "num_hidden_layers": 4, "hidden_size": 192, "projection_dim": 160},
}
PREFIXES = {"L": CLIP_L, "G": CLIP_G}


@pytest.fixture(autouse=True, scope="module")
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def reference_clip(kind: str, **changes: Any) -> CLIPTextModelWithProjection:
    config = {
        **KINDS[kind],
        "vocab_size": VOCAB_SIZE,
        "intermediate_size": 256,
        "num_attention_heads": KINDS[kind]["hidden_size"] // 64,  # type: ignore[operator]
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": EOS_ID - 1,
        "eos_token_id": EOS_ID,
        **changes,
    }
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    randomise(model)
    return model


def reference_t5(**changes: Any) -> T5EncoderModel:
    config = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 48,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        **changes,
    }
    model = T5EncoderModel(T5Config(**config)).eval()
    randomise(model)
    # T5 does not scale its attention scores: large ones would let a single token win, and float16 decide which one.
    for block in model.encoder.block:
        block.layer[0].SelfAttention.q.weight.mul_(0.25)
    return model


def clip_ids(*lengths: int, pad: int = EOS_ID) -> Tensor:
    """Token ids of prompts with the given numbers of words, between BOS and EOS, padded."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.full((len(lengths), MAX_TOKENS), pad)
    for row, length in enumerate(lengths):
        word_ids = torch.randint(1, EOS_ID - 1, (length,), generator=generator)
        ids[row, : length + 2] = torch.tensor([EOS_ID - 1, *word_ids, EOS_ID])
    return ids


def t5_ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def reference_outputs(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model(ids, output_hidden_states=True)
    return outputs.hidden_states[-2], outputs.text_embeds


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes a field."""
    config = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module", params=KINDS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """The kind of CLIP, a model of transformers, and the folder in which it is saved."""
    model, folder = reference_clip(request.param), tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = reference_t5(), tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("pad", [EOS_ID, 0])
def test_clip_matches_transformers(clip: tuple[str, Any, Path], pad: int) -> None:
    _, reference, folder = clip
    ids = clip_ids(0, 7, MAX_TOKENS - 2, pad=pad)
    for found, expected in zip(load_clip(folder)(ids), reference_outputs(reference, ids), strict=True):
        assert relative(found, expected) < TIGHT


def test_clip_pools_at_eos_with_legacy_and_current_eos_token_id(tmp_path: Path) -> None:
    legacy = reference_clip("L", eos_token_id=2)
    legacy.save_pretrained(tmp_path)
    ids = clip_ids(3, 9)
    # With eos_token_id 2 in the config, token 2 is still an ordinary word.
    ids[:, 1] = 2
    current = reference_clip("L")
    current.load_state_dict(legacy.state_dict())
    pooled = load_clip(tmp_path)(ids)[1]
    assert relative(pooled, reference_outputs(legacy, ids)[1]) < TIGHT
    assert relative(pooled, reference_outputs(current, ids)[1]) < TIGHT


def test_clip_in_onnx_runtime_matches_transformers_at_any_batch_size(clip: tuple[str, Any, Path]) -> None:
    _, reference, folder = clip
    feeds = [clip_ids(5), clip_ids(0, 3, MAX_TOKENS - 2)]
    graph = TextEncoderGraph(load_clip(folder))
    for ids, outputs in zip(
        feeds, run_onnx(graph, "ids", clip_ids(4, 2), ("context", "pooled"), feeds), strict=True
    ):
        for found, expected in zip(outputs, reference_outputs(reference, ids), strict=True):
            assert relative(found, expected) < TIGHT


def test_clip_in_float16_is_near_float32_in_pytorch_and_onnx_runtime(clip: tuple[str, Any, Path]) -> None:
    _, reference, folder = clip
    ids, model = clip_ids(4, 9), load_clip(folder).half()
    (outputs,) = run_onnx(TextEncoderGraph(model), "ids", ids, ("context", "pooled"), [ids])
    for in_torch, in_onnx, expected in zip(
        model(ids), outputs, reference_outputs(reference, ids), strict=True
    ):
        assert in_torch.dtype == torch.float16
        assert relative(in_torch, expected) < 5e-3
        assert relative(in_onnx, expected) < 5e-3


def test_clip_is_the_same_from_shards_and_from_an_fp16_variant(tmp_path: Path) -> None:
    reference = reference_clip("G")
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same_state(load_clip(tmp_path / "shards"), load_clip(tmp_path / "whole"))
    reference.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert [p.name for p in (tmp_path / "half").glob("*.safetensors")] == ["model.fp16.safetensors"]
    half = load_clip(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert same_state(half, load_clip(tmp_path / "whole").half())


@pytest.mark.parametrize("sharded", [False, True])
def test_an_index_without_its_shards_does_not_hide_a_complete_variant(tmp_path: Path, sharded: bool) -> None:
    """As in a folder that was downloaded with the file pattern *.fp16.*, and all indices."""
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "model-00001-of-00002.safetensors"}}'
    )
    name = "model.fp16-00001-of-00001.safetensors" if sharded else "model.fp16.safetensors"
    with pytest.raises(
        CheckpointInvalid, match=r"the 1 files of model\.safetensors\.index\.json, found .* missing"
    ):
        open_tensors(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / name)
    if sharded:
        (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": {"x": name}}))
    assert list(open_tensors(tmp_path)) == ["x"]


@pytest.mark.parametrize("weight_map", [{"x": 3}, {"x": ["a"], "y": None}, []])
def test_rejects_a_weight_map_that_names_no_files(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointInvalid, match=r"index\.json: expected JSON with a weight_map, found none"):
        open_tensors(tmp_path)


def test_clip_from_a_single_file_is_bit_identical(clip: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, reference, folder = clip
    prefix = PREFIXES[kind]
    state = {prefix + name: value for name, value in reference.state_dict().items()}
    state[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(MAX_TOKENS).unsqueeze(0)
    state[f"{prefix}logit_scale"] = torch.tensor(4.6)
    save_file(state, tmp_path / "sd3.safetensors")
    model = clip_from_tensors(
        open_tensors(tmp_path / "sd3.safetensors").with_prefix(prefix), KINDS[kind]["hidden_act"]
    )  # type: ignore[arg-type]
    assert model.spec == load_clip(folder).spec
    assert same_state(model, load_clip(folder))


def test_clip_without_a_projection_gets_an_identity_projection(tmp_path: Path) -> None:
    reference = reference_clip("L").half()
    state = {name: v for name, v in reference.state_dict().items() if name != "text_projection.weight"}
    save_file(state, tmp_path / "clip.safetensors")
    model = clip_from_tensors(open_tensors(tmp_path / "clip.safetensors"), "quick_gelu")
    assert torch.equal(model.projection.weight, torch.eye(128, dtype=torch.float16))


@pytest.mark.parametrize("tokens", [6, 200])
def test_t5_matches_transformers(t5: tuple[Any, Path], tokens: int) -> None:
    reference, folder = t5
    ids = t5_ids(2, tokens)
    assert relative(load_t5(folder)(ids)[0], reference(ids).last_hidden_state) < TIGHT


def test_t5_in_onnx_runtime_matches_transformers_at_any_batch_size(t5: tuple[Any, Path]) -> None:
    reference, folder = t5
    feeds = [t5_ids(1, 150), t5_ids(3, 150)]
    outputs = run_onnx(TextEncoderGraph(load_t5(folder)), "ids", t5_ids(2, 150), ("context",), feeds)
    for ids, (context,) in zip(feeds, outputs, strict=True):
        assert relative(context, reference(ids).last_hidden_state) < TIGHT


@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (8, 20)])
def test_relative_position_buckets_match_transformers(buckets: int, reach: int) -> None:
    distances = torch.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(distances, True, buckets, reach)
    assert [relative_position_bucket(d, buckets, reach) for d in distances.tolist()] == expected.tolist()


def test_t5_in_float16_handles_activations_beyond_the_float16_range(t5: tuple[Any, Path]) -> None:
    model = load_t5(t5[1])
    for layer in model.layers:
        layer.mlp_in.weight.mul_(300)  # type: ignore[union-attr]
        layer.mlp_out.weight.mul_(300)  # type: ignore[union-attr]
    magnitudes = []
    hooks = [
        linear.register_forward_hook(lambda *call: magnitudes.append(float(call[2].abs().max())))
        for linear in model.modules()
        if isinstance(linear, Linear)
    ]
    ids = t5_ids(2, 30)
    (expected,) = model(ids)
    assert max(magnitudes) > 65_504
    for hook in hooks:
        hook.remove()
    model.half()
    assert relative(model(ids)[0], expected) < 1e-2
    ((context,),) = run_onnx(TextEncoderGraph(model), "ids", ids, ("context",), [ids])
    assert relative(context, expected) < 1e-2


def test_t5_in_float16_and_bfloat16_is_near_float32(t5: tuple[Any, Path]) -> None:
    reference, folder = t5
    ids = t5_ids(2, 60)
    assert relative(load_t5(folder).half()(ids)[0], reference(ids).last_hidden_state) < 5e-3
    assert relative(load_t5(folder).bfloat16()(ids)[0], reference(ids).last_hidden_state) < 5e-2


def test_float16_encoders_can_compute_in_float32(clip: tuple[str, Any, Path], t5: tuple[Any, Path]) -> None:
    pairs: list[tuple[nn.Module, nn.Module, Tensor]] = [
        (load_clip(clip[2]).half(), load_clip(clip[2]).half().float(), clip_ids(2, 8)),
        (load_t5(t5[1]).half(), load_t5(t5[1]).half().float(), t5_ids(2, 12)),
    ]
    for half, full, ids in pairs:
        with in_float32(half):
            outputs = half(ids)
        assert torch.equal(outputs[0], full(ids)[0])


def test_t5_is_the_same_from_shards_and_float16_files(tmp_path: Path) -> None:
    reference = reference_t5()
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same_state(load_t5(tmp_path / "shards"), load_t5(tmp_path / "whole"))
    reference.half().save_pretrained(tmp_path / "half")
    half = load_t5(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert same_state(half, load_t5(tmp_path / "whole").half())


def test_t5_keeps_float32_mlp_outputs_among_float16_weights(tmp_path: Path) -> None:
    reference_t5().save_pretrained(tmp_path / "whole")
    T5EncoderModel.from_pretrained(tmp_path / "whole", dtype=torch.float16).save_pretrained(
        tmp_path / "mixed"
    )
    model = load_t5(tmp_path / "mixed")
    assert model.layers[0].mlp_out.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert model.layers[0].mlp_in.weight.dtype == torch.float16  # type: ignore[union-attr]
    ids = t5_ids(2, 40)
    assert relative(model(ids)[0], load_t5(tmp_path / "whole")(ids)[0]) < 5e-3


@pytest.mark.parametrize(
    "words", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")]
)
def test_t5_from_a_single_file_is_bit_identical(
    t5: tuple[Any, Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    reference, folder = t5
    saved = load_file(folder / "model.safetensors")
    table = reference.shared.weight.clone()
    state = {
        name: v for name, v in saved.items() if name not in ("shared.weight", "encoder.embed_tokens.weight")
    }
    state |= {f"{name}.weight": table.clone() for name in words}
    state["decoder.block.0.layer.0.layer_norm.weight"] = torch.ones(48)
    save_file({T5 + name: v for name, v in state.items()}, tmp_path / "sd3.safetensors")
    model = t5_from_tensors(open_tensors(tmp_path / "sd3.safetensors").with_prefix(T5))
    assert model.spec == load_t5(folder).spec
    assert same_state(model, load_t5(folder))


def test_float8_weights_become_float16_with_the_same_values(tmp_path: Path) -> None:
    state = {name: value.to(torch.float8_e4m3fn) for name, value in reference_t5().state_dict().items()}
    save_file({n: v for n, v in state.items() if "embed_tokens" not in n}, tmp_path / "t5.safetensors")
    model = t5_from_tensors(open_tensors(tmp_path / "t5.safetensors"))
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert torch.equal(model.words.weight.float(), state["shared.weight"].float())


def test_error_names_missing_and_unknown_tensors(
    clip: tuple[str, Any, Path], t5: tuple[Any, Path], tmp_path: Path
) -> None:
    for load, folder, missing in (
        (load_clip, clip[2], "text_model.encoder.layers.1.mlp.fc2.bias"),
        (load_t5, t5[1], "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"),
    ):
        target = tmp_path / load.__name__
        target.mkdir()
        state = load_file(folder / "model.safetensors")
        state["surprise.weight"] = state.pop(missing)
        save_file(state, target / "model.safetensors")
        (target / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(CheckpointInvalid, match=f"{missing} missing; surprise.weight unknown"):
            load(target)


def test_rejects_weights_that_are_not_floats(t5: tuple[Any, Path], tmp_path: Path) -> None:
    state = load_file(t5[1] / "model.safetensors")
    state["encoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(64, 48, dtype=torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((t5[1] / "config.json").read_text())
    with pytest.raises(CheckpointInvalid, match=r"SelfAttention\.q\.weight is torch\.int8"):
        load_t5(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type clip_text_model"),
        ({"hidden_act": "relu"}, "hidden_act quick_gelu or gelu, found 'relu'"),
        ({"eos_token_id": 50}, "eos_token_id 2 or 119, found 50"),
        ({"num_attention_heads": 5}, "num_attention_heads that divide hidden_size 128, found 5"),
        ({"hidden_size": -1}, "hidden_size in 1"),
        ({"hidden_size": "128"}, "hidden_size in 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers in 1..1000"),
        ({"num_hidden_layers": 4}, r"layers\.3\.mlp\.fc1\.bias missing"),
        ({"hidden_size": 64}, r"found 50 that do not fit"),
        ({"layer_norm_eps": "small"}, "a number layer_norm_eps"),
    ],
)
def test_rejects_an_invalid_clip_config_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    reference_clip("L").save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointInvalid, match=message) as caught:
        load_clip(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, "model_type t5"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj gated-gelu, found 'relu'"),
        ({"feed_forward_proj": None}, "feed_forward_proj gated-gelu, found 'relu'"),
        ({"relative_attention_num_buckets": 30}, "divisible by 4"),
        ({"num_heads": 0}, "num_heads in 1"),
    ],
)
def test_rejects_an_invalid_t5_config_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    reference_t5().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointInvalid, match=message) as caught:
        load_t5(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "{", "[1]", "\0\0"])
def test_rejects_a_folder_without_a_valid_config(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for load in (load_clip, load_t5):
        with pytest.raises(CheckpointInvalid, match=r"config\.json: expected .*, found"):
            load(tmp_path)


def test_rejects_single_files_without_encoder_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    tensors = open_tensors(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"token_embedding\.weight, found none"):
        clip_from_tensors(tensors, "gelu")
    with pytest.raises(CheckpointInvalid, match=r"shared\.weight, found none"):
        t5_from_tensors(tensors)


def test_full_size_models_have_the_published_parameter_counts() -> None:
    large = CLIPTextSpec(width=1280, heads=20, layers=32, mlp_width=5120, projection=1280, activation="gelu")
    with torch.device("meta"):
        models = [CLIPText(CLIPTextSpec()), CLIPText(large), T5Encoder(T5Spec())]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [
        123_650_304,
        694_659_840,
        4_762_310_656,
    ]
