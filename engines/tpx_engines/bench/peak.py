"""Measures the machine's peak: the floating-point operations per second of large matrix products."""

import importlib.util
import time
from typing import Any

import numpy as np

SIDE = 2048  # three float32 matrices of 16 MiB: larger than the caches, so that blocking matters
_REPEATS = 5


def gemm(precision: str) -> dict[str, Any]:
    """{"flops": operations per second, "by": library}: the best of a few products of SIDE x SIDE matrices.

    fp32 is the best of numpy and, if installed, torch and OpenVINO; bf16 needs torch. Without it "by" is "" and "flops" is
    0.
    """
    found = [one for one in (_numpy(precision), _torch(precision), _openvino(precision)) if one]
    flops, by = max(found, default=(0.0, ""))
    return {"flops": flops, "by": by}


def _numpy(precision: str) -> tuple[float, str] | None:
    if precision != "fp32":
        return None
    a = np.ones((SIDE, SIDE), np.float32)
    out = np.empty_like(a)
    return _best(lambda: np.matmul(a, a, out=out)), f"numpy {np.__version__}"


def _torch(precision: str) -> tuple[float, str] | None:
    try:
        import torch
    except ImportError:
        return None
    a = torch.ones(SIDE, SIDE, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    return _best(lambda: torch.mm(a, a)), f"PyTorch {torch.__version__.partition('+')[0]}"


def _openvino(precision: str) -> tuple[float, str] | None:
    if precision != "fp32" or importlib.util.find_spec("openvino") is None:
        return None
    import openvino
    from openvino import opset13 as ops

    from tpx_runtime.engine.openvino import core

    a = np.ones((SIDE, SIDE), np.float32)
    rows = ops.parameter([SIDE, SIDE], np.float32)
    model = openvino.Model([ops.matmul(rows, ops.constant(a), False, False)], [rows])
    request = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    version = openvino.__version__.split("-")[0]
    return _best(lambda: request.infer([a], share_inputs=True, share_outputs=True)), f"OpenVINO {version}"


def _best(product: Any) -> float:
    """Operations per second of the fastest of a few calls."""
    fastest = float("inf")
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        product()
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * SIDE**3 / fastest
