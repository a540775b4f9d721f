"""Does an engine compute what the PyTorch model computed? One answer for tpx-verify and for the exporter."""

import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .engine import Arrays, Engine
from .errors import BundleInvalid


@dataclass(frozen=True)
class PartReport:
    """One graph against the golden tensors.

    `error` is the greatest max|a - b| / max|b| of its real outputs, infinite where it is NaN or of another shape.
    `routing_agreement` is the share of tokens sent to the same expert, None for a graph that routes nothing.
    """

    part: str
    error: float
    tolerance: float
    routing_agreement: float | None = None
    least_agreement: float = 0.0

    @property
    def ok(self) -> bool:
        agrees = self.routing_agreement is None or self.routing_agreement >= self.least_agreement
        return self.error <= self.tolerance and agrees


def relative_error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """max|found - expected| / max|expected|; infinite where it is NaN or the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    difference = float(np.abs(found - expected).max())
    if difference == 0:
        return 0.0
    with np.errstate(divide="ignore"):
        error = float(difference / np.abs(expected).max())
    return error if error == error else float("inf")


def routing_agreement(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Share of equal entries of two arrays of routes; 0 where the shapes differ."""
    return float((found == expected).mean()) if found.shape == expected.shape else 0.0


def load_golden(bundle: Bundle) -> Arrays:
    """The golden tensors by name. Raises BundleInvalid."""
    try:
        with np.load(bundle.golden, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise BundleInvalid(f"{bundle.golden}: expected arrays, found none ({error})") from None


def verify_bundle(bundle: Bundle, engine: Engine) -> list[PartReport]:
    """Run every graph at every depth on the golden inputs; hashes are checked by `Bundle.open`.

    Raises BundleInvalid where golden tensors are missing, EngineFailed where a graph does not run.
    """
    golden, tolerance = load_golden(bundle), bundle.manifest.tolerance
    depths, routed = bundle.manifest.model.depths, bool(bundle.manifest.model.thinking_blocks)
    names = ["ids", "context", "pooled", "latents", "timestep", "decoder_latents", "image"]
    names += [f"velocity_{depth}" for depth in depths] + [f"routes_{depth}" for depth in depths if routed]
    if missing := [name for name in names if name not in golden]:
        raise BundleInvalid(f"{bundle.golden}: expected the array {missing[0]}, found none; export again")

    outputs = engine.open(bundle.text_encoder).run({"ids": golden["ids"]})
    error = max(relative_error(outputs[name], golden[name]) for name in ("context", "pooled"))
    reports = [PartReport("text_encoder", error, tolerance.text_encoder)]

    inputs = {name: golden[name] for name in ("latents", "timestep", "context", "pooled")}
    for depth in depths:
        outputs = engine.open(bundle.transformer(depth, engine.plain)).run(inputs)
        error = relative_error(outputs["velocity"], golden[f"velocity_{depth}"])
        agreement = routing_agreement(outputs["routes"], golden[f"routes_{depth}"]) if routed else None
        part = f"transformer depth {depth}"
        reports.append(PartReport(part, error, tolerance.transformer, agreement, tolerance.routing_agreement))

    outputs = engine.open(bundle.vae_decoder).run({"latents": golden["decoder_latents"]})
    error = relative_error(outputs["image"], golden["image"])
    return [*reports, PartReport("vae_decoder", error, tolerance.vae_decoder)]
