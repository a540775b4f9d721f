"""Does an engine compute what the PyTorch model computed? One answer for tpx-verify and for the exporter."""

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

# What an engine may lose that computes in less than the graphs say, where a bundle allows no more. It is about three times
# what the sample loses in bf16: 9e-3 against its golden tensors, and in the worst of 120 random latents 2.0e-2 and 1.6% of
# routes. Conditions are float32 everywhere, and lose nothing.
LOSS = {
    "bf16": Tolerance(text_encoder=3e-2, conditions=0, transformer=3e-2, vae=3e-2, routing_agreement=0.95)
}
STEP_TOLERANCE = 1e-5  # it is float32 in every bundle


@dataclass(frozen=True)
class PartReport:
    """One graph against the golden tensors.

    `error` is the greatest max|a - b| / max|b| of its real outputs, infinite where it is NaN or misshapen.
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

    def __str__(self) -> str:
        text = f"{self.part} with a relative error of {self.error:.1e} (tolerance {self.tolerance:.0e})"
        if self.routing_agreement is None:
            return text
        return f"{text} and {self.routing_agreement:.2%} of routes (at least {self.least_agreement:.2%})"


def relative_error(found: npt.NDArray[Any] | None, expected: npt.NDArray[Any]) -> float:
    """max|found - expected| / max|expected|; infinite where it is NaN, misshapen or not there."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        difference = np.abs(found - expected).max()
        error = float(difference / np.abs(expected).max()) if difference != 0 else 0.0
    return error if error == error else float("inf")


def routing_agreement(found: npt.NDArray[Any] | None, expected: npt.NDArray[Any]) -> float:
    """Share of equal entries of two arrays of routes; 0 where it is misshapen or not there."""
    if found is None or found.shape != expected.shape:
        return 0.0
    return float((found == expected).mean())


def load_golden(bundle: Bundle) -> Arrays:
    """The golden tensors by name. Raises BundleInvalid."""
    try:
        # numpy leaves open what it opened itself and cannot read.
        with bundle.golden.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    # TypeError: a lone .npy array is no context manager.
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleInvalid(f"{bundle.golden}: expected arrays by name, found none ({error})") from None


def tolerated(promised: Tolerance, precision: str | None) -> Tolerance:
    """The wider of what a bundle promises and of what the engine's own `precision` loses, if it has one."""
    loss = LOSS.get(precision or "")
    if loss is None:
        return promised
    return Tolerance(
        text_encoder=max(promised.text_encoder, loss.text_encoder),
        conditions=max(promised.conditions, loss.conditions),
        transformer=max(promised.transformer, loss.transformer),
        vae=max(promised.vae, loss.vae),
        routing_agreement=min(promised.routing_agreement, loss.routing_agreement),
    )


def verify_bundle(bundle: Bundle, engine: Engine) -> list[PartReport]:
    """Run every graph at every depth on the golden inputs; hashes are checked by `Bundle.open`.

    Raises BundleInvalid where golden tensors are missing, EngineFailed where a graph does not run.
    """
    golden, model = load_golden(bundle), bundle.manifest.model
    tolerance = tolerated(bundle.manifest.tolerance, engine.precision)
    depths, routed = model.depths, bool(model.thinking_blocks)
    names = [*model.conditions_inputs, *model.transformer_inputs]
    names += [f"{model.prediction}_{depth}" for depth in depths]
    names += [f"routes_{depth}" for depth in depths if routed] + ["decoder_latents", "image"]
    names += ["encoder_latents"] if bundle.vae_encoder else []
    said = {
        e.folder: ["context", "pooled"][: 2 if e.pooled_width else 1] for e in bundle.manifest.text_encoders
    }
    names += [f"{folder}.{name}" for folder, outputs in said.items() for name in ("ids", *outputs)]
    if missing := [name for name in names if name not in golden]:
        raise BundleInvalid(f"{bundle.golden}: expected the array {missing[0]}, found none; export again")

    reports = []
    for encoder in bundle.manifest.text_encoders:
        folder = encoder.folder
        outputs = engine.open(bundle.text_encoder(encoder)).run({"ids": golden[f"{folder}.ids"]})
        error = max(relative_error(outputs.get(name), golden[f"{folder}.{name}"]) for name in said[folder])
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
    """The graph between two calls, if there is one, in `engine` on random numbers. Raises EngineFailed."""
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
    slot, told = 1, np.array([1, 0, 0, 1])
    kept = np.concatenate([history[:slot], np.stack([prediction] * (slots - slot))])
    summed = mix @ (weights[slot] @ kept.reshape(slots, -1)).reshape(rows, -1)
    expected = {
        "kept": kept,
        "latents": summed.reshape(prediction.shape),
        "conditions": table[slot][told],
    }
    found = engine.open(bundle.step).run(
        {
            "history": history,
            "prediction": prediction,
            "slot": np.array(slot),
            "places": np.arange(slots).reshape(-1, 1, 1, 1, 1),
            "weights": weights,
            "mix": mix,
            "table": table,
            "told": told,
        }
    )
    error = max(relative_error(found.get(name), array) for name, array in expected.items())
    return [PartReport("scheduler step", error, STEP_TOLERANCE)]


def verify_transformers(bundle: Bundle, engine: Engine, golden: Arrays) -> list[PartReport]:
    """The transformers alone, in the variant that the engine reads. Raises EngineFailed where one does not run."""
    model = bundle.manifest.model
    tolerance = tolerated(bundle.manifest.tolerance, engine.precision)
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
    """Raise an EngineFailed that names the first part out of tolerance."""
    wrong = [report for report in reports if not report.ok]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise EngineFailed(
            f"expected the golden outputs from engine {engine_name}, found {wrong[0]}{more}; "
            "use another engine or a bundle of higher precision"
        )
