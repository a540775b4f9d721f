"""Compares an engine's outputs with those of the PyTorch model, for tpx-verify and for the exporter."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .engine import Arrays, Engine
from .errors import BundleInvalid, EngineFailed
from .manifest import Tolerance

# Minimum tolerance for engines that compute in a lower precision than the graphs. It is about three times the error of the
# sample in bf16: 9e-3 against its golden tensors; in the worst of 120 random latents 2.0e-2 and 1.6% of routes. Conditions
# are always computed in float32.
PRECISION_TOLERANCE = {
    "bf16": Tolerance(text_encoder=3e-2, conditions=0, transformer=3e-2, vae=3e-2, routing_agreement=0.95)
}
STEP_TOLERANCE = 1e-5  # the step graph is float32 in every bundle


@dataclass(frozen=True)
class PartReport:
    """The comparison of one graph with the golden tensors.

    `error` is the largest max|a - b| / max|b| of its float outputs; infinite for NaN or a wrong shape. `routing_agreement`
    is the share of tokens routed to the same expert; None for a graph without routing.
    """

    part: str
    error: float
    tolerance: float
    routing_agreement: float | None = None
    min_agreement: float = 0.0

    @property
    def ok(self) -> bool:
        agrees = self.routing_agreement is None or self.routing_agreement >= self.min_agreement
        return self.error <= self.tolerance and agrees

    def __str__(self) -> str:
        text = f"{self.part} with a relative error of {self.error:.1e} (tolerance {self.tolerance:.0e})"
        if self.routing_agreement is None:
            return text
        return f"{text} and {self.routing_agreement:.2%} of routes (at least {self.min_agreement:.2%})"


def relative_error(found: npt.NDArray[Any] | None, expected: npt.NDArray[Any]) -> float:
    """max|found - expected| / max|expected|; infinite if it is NaN or if `found` is missing or has a wrong shape."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        difference = np.abs(found - expected).max()
        error = float(difference / np.abs(expected).max()) if difference != 0 else 0.0
    return error if error == error else float("inf")


def routing_agreement(found: npt.NDArray[Any] | None, expected: npt.NDArray[Any]) -> float:
    """Share of equal entries of two arrays of routes; 0 if `found` is missing or has a wrong shape."""
    if found is None or found.shape != expected.shape:
        return 0.0
    return float((found == expected).mean())


def load_golden(bundle: Bundle) -> Arrays:
    """The golden tensors by name. Raises BundleInvalid."""
    try:
        # numpy does not close a file that it opened itself and cannot read.
        with bundle.golden.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    # TypeError: the result for a plain .npy file is an array, not a context manager.
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleInvalid(f"{bundle.golden}: expected arrays by name, found none ({error})") from None


def effective_tolerance(tolerance: Tolerance, precision: str | None) -> Tolerance:
    """The wider of a bundle's tolerance and that of the engine's own `precision`, if it has one."""
    minimum = PRECISION_TOLERANCE.get(precision or "")
    if minimum is None:
        return tolerance
    return Tolerance(
        text_encoder=max(tolerance.text_encoder, minimum.text_encoder),
        conditions=max(tolerance.conditions, minimum.conditions),
        transformer=max(tolerance.transformer, minimum.transformer),
        vae=max(tolerance.vae, minimum.vae),
        routing_agreement=min(tolerance.routing_agreement, minimum.routing_agreement),
    )


