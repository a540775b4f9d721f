"""The runtime's sampling loop around any network, so that baselines differ from it only in the network calls."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpx_runtime.bundle import Bundle, GraphVariant
from tpx_runtime.denoising import Batch, Denoiser, Trajectory
from tpx_runtime.engine import Arrays
from tpx_runtime.generator import Generator
from tpx_runtime.graphs import Graphs
from tpx_runtime.guidance import apply_guidance
from tpx_runtime.sampling import Array

# Arrays in the order of a graph's inputs -> its outputs.
Network = Callable[..., Sequence[npt.NDArray[Any]]]


class _NetworkSession:
    """A network with the interface of the runtime's sessions."""

    def __init__(self, network: Network, names: Sequence[str]) -> None:
        self._network, self._names = network, names

    def run(self, inputs: Arrays) -> Arrays:
        return dict(zip(self._names, self._network(*inputs.values()), strict=False))


class NetworkEngine:
    """An engine for the runtime that runs networks instead of a bundle's text encoders and decoder."""

    variant: GraphVariant = "plain"
    device_loops = None

    def __init__(self, name: str, networks: dict[str, Network]) -> None:
        self.name, self._networks = name, networks

    def open(self, path: Path) -> _NetworkSession:
        folder = path.parent.name
        names = ("image",) if folder == "vae_decoder" else ("context", "pooled")
        return _NetworkSession(self._networks[folder], names)


class BaselineDenoiser(Denoiser):
    """The runtime's loop around a network of latents, timestep and conditioning; both guidance branches in one call."""

    def __init__(self, bundle: Bundle, graphs: Graphs, network: Network) -> None:
        super().__init__(bundle, graphs)
        self._network = network

    def trajectory(self, batch: Batch, every_step: bool) -> Trajectory:
        guided = batch.job.guidance != 1

        def predict(x: Array, timestep: float) -> Array:
            rows = np.concatenate([x, x] if guided else [x]).astype(np.float32, copy=False)
            times = np.full(len(rows), timestep, np.float32)
            prediction: Array = self._network(rows, times, *batch.conditioning.values())[0]
            if not guided:
                return prediction
            negative, prompt = np.split(prediction, 2)
            return apply_guidance(negative, prompt, batch.job.guidance, self._model.guided_channels)

        yield from batch.denoise(predict, self.sampler(batch.job))


class BaselineGenerator(Generator):
    """The runtime's generator on networks: `denoiser`, and the others by their folders in the bundle."""

    def __init__(self, bundle: Bundle, name: str, denoiser: Network, others: dict[str, Network]) -> None:
        super().__init__(bundle, NetworkEngine(name, others))
        self.denoiser = BaselineDenoiser(bundle, self._graphs, denoiser)
