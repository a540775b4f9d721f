"""SD3's loss: the velocity of a straight path from picture to noise (Esser et al., 2403.03206; Lipman et al., 2210.02747).

    x = (1 - sigma) x0 + sigma epsilon,    loss = E || v(x, 1000 sigma, caption) - (epsilon - x0) ||^2
    sigma = s u / (1 + (s - 1) u),         u = 1 / (1 + exp(-z)), z ~ N(0, 1)

s is the shift of the base's sampling schedule, 3 for SD3: as diffusers fine-tunes SD3, training sees the noise levels that
sampling visits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpx_export.training.data import Told
from tpx_export.training.frozen import predict


@dataclass(frozen=True)
class FlowLoss:
    """The loss of a batch. All that is random in it, except the routes, comes from `stream`."""

    shift: float = 1.0

    def __call__(
        self, model: nn.Module, clean: Tensor, told: Told, depth: int, stream: torch.Generator
    ) -> Tensor:
        """Latents float32 [B, C, S, S] -> a scalar."""
        even = torch.sigmoid(torch.randn(len(clean), generator=stream))
        sigma = (self.shift * even / (1 + (self.shift - 1) * even)).to(clean.device)
        noise = torch.randn(clean.shape, generator=stream).to(clean.device)
        part = sigma.view(-1, 1, 1, 1)
        velocity = predict(model, (1 - part) * clean + part * noise, 1000 * sigma, told, depth)
        return (velocity - (noise - clean)).square().mean()
