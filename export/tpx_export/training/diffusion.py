"""DiT's loss: epsilon, and where the base predicts it the variance too, as it was trained (Peebles and Xie, 2212.09748).

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) epsilon,    t uniform in 0..999, beta linear from 1e-4 to 0.02
    loss = E || epsilon(x_t, t, class) - epsilon ||^2 + L_t

L_t is one term of the variational bound, in bits per value (Nichol and Dhariwal, 2102.09672): the divergence of
p(x_{t-1} | x_t) from q(x_{t-1} | x_t, x0), at t = 0 the likelihood of x0 in bins of 2/255. The predicted epsilon is detached
in it, so that it teaches the variance alone. Adapters change the input of the frozen variance head: without L_t
nothing would keep the variance where the sampler needs it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpx_export.training.data import Told
from tpx_export.training.frozen import predict

_BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
_ABAR = torch.cumprod(1 - _BETA, 0)
_BEFORE = torch.cat([torch.ones(1, dtype=torch.float64), _ABAR[:-1]])
_POSTERIOR = _BETA * (1 - _BEFORE) / (1 - _ABAR)  # variance of q(x_{t-1} | x_t, x0)
_LEAST = torch.cat([_POSTERIOR[1:2], _POSTERIOR[1:]]).log()  # it is 0 at t = 0, which has no logarithm
_MOST = _BETA.log()
_OF_X0 = _BETA * _BEFORE.sqrt() / (1 - _ABAR)  # weight of x0 in the posterior's mean
_BIN = 1 / 255  # half a bin


@dataclass(frozen=True)
class DiffusionLoss:
    """The loss of a batch. All that is random in it, except the routes, comes from `stream`."""

    learned_sigma: bool = True

    def __call__(
        self, model: nn.Module, clean: Tensor, told: Told, depth: int, stream: torch.Generator
    ) -> Tensor:
        """Latents float32 [B, C, S, S] -> a scalar."""
        t = torch.randint(len(_BETA), (len(clean),), generator=stream)
        noise = torch.randn(clean.shape, generator=stream).to(clean.device)
        noisy = _at(_ABAR.sqrt(), t, clean) * clean + _at((1 - _ABAR).sqrt(), t, clean) * noise
        predicted = predict(model, noisy, t.to(clean.device, torch.float32), told, depth)
        epsilon, share = predicted[:, : clean.shape[1]], predicted[:, clean.shape[1] :]
        loss = (epsilon - noise).square().mean()
        if self.learned_sigma:
            loss = loss + bound(clean, noise, epsilon.detach(), share, t).mean()
        return loss


def bound(clean: Tensor, noise: Tensor, epsilon: Tensor, share: Tensor, t: Tensor) -> Tensor:
    """L_t of each picture, [B], in bits per value; `share` says in -1..1 where the log variance lies in its range."""
    least, most = _at(_LEAST, t, clean), _at(_MOST, t, clean)
    log_variance = least + (share + 1) / 2 * (most - least)
    # Both means have the same part of x_t, so they are as far apart as their parts of x0.
    x0_error = _at(((1 - _ABAR) / _ABAR).sqrt(), t, clean) * (epsilon - noise)
    apart = _at(_OF_X0, t, clean) * x0_error
    divergence = 0.5 * (
        log_variance - least - 1 + (least - log_variance).exp() + apart.square() * (-log_variance).exp()
    )
    bits = torch.where(
        (t == 0).view(-1, 1, 1, 1).to(clean.device), _surprise(clean, x0_error, log_variance), divergence
    )
    return bits.mean(dim=(1, 2, 3)) / math.log(2)


def _surprise(clean: Tensor, apart: Tensor, log_variance: Tensor) -> Tensor:
    """-log P(bin of `clean`) under a normal whose mean is `clean` minus `apart`; the outermost bins extend to infinity."""
    deviation = (0.5 * log_variance).exp()
    above = torch.special.ndtr((apart + _BIN) / deviation)
    below = torch.special.ndtr((apart - _BIN) / deviation)
    above = torch.where(clean > 0.999, 1.0, above)
    below = torch.where(clean < -0.999, 0.0, below)
    return -(above - below).clamp(min=1e-12).log()


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The values of `table` at t as float32 [B, 1, 1, 1], on the device of `like`."""
    return table[t].float().view(-1, 1, 1, 1).to(like.device)
