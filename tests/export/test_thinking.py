"""The recursive sparse module compared with the paper's equations, written out token by token."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import make_tiny
from torch import Tensor, nn

from tpx_export.model import MMDiT, MMDiTSpec, ThinkingSpec
from tpx_export.model.mmdit import JointBlock, attention, modulate
from tpx_export.model.routed_lora import mixed_lora, routed_lora
from tpx_export.model.thinking import Gate, Thinking

SPEC = {
    "latent_size": (8, 8),
    "width": 64,
    "heads": 2,
    "blocks": 3,
    "context_tokens": 5,
    "context_width": 16,
    "pooled_width": 16,
}
THINKING = ThinkingSpec(blocks=(1,), experts=3, rank=4, max_depth=3)


def randomised(model: MMDiT, seed: int = 0) -> MMDiT:
    """Move every parameter away from its initial value: outputs initialised to zero would hide errors before them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return (
        torch.randn(batch, 4, 8, 8),
        torch.rand(batch) * 1000,
        torch.randn(batch, 5, 16),
        torch.randn(batch, 16),
    )


def test_routed_lora_multiplies_each_token_by_its_own_expert() -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(2, 7, 6), torch.randn(3, 6, 2), torch.randn(3, 2, 5)
    expert = torch.randint(3, (2, 7))
    found = routed_lora(x, expert, a, b)
    for i in range(2):
        for n in range(7):
            e = int(expert[i, n])
            torch.testing.assert_close(found[i, n], x[i, n] @ a[e] @ b[e])


def test_routed_lora_with_all_tokens_on_one_expert() -> None:
    x, a, b = torch.randn(1, 4, 6), torch.randn(5, 6, 2), torch.randn(5, 2, 3)
    found = routed_lora(x, torch.full((1, 4), 3), a, b)
    torch.testing.assert_close(found, x @ a[3] @ b[3])


def test_routed_lora_passes_opcheck() -> None:
    x, expert = torch.randn(2, 3, 4), torch.randint(2, (2, 3))
    torch.library.opcheck(
        torch.ops.tpx.RoutedLora.default, (x, expert, torch.randn(2, 4, 1), torch.randn(2, 1, 5))
    )


def test_mixed_lora_with_one_hot_weights_equals_routed_lora() -> None:
    x, a, b = torch.randn(2, 7, 6), torch.randn(3, 6, 2), torch.randn(3, 2, 5)
    expert = torch.randint(3, (2, 7))
    mixed = mixed_lora(x, F.one_hot(expert, 3).float(), a, b)
    torch.testing.assert_close(mixed, routed_lora(x, expert, a, b))


def test_untrained_thinking_changes_nothing_at_any_depth() -> None:
    base = randomised(MMDiT(MMDiTSpec(**SPEC)))
    thinking = MMDiT(MMDiTSpec(**SPEC, thinking=THINKING)).eval()
    thinking.load_state_dict(base.state_dict(), strict=False)
    expected, _ = base(*inputs(), 1)
    for depth in (1, 2, 3):
        torch.testing.assert_close(thinking(*inputs(), depth)[0], expected, rtol=1e-5, atol=1e-6)


def gate_condition(gate: Gate, y: Tensor) -> Tensor:
    """The gate's projection of the condition y [B, D]: [B, 1, 64]."""
    assert gate.condition is not None
    return gate.condition(F.silu(y)).unsqueeze(1)


