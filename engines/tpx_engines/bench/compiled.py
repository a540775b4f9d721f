"""torch.compile of the checkpoint's transformer and decoder, at the fastest of inductor's settings that were tried.

Needs torch and a C++ compiler. The text encoder stays eager: a prompt is encoded once, and compiling it would only add to
the seconds that compiling takes.
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

from .baselines import Decoder, Denoiser, network, open_pipeline, text_encoders
from .process import Unmeasured
from .sampling import BaselineGenerator, Network
from .subject import Subject, Work

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "freezing": {"freezing": True},
    "freezing + max-autotune": {"freezing": True, "max_autotune": True},
}
_CALLS = 7


def of_compiled(work: Work, options: dict[str, Any]) -> Subject:
    """options["precision"]; tries every setting unless the work says which one was the fastest.

    The cache of inductor is a fresh folder, so that seconds of compiling are those of a first start. `notes`: `setting`,
    `compile_s` of its transformer and decoder at batch 1, and for each that was tried `tried`, its ms a call.
    Raises Unmeasured without a C++ compiler.
    """
    assert work.ckpt is not None
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl")):
        raise Unmeasured("expected a C++ compiler for torch.compile, found none; install g++ or set CXX")
    precision, pipeline, bundle = options["precision"], open_pipeline(work.ckpt), Bundle.open(work.bundle)
    model = bundle.manifest.model
    rows = 1 if work.guidance == 1 else 2
    latents = np.zeros((rows, *model.latent_shape), np.float32)
    told = (
        [np.zeros(rows, np.int64)]
        if model.classes
        else [np.zeros((rows, *model.input_shapes[name]), np.float32) for name in ("context", "pooled")]
    )
    inputs = [latents, np.full(rows, 500.0, np.float32), *told]
    with tempfile.TemporaryDirectory(prefix="tpx-bench-") as cache:
        tried: dict[str, tuple[float, Network, float]] = {}
        for setting in [work.tuned] if work.tuned else SETTINGS:
            torch._dynamo.reset()  # here and not for the decoder, which would throw away what is compiled
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache) / setting.replace(" ", ""))
            denoiser = _compiled(Denoiser(pipeline.transformer(), work.depth), setting, precision)
            seconds = _seconds(denoiser, inputs)
            tried[setting] = (median(_seconds(denoiser, inputs) for _ in range(_CALLS)), denoiser, seconds)
        setting = min(tried, key=lambda name: tried[name][0])
        _, denoiser, compile_s = tried[setting]
        decoder = _compiled(Decoder(pipeline.autoencoder()), setting, precision)
        compile_s += _seconds(decoder, [latents[:1]])
    others = {**text_encoders(pipeline, precision), "vae_decoder": decoder}
    notes = {
        "setting": setting,
        "compile_s": compile_s,
        "tried": {name: 1e3 * one[0] for name, one in tried.items()},
    }
    return Subject(BaselineGenerator(bundle, options["name"], denoiser, others), work, notes)


def _compiled(module: torch.nn.Module, setting: str, precision: str) -> Network:
    """One batch size, one program: what is slower for many sizes is the fastest for one."""
    frozen = module.eval().requires_grad_(False)
    return network(torch.compile(frozen, dynamic=False, options=SETTINGS[setting]), precision)


def _seconds(function: Network, inputs: Sequence[Any]) -> float:
    began = time.perf_counter()
    function(*inputs)
    return time.perf_counter() - began