def verify_bundle(bundle: Bundle, engine: Engine) -> list[PartReport]:
    """Run every graph at every depth on the golden inputs; hashes are checked by `Bundle.open`.

    Raises BundleInvalid if golden tensors are missing, EngineFailed if a graph does not run.
    """
    golden, model = load_golden(bundle), bundle.manifest.model
    tolerance = effective_tolerance(bundle.manifest.tolerance, engine.precision)
    depths, routed = model.depths, bool(model.thinking_blocks)
    names = [*model.conditions_inputs, *model.transformer_inputs]
    names += [f"{model.prediction}_{depth}" for depth in depths]
    names += [f"routes_{depth}" for depth in depths if routed] + ["decoder_latents", "image"]
    names += ["encoder_latents"] if bundle.vae_encoder else []
    encoder_outputs = {
        e.folder: ["context", "pooled"][: 2 if e.pooled_width else 1] for e in bundle.manifest.text_encoders
    }
    names += [f"{folder}.{name}" for folder, outputs in encoder_outputs.items() for name in ("ids", *outputs)]
    if missing := [name for name in names if name not in golden]:
        raise BundleInvalid(f"{bundle.golden}: expected the array {missing[0]}, found none; export again")

    reports = []
    for encoder in bundle.manifest.text_encoders:
        folder = encoder.folder
        outputs = engine.open(bundle.text_encoder(encoder)).run({"ids": golden[f"{folder}.ids"]})
        error = max(
            relative_error(outputs.get(name), golden[f"{folder}.{name}"]) for name in encoder_outputs[folder]
        )
        reports.append(PartReport(folder, error, tolerance.text_encoder))

    outputs = engine.open(bundle.conditions).run({name: golden[name] for name in model.conditions_inputs})
    error = relative_error(outputs.get("conditions"), golden["conditions"])
    reports.append(PartReport("transformer conditions", error, tolerance.conditions))

    reports += verify_transformers(bundle, engine, golden)

    outputs = engine.open(bundle.vae_decoder).run({"latents": golden["decoder_latents"]})
    reports.append(
        PartReport("vae_decoder", relative_error(outputs.get("image"), golden["image"]), tolerance.vae)
    )
    if bundle.vae_encoder:
        outputs = engine.open(bundle.vae_encoder).run({"image": golden["image"]})
        error = relative_error(outputs.get("latents"), golden["encoder_latents"])
        reports.append(PartReport("vae_encoder", error, tolerance.vae))
    return reports + (verify_step(bundle, engine) if engine.has_device_loop else [])


def verify_step(bundle: Bundle, engine: Engine) -> list[PartReport]:
    """Compare the step graph, if there is one, with numpy on random inputs. Raises EngineFailed."""
    if bundle.step is None:
        return []
    model, rng, (slots, rows, distinct) = bundle.manifest.model, np.random.default_rng(0), (3, 4, 2)
    history, prediction, weights, mix, table = (
        rng.standard_normal(shape, np.float32)
        for shape in (
            (slots, rows, *model.latent_shape),
            (rows, *model.latent_shape),
            (slots, slots),
            (rows, rows),
            (slots, distinct, model.conditions_width),
        )
    )
    slot, condition_index = 1, np.array([1, 0, 0, 1])
    new_history = np.concatenate([history[:slot], np.stack([prediction] * (slots - slot))])
    summed = mix @ (weights[slot] @ new_history.reshape(slots, -1)).reshape(rows, -1)
    expected = {
        "new_history": new_history,
        "latents": summed.reshape(prediction.shape),
        "conditions": table[slot][condition_index],
    }
    found = engine.open(bundle.step).run(
        {
            "history": history,
            "prediction": prediction,
            "slot": np.array(slot),
            "slot_indices": np.arange(slots).reshape(-1, 1, 1, 1, 1),
            "weights": weights,
            "mix": mix,
            "table": table,
            "condition_index": condition_index,
        }
    )
    error = max(relative_error(found.get(name), array) for name, array in expected.items())
    return [PartReport("scheduler step", error, STEP_TOLERANCE)]


def verify_transformers(bundle: Bundle, engine: Engine, golden: Arrays) -> list[PartReport]:
    """Verify only the transformers, in the engine's variant. Raises EngineFailed if one does not run."""
    model = bundle.manifest.model
    tolerance = effective_tolerance(bundle.manifest.tolerance, engine.precision)
    inputs = {name: golden[name] for name in model.transformer_inputs}
    reports = []
    for depth in model.depths:
        outputs = engine.open(bundle.transformer(depth, engine.variant)).run(inputs)
        error = relative_error(outputs.get(model.prediction), golden[f"{model.prediction}_{depth}"])
        routed = bool(model.thinking_blocks)
        agreement = routing_agreement(outputs.get("routes"), golden[f"routes_{depth}"]) if routed else None
        part = f"transformer depth {depth}"
        reports.append(PartReport(part, error, tolerance.transformer, agreement, tolerance.routing_agreement))
    return reports


def require_ok(reports: Sequence[PartReport], engine_name: str) -> None:
    """Raise EngineFailed, which names the first part out of tolerance, unless all are within it."""
    failed = [report for report in reports if not report.ok]
    if failed:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise EngineFailed(
            f"expected the golden outputs from engine {engine_name}, found {failed[0]}{more}; "
            "use another engine or a bundle of higher precision"
        )
