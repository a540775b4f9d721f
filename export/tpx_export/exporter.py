"""A checkpoint's model -> a bundle (docs/bundle.md), which is verified before anyone can load it."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import torch

from tpx_export.description import experts, manifest, scheduler, vocabulary
from tpx_export.golden import golden_tensors
from tpx_export.graphs import DecoderGraph, Graph, TextEncoderGraph, TransformerGraph, to_onnx
from tpx_export.model.text_to_image import TextToImage
from tpx_export.precision import TOLERANCES, at_precision
from tpx_export.routing import masked, permuted
from tpx_export.weights import WeightFile
from tpx_runtime.bundle import (
    GOLDEN,
    MANIFEST,
    SCHEDULER,
    TEXT_ENCODER,
    VAE_DECODER,
    VOCABULARY,
    Bundle,
    transformer_name,
)
from tpx_runtime.engine import resolve
from tpx_runtime.errors import BadInput
from tpx_runtime.verify import PartReport, require_ok, verify_bundle

Progress = Callable[[str, int, int], None]  # (what comes next, tasks done, tasks in all)


@dataclass(frozen=True)
class Summary:
    """What an export did: the verification of each graph in both spellings, seconds of each task, bytes by folder."""

    reports: dict[str, list[PartReport]]
    seconds: dict[str, float]
    folder_bytes: dict[str, int]


def export_bundle(
    model: TextToImage,
    out: Path,
    depth: int | None = None,
    precision: str = "fp32",
    force: bool = False,
    progress: Progress = lambda task, done, total: None,
) -> Summary:
    """Write the bundle of `model` at `out`, with the transformer at every depth 1..`depth` (the model's own if None).

    The bundle is made in a hidden sibling of `out`, verified with ONNX Runtime against PyTorch, and renamed when whole: what
    is interrupted or fails leaves nothing. Raises BadInput for a depth, precision or place that cannot be used,
    EngineFailed where a graph is out of tolerance.
    """
    deepest = model.transformer.spec.max_depth
    depth = deepest if depth is None else depth
    if not 1 <= depth <= deepest:
        raise BadInput(f"expected a depth of 1..{deepest} (this checkpoint's), found {depth}")
    if precision not in TOLERANCES:
        raise BadInput(f"expected a precision of {', '.join(TOLERANCES)}, found {precision!r}")
    _check_place(out, force)
    depths = tuple(range(1, depth + 1))
    tasks = _Tasks(progress, total=len(depths) + 4)
    with _whole_or_nothing(out) as folder:
        with tasks("golden tensors"):
            golden = golden_tensors(model, depths)
            (folder / GOLDEN).parent.mkdir()
            np.savez(folder / GOLDEN, **golden)  # type: ignore[arg-type]
        example = {
            name: torch.from_numpy(golden[name]) for name in ("latents", "timestep", "context", "pooled")
        }
        with tasks("text encoder"), WeightFile((folder / TEXT_ENCODER).parent) as weights:
            encoder = TextEncoderGraph(at_precision(model.text_encoder, precision))
            graph = Graph(encoder, {"ids": torch.from_numpy(golden["ids"])}, ("context", "pooled"))
            weights.save(to_onnx(graph), Path(TEXT_ENCODER).name)
        transformer = at_precision(model.transformer, precision)
        with WeightFile(folder / "transformer") as weights:
            for steps in depths:
                with tasks(f"transformer depth {steps}"):
                    module = TransformerGraph(transformer, steps)
                    outputs = ("velocity", "routes") if module.routed else ("velocity",)
                    written = to_onnx(Graph(module, example, outputs))
                    operator, plain = spellings(written, experts(transformer))
                    weights.save(operator, Path(transformer_name(steps)).name)
                    weights.save(plain, Path(transformer_name(steps, plain=True)).name)
        with tasks("decoder"), WeightFile((folder / VAE_DECODER).parent) as weights:
            decoder = DecoderGraph(at_precision(model.autoencoder, precision))
            graph = Graph(decoder, {"latents": torch.from_numpy(golden["decoder_latents"])}, ("image",))
            weights.save(to_onnx(graph), Path(VAE_DECODER).name)
        _write_json(folder / VOCABULARY, vocabulary(model))
        _write_json(folder / SCHEDULER, scheduler(model))
        bundle = Bundle(folder, manifest(model, depths, precision, folder))
        (folder / MANIFEST).write_text(bundle.manifest.to_json(), encoding="utf-8")
        with tasks("verification"):
            reports = verify(bundle)
    return Summary(reports, tasks.seconds, folder_bytes(out))


def spellings(model: onnx.ModelProto, experts: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The operator spelling, whose nodes carry a function of static shapes, and the plain one, permuted and inlined."""
    if not experts:
        return model, model
    operator, plain = onnx.ModelProto(), onnx.ModelProto()
    for copy, body in ((operator, masked()), (plain, permuted(experts))):
        copy.CopyFrom(model)
        copy.functions.append(body)
    return operator, onnx.inliner.inline_local_functions(plain)


def verify(bundle: Bundle) -> dict[str, list[PartReport]]:
    """Both spellings in ONNX Runtime against the golden tensors. Raises EngineFailed for a part out of tolerance."""
    engine = resolve("onnxruntime")
    reports = {
        "plain": verify_bundle(bundle, replace(engine, plain=True)),
        "operator": verify_bundle(bundle, replace(engine, plain=False)),
    }
    for spelling, parts in reports.items():
        require_ok(parts, f"{engine.name} ({spelling} spelling)")
    return reports


def folder_bytes(root: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            part = path.relative_to(root).parts[0]
            sizes[part] = sizes.get(part, 0) + path.stat().st_size
    return sizes


class _Tasks:
    """Times tasks and announces each: `with tasks("decoder"): ...`."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._total = progress, total

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._progress(name, len(self.seconds), self._total)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        self._progress(name, len(self.seconds), self._total)


def _check_place(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise BadInput(f"expected a new folder, found {out} there already; add --force to replace it")
    if not (out / MANIFEST).is_file():
        raise BadInput(f"expected a bundle to replace at {out}, found something else; choose another place")


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` at the end, or vanishes if anything goes wrong."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise BadInput(
            f"expected a folder that can be written to at {out.parent}, found: {error.strerror}"
        ) from None
    replaced = folder.with_suffix(".replaced")
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            out.rename(replaced)
        folder.rename(out)
    except OSError as error:
        raise BadInput(
            f"expected to write {out}, found: {error.strerror}; free some space or choose another place"
        ) from error
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _write_json(path: Path, facts: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
