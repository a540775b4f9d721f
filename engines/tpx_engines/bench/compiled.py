"""The torch.compile baseline: the checkpoint's transformer and decoder, with the fastest of several inductor settings.

Needs torch and a C++ compiler. The text encoder stays eager: a prompt is encoded only once, so compiling it would only add
compile time.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch._dynamo

from tpx_runtime.bundle import Bundle

from .baselines import (
    TORCH_DEVICES,
    Decoder,
    Denoiser,
    network,
    open_pipeline,
    text_encoders,
    use_kernel,
)
from .process import MeasurementFailed
from .runner import Runner, Workload
from .sampling import BaselineGenerator, Network

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "default": {},
        "freezing": {"freezing": True},
        "freezing + max-autotune": {"freezing": True, "max_autotune": True},
    },
    "gpu": {
        "default": {},
        "CUDA graphs": {"triton.cudagraphs": True},
        "CUDA graphs + max-autotune": {"triton.cudagraphs": True, "max_autotune": True},
    },
}
_CALLS = 7


def compiled_runner(workload: Workload, options: dict[str, Any]) -> Runner:
    """Compile in options["precision"] for options["device"], with every setting unless workload.compile_setting names the
    fastest one.

    Inductor's cache is an empty folder, so that compile times are those of a first start. `notes` has the fastest `setting`,
    `compile_s` of its transformer and decoder at batch 1, and in `tried` the ms per call of each setting.
    Raises MeasurementFailed without a C++ compiler.
    """
    assert workload.ckpt is not None
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        raise MeasurementFailed(
            "expected a C++ compiler for torch.compile, found none; install g++ or set CXX"
        )
    precision, device = options["precision"], options["device"]
    pipeline, bundle = open_pipeline(workload.ckpt), Bundle.open(workload.bundle)
    use_kernel(device)
    model = bundle.manifest.model
    rows = 1 if workload.guidance == 1 else 2
    latents = np.zeros((rows, *model.latent_shape), np.float32)
    conditioning = (
        [np.zeros(rows, np.int64)]
        if model.classes
        else [np.zeros((rows, *model.input_shapes[name]), np.float32) for name in ("context", "pooled")]
    )
    inputs = [latents, np.full(rows, 500.0, np.float32), *conditioning]
    with tempfile.TemporaryDirectory(prefix="tpx-bench-") as cache:
        tried: dict[str, tuple[float, Network, float]] = {}
        for setting in [workload.compile_setting] if workload.compile_setting else SETTINGS[device]:
            torch._dynamo.reset()  # not before the decoder, because it would discard the compiled denoiser
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / setting.replace(" ", ""))
            denoiser = _compiled(Denoiser(pipeline, workload.depth, precision), setting, device)
            seconds = _seconds(denoiser, inputs)
            tried[setting] = (median(_seconds(denoiser, inputs) for _ in range(_CALLS)), denoiser, seconds)
        setting = min(tried, key=lambda name: tried[name][0])
        _, denoiser, compile_s = tried[setting]
        decoder = _compiled(Decoder(pipeline, precision), setting, device)
        compile_s += _seconds(decoder, [latents[:1]])
    others = {**text_encoders(pipeline, precision, device), "vae_decoder": decoder}
    notes = {
        "setting": setting,
        "compile_s": compile_s,
        "tried": {name: 1e3 * one[0] for name, one in tried.items()},
    }
    return Runner(BaselineGenerator(bundle, options["name"], denoiser, others), workload, notes)


def _compiled(module: torch.nn.Module, setting: str, device: str) -> Network:
    """Compile for static shapes, which is fastest for a single batch size."""
    frozen = module.eval().requires_grad_(False).to(TORCH_DEVICES[device])
    return network(torch.compile(frozen, dynamic=False, options=SETTINGS[device][setting]), device)


def _seconds(function: Network, inputs: Sequence[Any]) -> float:
    began = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - began
