"""CLIP and T5 imported from folders and single files: what transformers computes, our encoders compute."""

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

WORDS, END, TOKENS = 120, 119, 20
KINDS = {
    "L": {"hidden_act": "quick_gelu", "num_hidden_layers": 3, "hidden_size": 128, "projection_dim": 128},
    "G": {"hidden_act": "gelu", "num_hidden_layers": 4, "hidden_size": 192, "projection_dim": 160},
}
PREFIXES = {"L": CLIP_L, "G": CLIP_G}


@pytest.fixture(autouse=True, scope="module")
def two_threads_without_gradients() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def their_clip(kind: str, **changes: Any) -> CLIPTextModelWithProjection:
    config = {
        **KINDS[kind],
        "vocab_size": WORDS,
        "intermediate_size": 256,
        "num_attention_heads": KINDS[kind]["hidden_size"] // 64,  # type: ignore[operator]
        "max_position_embeddings": TOKENS,
        "bos_token_id": END - 1,
        "eos_token_id": END,
        **changes,
    }
    model = CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval()
    randomise(model)
    return model


def their_t5(**changes: Any) -> T5EncoderModel:
    config = {
        "vocab_size": WORDS,
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
    for (
        block
    ) in model.encoder.block:  # scores that are not scaled would let one token win, and float16 decide which
        block.layer[0].SelfAttention.q.weight.mul_(0.25)
    return model


def clip_ids(*lengths: int, pad: int = END) -> Tensor:
    """Prompts of so many words between the marks of beginning and end, padded."""
    generator = torch.Generator().manual_seed(len(lengths))
    ids = torch.full((len(lengths), TOKENS), pad)
    for row, length in enumerate(lengths):
        words = torch.randint(1, END - 1, (length,), generator=generator)
        ids[row, : length + 2] = torch.tensor([END - 1, *words, END])
    return ids


def t5_ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(0, WORDS, (batch, tokens), generator=torch.Generator().manual_seed(batch))


def answers(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    outputs = model(ids, output_hidden_states=True)
    return outputs.hidden_states[-2], outputs.text_embeds


def edit(folder: Path, **changes: Any) -> None:
    """Change the fields of config.json; None takes one out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.fixture(scope="module", params=KINDS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A kind of CLIP, transformers' model, and the folder that it was saved in."""
    model, folder = their_clip(request.param), tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return request.param, model, folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = their_t5(), tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("pad", [END, 0])
def test_clip_says_what_transformers_says(clip: tuple[str, Any, Path], pad: int) -> None:
    _, theirs, folder = clip
    ids = clip_ids(0, 7, TOKENS - 2, pad=pad)
    for found, expected in zip(load_clip(folder)(ids), answers(theirs, ids), strict=True):
        assert relative(found, expected) < TIGHT


def test_clip_pools_at_the_end_under_both_conventions_of_configurations(tmp_path: Path) -> None:
    old = their_clip("L", eos_token_id=2)
    old.save_pretrained(tmp_path)
    ids = clip_ids(3, 9)
    ids[:, 1] = 2  # that word is no end, whatever the configuration calls it
    new = their_clip("L")
    new.load_state_dict(old.state_dict())
    pooled = load_clip(tmp_path)(ids)[1]
    assert relative(pooled, answers(old, ids)[1]) < TIGHT
    assert relative(pooled, answers(new, ids)[1]) < TIGHT


def test_clip_in_onnx_runtime_says_what_transformers_says_at_any_batch(clip: tuple[str, Any, Path]) -> None:
    _, theirs, folder = clip
    feeds = [clip_ids(5), clip_ids(0, 3, TOKENS - 2)]
    graph = TextEncoderGraph(load_clip(folder))
    for ids, outputs in zip(
        feeds, run_onnx(graph, "ids", clip_ids(4, 2), ("context", "pooled"), feeds), strict=True
    ):
        for found, expected in zip(outputs, answers(theirs, ids), strict=True):
            assert relative(found, expected) < TIGHT


def test_clip_in_float16_is_near_float32_in_pytorch_and_onnx_runtime(clip: tuple[str, Any, Path]) -> None:
    _, theirs, folder = clip
    ids, model = clip_ids(4, 9), load_clip(folder).half()
    (outputs,) = run_onnx(TextEncoderGraph(model), "ids", ids, ("context", "pooled"), [ids])
    for torch_, onnx, expected in zip(model(ids), outputs, answers(theirs, ids), strict=True):
        assert torch_.dtype == torch.float16
        assert relative(torch_, expected) < 5e-3
        assert relative(onnx, expected) < 5e-3


def test_clip_is_the_same_from_shards_and_from_an_fp16_variant(tmp_path: Path) -> None:
    theirs = their_clip("G")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same_state(load_clip(tmp_path / "shards"), load_clip(tmp_path / "whole"))
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert [p.name for p in (tmp_path / "half").glob("*.safetensors")] == ["model.fp16.safetensors"]
    half = load_clip(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert same_state(half, load_clip(tmp_path / "whole").half())


def test_clip_from_a_single_file_is_bit_identical(clip: tuple[str, Any, Path], tmp_path: Path) -> None:
    kind, theirs, folder = clip
    prefix = PREFIXES[kind]
    single = {prefix + name: value for name, value in theirs.state_dict().items()}
    single[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(TOKENS).unsqueeze(0)
    single[f"{prefix}logit_scale"] = torch.tensor(4.6)
    save_file(single, tmp_path / "sd3.safetensors")
    model = clip_from_tensors(
        open_tensors(tmp_path / "sd3.safetensors").with_prefix(prefix), KINDS[kind]["hidden_act"]
    )  # type: ignore[arg-type]
    assert model.spec == load_clip(folder).spec
    assert same_state(model, load_clip(folder))


def test_a_single_file_without_a_projection_means_the_identity(tmp_path: Path) -> None:
    theirs = their_clip("L").half()
    state = {name: v for name, v in theirs.state_dict().items() if name != "text_projection.weight"}
    save_file(state, tmp_path / "clip.safetensors")
    model = clip_from_tensors(open_tensors(tmp_path / "clip.safetensors"), "quick_gelu")
    assert torch.equal(model.projection.weight, torch.eye(128, dtype=torch.float16))


@pytest.mark.parametrize("tokens", [6, 200])
def test_t5_says_what_transformers_says(t5: tuple[Any, Path], tokens: int) -> None:
    theirs, folder = t5
    ids = t5_ids(2, tokens)
    assert relative(load_t5(folder)(ids), theirs(ids).last_hidden_state) < TIGHT


def test_t5_in_onnx_runtime_says_what_transformers_says_at_any_batch(t5: tuple[Any, Path]) -> None:
    theirs, folder = t5
    feeds = [t5_ids(1, 150), t5_ids(3, 150)]
    outputs = run_onnx(TextEncoderGraph(load_t5(folder)), "ids", t5_ids(2, 150), ("context",), feeds)
    for ids, (context,) in zip(feeds, outputs, strict=True):
        assert relative(context, theirs(ids).last_hidden_state) < TIGHT


@pytest.mark.parametrize(("buckets", "reach"), [(32, 128), (8, 20)])
def test_positions_fall_into_the_buckets_that_transformers_puts_them_in(buckets: int, reach: int) -> None:
    distances = torch.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(distances, True, buckets, reach)
    assert [relative_position_bucket(d, buckets, reach) for d in distances.tolist()] == expected.tolist()


def test_t5_in_float16_stays_finite_where_its_activations_exceed_float16(t5: tuple[Any, Path]) -> None:
    model = load_t5(t5[1])
    for layer in model.layers:
        layer.mlp_in.weight.mul_(300)  # type: ignore[union-attr]
        layer.mlp_out.weight.mul_(300)  # type: ignore[union-attr]
    most = []
    for part in (part for part in model.modules() if isinstance(part, Linear)):
        part.register_forward_hook(lambda *call: most.append(float(call[2].abs().max())))
    ids = t5_ids(2, 30)
    expected = model(ids)
    assert max(most) > 65_504
    model.half()
    assert relative(model(ids), expected) < 1e-2
    ((context,),) = run_onnx(TextEncoderGraph(model), "ids", ids, ("context",), [ids])
    assert relative(context, expected) < 1e-2


def test_t5_in_float16_is_near_float32(t5: tuple[Any, Path]) -> None:
    theirs, folder = t5
    ids = t5_ids(2, 60)
    assert relative(load_t5(folder).half()(ids), theirs(ids).last_hidden_state) < 5e-3
    assert relative(load_t5(folder).bfloat16()(ids), theirs(ids).last_hidden_state) < 5e-2


def test_encoders_of_half_weights_can_compute_in_float32(
    clip: tuple[str, Any, Path], t5: tuple[Any, Path]
) -> None:
    pairs: list[tuple[nn.Module, nn.Module, Tensor]] = [
        (load_clip(clip[2]).half(), load_clip(clip[2]).half().float(), clip_ids(2, 8)),
        (load_t5(t5[1]).half(), load_t5(t5[1]).half().float(), t5_ids(2, 12)),
    ]
    for half, whole, ids in pairs:
        with in_float32(half):
            outputs = half(ids)
        assert torch.equal(outputs[0], whole(ids)[0])


def test_t5_is_the_same_from_shards_and_half_files(tmp_path: Path) -> None:
    theirs = their_t5()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same_state(load_t5(tmp_path / "shards"), load_t5(tmp_path / "whole"))
    theirs.half().save_pretrained(tmp_path / "half")
    half = load_t5(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert same_state(half, load_t5(tmp_path / "whole").half())


def test_t5_whose_last_projections_alone_are_float32_is_taken_as_it_is(tmp_path: Path) -> None:
    their_t5().save_pretrained(tmp_path / "whole")
    T5EncoderModel.from_pretrained(tmp_path / "whole", dtype=torch.float16).save_pretrained(
        tmp_path / "mixed"
    )
    model = load_t5(tmp_path / "mixed")
    assert model.layers[0].mlp_out.weight.dtype == torch.float32  # type: ignore[union-attr]
    assert model.layers[0].mlp_in.weight.dtype == torch.float16  # type: ignore[union-attr]
    ids = t5_ids(2, 40)
    assert relative(model(ids), load_t5(tmp_path / "whole")(ids)) < 5e-3


@pytest.mark.parametrize(
    "words", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")]
)
def test_t5_from_a_single_file_is_bit_identical(
    t5: tuple[Any, Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    theirs, folder = t5
    saved = load_file(folder / "model.safetensors")
    table = theirs.shared.weight.clone()
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
    state = {name: value.to(torch.float8_e4m3fn) for name, value in their_t5().state_dict().items()}
    save_file({n: v for n, v in state.items() if "embed_tokens" not in n}, tmp_path / "t5.safetensors")
    model = t5_from_tensors(open_tensors(tmp_path / "t5.safetensors"))
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert torch.equal(model.words.weight.float(), state["shared.weight"].float())


def test_missing_and_unknown_tensors_are_named_together(
    clip: tuple[str, Any, Path], t5: tuple[Any, Path], tmp_path: Path
) -> None:
    for load, folder, missing in (
        (load_clip, clip[2], "text_model.encoder.layers.1.mlp.fc2.bias"),
        (load_t5, t5[1], "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"),
    ):
        place = tmp_path / load.__name__
        place.mkdir()
        state = load_file(folder / "model.safetensors")
        state["surprise.weight"] = state.pop(missing)
        save_file(state, place / "model.safetensors")
        (place / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(CheckpointInvalid, match=f"{missing} missing; surprise.weight unknown"):
            load(place)


def test_weights_that_are_no_floats_are_refused(t5: tuple[Any, Path], tmp_path: Path) -> None:
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
def test_a_clip_configuration_that_cannot_be_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    their_clip("L").save_pretrained(tmp_path)
    edit(tmp_path, **changes)
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
def test_a_t5_configuration_that_cannot_be_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    their_t5().save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointInvalid, match=message):
        load_t5(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[1]", "\0\0"])
def test_a_folder_without_a_configuration_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    for load in (load_clip, load_t5):
        with pytest.raises(CheckpointInvalid, match=r"config\.json: expected .*, found"):
            load(tmp_path)


def test_single_files_of_other_things_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    tensors = open_tensors(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointInvalid, match=r"token_embedding\.weight, found none"):
        clip_from_tensors(tensors, "gelu")
    with pytest.raises(CheckpointInvalid, match=r"shared\.weight, found none"):
        t5_from_tensors(tensors)


def test_full_sizes_have_the_parameters_that_are_known() -> None:
    large = CLIPTextSpec(width=1280, heads=20, layers=32, mlp_width=5120, projection=1280, activation="gelu")
    with torch.device("meta"):
        models = [CLIPText(CLIPTextSpec()), CLIPText(large), T5Encoder(T5Spec())]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [
        123_650_304,
        694_659_840,
        4_762_310_656,
    ]
