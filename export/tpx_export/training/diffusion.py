"""DiT's training loss: epsilon, and the variance if the base predicts it (Peebles and Xie, 2212.09748).

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) epsilon,    t uniform in 0..999, beta linear from 1e-4 to 0.02
    loss = E || epsilon(x_t, t, class) - epsilon ||^2 + L_t

L_t is one term of the variational bound, in bits per value (Nichol and Dhariwal, 2102.09672): the KL divergence of
p(x_{t-1} | x_t) from q(x_{t-1} | x_t, x0), at t = 0 the negative log likelihood of x0 in bins of 2/255. It uses the detached
epsilon, so it only trains the variance. Adapters change the input of the frozen variance head: without L_t nothing would
constrain the variances that the sampler needs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpx_export.training.data import Conditioning
from tpx_export.training.frozen import predict
from tpx_runtime.sampling import TRAIN_TIMESTEPS
from tpx_runtime.sampling.diffusion import FIRST_BETA, LAST_BETA

_BETA = torch.linspace(FIRST_BETA, LAST_BETA, TRAIN_TIMESTEPS, dtype=torch.float64)
_ABAR = torch.cumprod(1 - _BETA, 0)
_ABAR_PREVIOUS = torch.cat([torch.ones(1, dtype=torch.float64), _ABAR[:-1]])
_POSTERIOR = _BETA * (1 - _ABAR_PREVIOUS) / (1 - _ABAR)  # variance of q(x_{t-1} | x_t, x0)
_MIN_LOG_VARIANCE = torch.cat(
    [_POSTERIOR[1:2], _POSTERIOR[1:]]
).log()  # at t = 0 it is 0, which has no logarithm
_MAX_LOG_VARIANCE = _BETA.log()
_X0_WEIGHT = _BETA * _ABAR_PREVIOUS.sqrt() / (1 - _ABAR)  # weight of x0 in the posterior's mean
_HALF_BIN = 1 / 255


@dataclass(frozen=True)
class DiffusionLoss:
    """The loss of a batch. All randomness except that of the routes comes from `generator`."""

    learned_sigma: bool = True

    def __call__(
        self,
        model: nn.Module,
        latents: Tensor,
        conditioning: Conditioning,
        depth: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Latents float32 [B, C, H, W] -> a scalar."""
        t = torch.randint(len(_BETA), (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = _gather(_ABAR.sqrt(), t, latents) * latents + _gather((1 - _ABAR).sqrt(), t, latents) * noise
        prediction = predict(model, noisy, t.to(latents.device, torch.float32), conditioning, depth)
        epsilon, variance = prediction[:, : latents.shape[1]], prediction[:, latents.shape[1] :]
        loss = (epsilon - noise).square().mean()
        if self.learned_sigma:
            loss = loss + variational_bound(latents, noise, epsilon.detach(), variance, t).mean()
        return loss


def variational_bound(latents: Tensor, noise: Tensor, epsilon: Tensor, variance: Tensor, t: Tensor) -> Tensor:
    """L_t of each image, [B], in bits per value; `variance` in -1..1 is the position of the log variance in its range."""
    minimum, maximum = _gather(_MIN_LOG_VARIANCE, t, latents), _gather(_MAX_LOG_VARIANCE, t, latents)
    log_variance = minimum + (variance + 1) / 2 * (maximum - minimum)
    # Both means have the same term in x_t, so their difference is that of their terms in x0.
    x0_error = _gather(((1 - _ABAR) / _ABAR).sqrt(), t, latents) * (epsilon - noise)
    mean_error = _gather(_X0_WEIGHT, t, latents) * x0_error
    divergence = 0.5 * (
        log_variance
        - minimum
        - 1
        + (minimum - log_variance).exp()
        + mean_error.square() * (-log_variance).exp()
    )
    likelihood = _negative_log_likelihood(latents, x0_error, log_variance)
    nats = torch.where((t == 0).view(-1, 1, 1, 1).to(latents.device), likelihood, divergence)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def _negative_log_likelihood(latents: Tensor, error: Tensor, log_variance: Tensor) -> Tensor:
    """-log P(bin of `latents`) of a normal with mean `latents - error`; the outermost bins extend to infinity."""
    deviation = (0.5 * log_variance).exp()
    upper = torch.special.ndtr((error + _HALF_BIN) / deviation)
    lower = torch.special.ndtr((error - _HALF_BIN) / deviation)
    upper = torch.where(latents > 0.999, 1.0, upper)
    lower = torch.where(latents < -0.999, 0.0, lower)
    return -(upper - lower).clamp(min=1e-12).log()


def _gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The values of `table` at t as float32 [B, 1, 1, 1], on the device of `like`."""
    return table[t].float().view(-1, 1, 1, 1).to(like.device)
