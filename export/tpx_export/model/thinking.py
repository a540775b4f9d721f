"""The recursive sparse module, with which the visual tokens of an attention layer think for T latent steps.

    a_0 = x
    for t = 1 .. T-1:   e = argmax gate(a, y);  q, k, v = B_e A_e LN(mod_t(a))          a = attention(q, k, v; text) + x
    t = T:              e = argmax gate(a, y);  q, k, v = B_e A_e LN(mod_T(a)) + W x    and the block continues

(arXiv 2604.25299.) docs/method.md compares each point with the paper, and says what we chose where it gives no details.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpx_export.model.checks import check_positive
from tpx_export.model.conditions import GATE_WIDTH, ConditionProjection
from tpx_export.model.routed_lora import mixed_lora, routed_lora


@dataclass(frozen=True)
class ThinkingSpec:
    """The thinking blocks and their adapters. The last three fields are the paper's ablations; defaults are its method.

    `base_every_step` adds W x, of the block's input, at each step. The paper can also be read as W of the running state.
    """

    blocks: tuple[int, ...] = (1, 2, 3)
    experts: int = 4
    rank: int = 32
    max_depth: int = 3
    temperature: float = 5.0
    modulation: bool = True
    gate_sees_condition: bool = True
    base_every_step: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "experts", "rank", "max_depth")
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks)) or self.blocks[0] < 0:
            raise ValueError(f"expected blocks in ascending order from 0 or more, got {self.blocks}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")

    @property
    def conditions_width(self) -> int:
        """How many values of a row of conditions are for the gates."""
        return GATE_WIDTH * len(self.blocks) if self.gate_sees_condition else 0


class Gate(nn.Module):
    """Tokens [B, N, D] and, if the gate sees it, `condition`'s output [B, 1, 64] -> logits over experts [B, N, M]."""

    def __init__(self, width: int, experts: int, sees_condition: bool) -> None:
        super().__init__()
        self.token = nn.Linear(width, GATE_WIDTH)
        self.condition = ConditionProjection(width, 1, GATE_WIDTH, bias=False) if sees_condition else None
        self.out = nn.Linear(GATE_WIDTH, experts)

    def forward(self, tokens: Tensor, condition: Tensor | None) -> Tensor:
        # Both are the same for all tokens and latent steps, so that graphs add them once per block.
        bias = self.token.bias if condition is None else self.token.bias + condition
        hidden = F.linear(F.layer_norm(tokens, tokens.shape[-1:]), self.token.weight) + bias
        return self.out(F.silu(hidden))


class Thinking(nn.Module):
    """The experts, the gate and the modulations of one block."""

    def __init__(self, width: int, spec: ThinkingSpec) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Gate(width, spec.experts, spec.gate_sees_condition)
        self.a = nn.Parameter(torch.randn(spec.experts, width, spec.rank) * width**-0.5)
        self.b = nn.Parameter(torch.zeros(spec.experts, spec.rank, 3 * width))
        self.scale = nn.Parameter(torch.ones(spec.max_depth, width), requires_grad=spec.modulation)
        self.shift = nn.Parameter(torch.zeros(spec.max_depth, width), requires_grad=spec.modulation)

    def forward(
        self,
        x: Tensor,
        gate_condition: Tensor | None,
        depth: int,
        base_qkv: Callable[[], Tensor],
        attend: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens x [B, N, D] -> q, k, v of the last step [B, N, 3D], and the routes of every step.

        `gate_condition` [B, 1, 64] is the gate's projection of the condition, None if the gate does not see it. `base_qkv()`
        returns W x of the frozen base; `attend(qkv)` returns the visual rows of joint attention, [B, N, D]. In training mode
        routes are straight-through Gumbel-Softmax samples; in evaluation mode they are the gate's argmax.
        """
        hidden, routes = x, []
        for step in range(depth):
            delta, route = self._routed_lora(hidden, gate_condition, step)
            routes.append(route)
            last = step == depth - 1
            qkv = base_qkv() + delta if last or self.spec.base_every_step else delta
            if not last:
                hidden = attend(qkv) + x
        return qkv, routes

    def _routed_lora(self, tokens: Tensor, gate_condition: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale[step].to(tokens.dtype), self.shift[step].to(tokens.dtype)
        h = F.layer_norm(tokens * scale + shift, tokens.shape[-1:])
        # A route must not depend on the rounding of float16.
        logits = self.gate(tokens.float(), gate_condition)
        # In training, experts are float32 over a base of lower precision.
        a, b = self.a.to(h.dtype), self.b.to(h.dtype)
        if self.training:
            weights = F.gumbel_softmax(logits.float(), tau=self.spec.temperature, hard=True).to(h.dtype)
            return mixed_lora(h, weights, a, b), weights.argmax(-1)
        route = logits.argmax(-1)
        return routed_lora(h, route, a, b), route
