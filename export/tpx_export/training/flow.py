"""SD3's training loss: the velocity of a straight path from image to noise (Esser et al., 2403.03206).

    x = (1 - sigma) x0 + sigma epsilon,    loss = E || v(x, 1000 sigma, caption) - (epsilon - x0) ||^2
    sigma = s u / (1 + (s - 1) u),         u = 1 / (1 + exp(-z)), z ~ N(0, 1)

Flow matching: Lipman et al., 2210.02747. s is the shift of the base's sampling schedule, 3 for SD3: as in diffusers'
fine-tuning of SD3, training uses the noise levels that sampling visits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpx_export.training.data import Conditioning
from tpx_export.training.frozen import predict


@dataclass(frozen=True)
class FlowLoss:
    """The loss of a batch. All randomness except that of the routes comes from `generator`."""

    shift: float = 1.0

    def __call__(
        self,
        model: nn.Module,
        latents: Tensor,
        conditioning: Conditioning,
        depth: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Latents float32 [B, C, H, W] -> a scalar."""
        u = torch.sigmoid(torch.randn(len(latents), generator=generator))
        sigma = (self.shift * u / (1 + (self.shift - 1) * u)).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        sigmas = sigma.view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * latents + sigmas * noise
        velocity = predict(model, noisy, 1000 * sigma, conditioning, depth)
        return (velocity - (noise - latents)).square().mean()