def paper_recursion(
    block: JointBlock, x: Tensor, c: Tensor, y: Tensor, depth: int
) -> tuple[Tensor, list[Tensor]]:
    """q, k, v of the last step and all routes: the recursion of method.md, one token at a time."""
    thinking = block.thinking
    assert isinstance(thinking, Thinking)
    act = F.silu(y).unsqueeze(1)
    shift, scale = block.visual.modulation(act).chunk(6, dim=-1)[:2]
    c_shift, c_scale = block.text.modulation(act).chunk(2 if block.context_pre_only else 6, dim=-1)[:2]
    x_in, c_in = modulate(x, shift, scale), modulate(c, c_shift, c_scale)
    state, routes = x_in, []
    for t in range(depth):
        expert = thinking.gate(state, gate_condition(thinking.gate, y)).argmax(-1)
        routes.append(expert)
        rows = []
        for i in range(x.shape[0]):
            for n in range(x.shape[1]):
                e = int(expert[i, n])
                h = F.layer_norm(thinking.scale[t] * state[i, n] + thinking.shift[t], (x.shape[2],))
                rows.append(h @ thinking.a[e] @ thinking.b[e])
        qkv = torch.stack(rows).unflatten(0, x.shape[:2])
        if t < depth - 1:
            q, k, v = block.visual.split_heads(qkv)
            _, c_k, c_v = block.text.split_heads(block.text.qkv(c_in))
            state = attention(q, torch.cat([k, c_k], 2), torch.cat([v, c_v], 2)) + x_in
    return qkv + block.visual.qkv(x_in), routes


def test_recursion_matches_the_papers_equations() -> None:
    model = randomised(MMDiT(MMDiTSpec(**SPEC, thinking=THINKING)))
    block = model.blocks[1]
    assert isinstance(block, JointBlock) and block.thinking
    torch.manual_seed(2)
    x, c, y = torch.randn(2, 16, 64), torch.randn(2, 5, 64), torch.randn(2, 64)
    for depth in (1, 2, 3):
        outputs: list[Tensor] = []
        handle = block.thinking.register_forward_hook(
            lambda _, __, out, outputs=outputs: outputs.append(out[0])
        )
        act = F.silu(y).unsqueeze(1)
        modulations = [*block.visual.modulation(act).chunk(6, -1), *block.text.modulation(act).chunk(6, -1)]
        _, _, routes = block(x, c, modulations, gate_condition(block.thinking.gate, y), depth)
        handle.remove()
        expected, expected_routes = paper_recursion(block, x, c, y, depth)
        torch.testing.assert_close(outputs[0], expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(routes, expected_routes, strict=True))
        assert len(routes) == depth


def test_depth_changes_the_prediction_and_the_number_of_routes() -> None:
    model = randomised(MMDiT(MMDiTSpec(**SPEC, thinking=THINKING)))
    outputs = [model(*inputs(), depth) for depth in (1, 2, 3)]
    assert [routes.shape for _, routes in outputs] == [(2, depth, 16) for depth in (1, 2, 3)]
    assert not torch.allclose(outputs[0][0], outputs[1][0], rtol=1e-3)
    assert not torch.allclose(outputs[1][0], outputs[2][0], rtol=1e-3)


def test_routes_depend_on_latents_timestep_and_condition() -> None:
    model = randomised(MMDiT(MMDiTSpec(**SPEC, thinking=THINKING)), seed=3)
    latents, time, context, pooled = inputs()
    routes = model(latents, time, context, pooled, 2)[1]
    assert routes.unique().numel() > 1
    for other in ((-latents, time, pooled), (latents, 1000 - time, pooled), (latents, time, -3 * pooled)):
        assert not torch.equal(model(*other[:2], context, other[2], 2)[1], routes)
    block = model.blocks[1]
    assert isinstance(block, JointBlock) and block.thinking
    tokens = torch.randn(1, 16, 64)
    gate = block.thinking.gate
    logits_at_zeros, logits_at_ones = (
        gate(tokens, gate_condition(gate, y)) for y in (torch.zeros(1, 64), torch.ones(1, 64))
    )
    assert not torch.allclose(logits_at_zeros, logits_at_ones)


def test_gate_that_ignores_the_condition_has_no_layer_for_it() -> None:
    spec = replace(THINKING, gate_sees_condition=False)
    model = randomised(MMDiT(MMDiTSpec(**SPEC, thinking=spec)))
    assert not [name for name in model.state_dict() if "gate.condition" in name]
    conditions: list[Tensor | None] = []
    for block in model.blocks:
        if block.thinking:
            block.thinking.gate.register_forward_hook(lambda _, args, __: conditions.append(args[1]))
    model(*inputs(), 2)
    assert conditions == [None, None]


