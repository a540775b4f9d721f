"""Compares an engine's outputs with those of the PyTorch model, for tpx-verify and for the exporter."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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


def load_golden(bundle: Bundle, names: Collection[str] | None = None) -> Arrays:
    """The golden tensors by name, only those of `names` unless it is None. Raises BundleInvalid."""
    try:
        # numpy does not close a file that it opened itself and cannot read.
        with bundle.golden.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays if names is None or name in names}
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files, MemoryError too
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


@dataclass(frozen=True)
class GoldenCheck:
    """A graph with the names of the golden tensors for its `inputs` and float `outputs`, by the graph's own names.

    `depth` is that of a transformer, `routes` the name of its golden routes if it has routing.
    """

    part: str
    graph: Path
    inputs: dict[str, str]
    outputs: dict[str, str]
    tolerance: float
    depth: int | None = None
    routes: str | None = None
    min_agreement: float = 0.0

    @property
    def golden_names(self) -> list[str]:
        return [*self.inputs.values(), *self.outputs.values(), *([self.routes] if self.routes else [])]

    def run(self, engine: Engine, golden: Arrays) -> PartReport:
        """Run the graph on its golden inputs. Raises EngineFailed if it does not run."""
        found = engine.open(self.graph).run({name: golden[key] for name, key in self.inputs.items()})
        error = max(relative_error(found.get(name), golden[key]) for name, key in self.outputs.items())
        agreement = routing_agreement(found.get("routes"), golden[self.routes]) if self.routes else None
        return PartReport(self.part, error, self.tolerance, agreement, self.min_agreement)


def golden_checks(bundle: Bundle, engine: Engine) -> Iterator[GoldenCheck]:
    """The checks of all graphs that have golden tensors, in the order in which they are used."""
    model, tolerance = bundle.manifest.model, effective_tolerance(bundle.manifest.tolerance, engine.precision)
    for encoder in bundle.manifest.text_encoders:
        folder, graph = encoder.folder, bundle.text_encoder(encoder)
        outputs = {name: f"{folder}.{name}" for name in encoder.outputs}
        yield GoldenCheck(folder, graph, {"ids": f"{folder}.ids"}, outputs, tolerance.text_encoder)
    inputs, outputs = {name: name for name in model.conditions_inputs}, {"conditions": "conditions"}
    yield GoldenCheck("transformer conditions", bundle.conditions, inputs, outputs, tolerance.conditions)
    inputs = {name: name for name in model.transformer_inputs}
    for depth in model.depths:
        yield GoldenCheck(
            f"transformer depth {depth}",
            bundle.transformer(depth, engine.variant),
            inputs,
            {model.prediction: f"{model.prediction}_{depth}"},
            tolerance.transformer,
            depth,
            f"routes_{depth}" if model.thinking_blocks else None,
            tolerance.routing_agreement,
        )
    inputs, outputs = {"latents": "decoder_latents"}, {"image": "image"}
    yield GoldenCheck("vae_decoder", bundle.vae_decoder, inputs, outputs, tolerance.vae)
    if bundle.vae_encoder:
        inputs, outputs = {"image": "image"}, {"latents": "encoder_latents"}
        yield GoldenCheck("vae_encoder", bundle.vae_encoder, inputs, outputs, tolerance.vae)


def verify_bundle(bundle: Bundle, engine: Engine) -> list[PartReport]:
    """Run every graph at every depth on the golden inputs; hashes are checked by `Bundle.open`.

    Raises BundleInvalid if golden tensors are missing, EngineFailed if a graph does not run.
    """
    checks = list(golden_checks(bundle, engine))
    names = [name for check in checks for name in check.golden_names]
    golden = load_golden(bundle, names)
    for name in names:
        if name not in golden:
            raise BundleInvalid(f"{bundle.golden}: expected the array {name}, found none; export again")
    reports = [check.run(engine, golden) for check in checks]
    return reports + (verify_step(bundle, engine) if engine.has_device_loop else [])


def verify_transformers(bundle: Bundle, engine: Engine, golden: Arrays) -> list[PartReport]:
    """Verify only the transformers, in the engine's variant. Raises EngineFailed if one does not run."""
    return [check.run(engine, golden) for check in golden_checks(bundle, engine) if check.depth]


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
    slot, condition_index = 1, np.array([1, 0, 0, 1], np.int64)
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
            "slot": np.array(slot, np.int64),
            "slot_indices": np.arange(slots, dtype=np.int64).reshape(-1, 1, 1, 1, 1),
            "weights": weights,
            "mix": mix,
            "table": table,
            "condition_index": condition_index,
        }
    )
    error = max(relative_error(found.get(name), array) for name, array in expected.items())
    return [PartReport("scheduler step", error, STEP_TOLERANCE)]


def require_ok(reports: Sequence[PartReport], engine_name: str) -> None:
    """Raise EngineFailed, which names the first part out of tolerance, unless all are within it."""
    failed = [report for report in reports if not report.ok]
    if failed:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise EngineFailed(
            f"expected the golden outputs from engine {engine_name}, found {failed[0]}{more}; "
            "use another engine or a bundle of higher precision"
        )
