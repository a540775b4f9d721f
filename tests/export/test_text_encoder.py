"""The text encoder of TPX checkpoints, compared with PyTorch's own transformer layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.text_encoder import TextEncoder, TextEncoderSpec

SPEC = TextEncoderSpec(vocabulary=tuple("abcdefgh"), tokens=5, width=16, heads=2, layers=2)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@torch.no_grad()
def test_layers_are_pre_norm_transformer_layers_and_the_first_token_is_pooled() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(SPEC).eval()
    for parameter in encoder.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.tensor([[1, 5, 6, 2, 0], [1, 7, 2, 0, 0]])
    expected = encoder.words.weight[ids] + encoder.places
    for ours in encoder.layers:
        layer = nn.TransformerEncoderLayer(
            16, 2, dim_feedforward=64, dropout=0.0, activation=gelu, norm_first=True, batch_first=True
        ).eval()
        state = {
            "self_attn.in_proj_weight": ours.qkv.weight,
            "self_attn.in_proj_bias": ours.qkv.bias,
            "self_attn.out_proj.weight": ours.proj.weight,
            "self_attn.out_proj.bias": ours.proj.bias,
        }
        for name, part in (
            ("linear1", ours.mlp_in),
            ("linear2", ours.mlp_out),
            ("norm1", ours.norm1),
            ("norm2", ours.norm2),
        ):
            state |= {f"{name}.weight": part.weight, f"{name}.bias": part.bias}
        layer.load_state_dict(state)
        expected = layer(expected)
    expected = F.layer_norm(expected, (16,), encoder.norm.weight, encoder.norm.bias)
    context, pooled = encoder(ids)
    torch.testing.assert_close(context, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled, context[:, 0])
    assert not torch.allclose(pooled, context[:, 1])