@pytest.mark.parametrize("sees_condition", [True, False])
def test_the_gate_is_two_layers_around_silu(sees_condition: bool) -> None:
    gate, tokens = Gate(64, 3, sees_condition), torch.randn(2, 16, 64)
    condition = gate_condition(gate, torch.randn(2, 64)) if sees_condition else None
    hidden = gate.token(F.layer_norm(tokens, [64])) + (0 if condition is None else condition)
    torch.testing.assert_close(gate(tokens, condition), gate.out(F.silu(hidden)))


def test_every_thinking_parameter_gets_a_gradient() -> None:
    model = randomised(MMDiT(MMDiTSpec(**SPEC, thinking=THINKING))).train()
    model(*inputs(), 3)[0].square().mean().backward()
    thinking = model.blocks[1].thinking
    assert isinstance(thinking, Thinking)
    for name, parameter in thinking.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gumbel_routes_are_distributed_as_the_gates_softmax() -> None:
    """argmax(logits + Gumbel noise) picks expert e with probability softmax(logits)_e, at any temperature."""
    torch.manual_seed(0)
    thinking = Thinking(8, ThinkingSpec(experts=3, rank=2, max_depth=1)).train()
    tokens, y = torch.randn(1, 1, 8), torch.zeros(1, 8)
    with torch.no_grad():
        condition = gate_condition(thinking.gate, y)
        probabilities = thinking.gate(tokens, condition).softmax(-1)[0, 0]
        _, routes = thinking(
            tokens.expand(1, 20_000, 8), condition, 1, lambda: torch.zeros(1, 20_000, 24), lambda qkv: qkv
        )
    frequencies = torch.bincount(routes[0].flatten(), minlength=3) / 20_000
    torch.testing.assert_close(frequencies, probabilities, atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_straight_through_gradients_are_those_of_the_softmax_at_the_temperature(temperature: float) -> None:
    """The forward pass uses the sampled expert alone; the backward pass that of the soft weights (Jang et al. 2017)."""
    torch.manual_seed(1)
    spec = ThinkingSpec(experts=3, rank=2, max_depth=1, temperature=temperature)
    thinking = Thinking(8, spec).train()
    nn.init.normal_(thinking.b)
    tokens = torch.randn(1, 6, 8)
    condition = gate_condition(thinking.gate, torch.zeros(1, 8)).detach()
    bias = thinking.gate.out.bias
    torch.manual_seed(2)
    delta, _ = thinking(tokens, condition, 1, lambda: torch.zeros(1, 6, 24), lambda qkv: qkv)
    (gradient,) = torch.autograd.grad(delta.sum(), bias)
    outputs = F.layer_norm(tokens, (8,)).unsqueeze(1) @ thinking.a @ thinking.b
    torch.manual_seed(2)
    weights = F.gumbel_softmax(thinking.gate(tokens, condition), tau=temperature)
    (expected,) = torch.autograd.grad((weights * outputs.sum(-1).transpose(1, 2).detach()).sum(), bias)
    torch.testing.assert_close(gradient, expected)


def test_prediction_does_not_depend_on_the_batch() -> None:
    """Tokens of all samples are grouped by expert; each result must return to its own token."""
    model = make_tiny(THINKING).transformer
    torch.manual_seed(4)
    latents, time = torch.randn(3, 4, 8, 8), torch.rand(3) * 1000
    context, pooled = torch.randn(3, 12, 32), torch.randn(3, 32)
    batched = model(latents, time, context, pooled, 3)[0]
    single = torch.cat(
        [
            model(latents[i : i + 1], time[i : i + 1], context[i : i + 1], pooled[i : i + 1], 3)[0]
            for i in range(3)
        ]
    )
    torch.testing.assert_close(batched, single, rtol=1e-4, atol=1e-5)


def test_routed_lora_under_autocast_keeps_the_input_dtype() -> None:
    x, a, b = torch.randn(2, 7, 6), torch.randn(3, 6, 2), torch.randn(3, 2, 5)
    expert = torch.randint(3, (2, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = routed_lora(x, expert, a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, routed_lora(x, expert, a, b), rtol=0.05, atol=0.05)
