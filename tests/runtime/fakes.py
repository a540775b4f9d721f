"""A bundle of paper, in which all but the graphs is real, and a numpy engine that stands in for those."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from tpx_runtime.bundle import GOLDEN, MANIFEST, SCHEDULER, Bundle, describe_files, transformer_name
from tpx_runtime.engine import Arrays
from tpx_runtime.manifest import Defaults, LatentSpec, Manifest, ModelSpec, Tolerance

WORDS = ["a", "an", "and", "blue", "cube", "on", "red", "sphere", "two", ",", "."]
TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
MODEL = ModelSpec(  # no two sizes are alike, so that none can stand in for another
    latent_channels=4,
    latent_size=(2, 3),
    image_size_px=(8, 12),
    text_tokens=9,
    context_width=5,
    pooled_width=7,
    visual_tokens=6,
    depths=(1, 2, 4),
    experts=2,
    thinking_blocks=(0, 2),
)
MANIFEST_OF_PAPER = Manifest(
    name="paper",
    license="Apache-2.0",
    producer="tests",
    precision="fp32",
    model=MODEL,
    latent=LatentSpec(scale=2.0, shift=0.25),
    defaults=Defaults(sampler="euler", steps=3, guidance=3.0, depth=2),
    tolerance=Tolerance(text_encoder=1e-4, transformer=1e-4, vae_decoder=1e-4, routing_agreement=0.9),
    files={},
)


def text_encoder(inputs: Arrays) -> Arrays:
    ids = inputs["ids"]
    context = np.sin(ids[:, :, None] * np.arange(1, MODEL.context_width + 1)).astype(np.float32)
    pooled = np.cos(ids.sum(1)[:, None] * np.arange(1, MODEL.pooled_width + 1)).astype(np.float32)
    return {"context": context, "pooled": pooled}


def transformer(depth: int) -> Callable[[Arrays], Arrays]:
    def run(inputs: Arrays) -> Arrays:
        told = inputs["context"].mean((1, 2)) + inputs["pooled"].mean(1) + inputs["timestep"] / 1000
        velocity = 0.3 * depth * inputs["latents"] + told[:, None, None, None]
        routes = np.zeros((len(told), len(MODEL.thinking_blocks) * depth, MODEL.visual_tokens), np.int64)
        routes[:, :, ::2] = inputs["latents"][:, 0, :1, :1] > 0
        return {"velocity": velocity.astype(np.float32), "routes": routes}

    return run


def vae_decoder(inputs: Arrays) -> Arrays:
    return {"image": np.tanh(inputs["latents"][:, :3]).repeat(4, axis=2).repeat(4, axis=3)}


class FakeSession:
    def __init__(
        self, name: str, function: Callable[[Arrays], Arrays], calls: list[tuple[str, Arrays]]
    ) -> None:
        self.name, self.function, self.calls = name, function, calls

    def run(self, inputs: Arrays) -> Arrays:
        self.calls.append((self.name, {key: value.copy() for key, value in inputs.items()}))
        return self.function(inputs)


class FakeEngine:
    """`opened` and `calls` say what was asked of it; `replaced` maps a graph's path to another function."""

    plain = False

    def __init__(
        self,
        replaced: dict[str, Callable[[Arrays], Arrays]] | None = None,
        name: str = "fake",
        reason: str | None = None,
    ) -> None:
        self.name, self.reason = name, reason
        self.opened: list[str] = []
        self.calls: list[tuple[str, Arrays]] = []
        self.functions: dict[str, Callable[[Arrays], Arrays]] = {
            "text_encoder/model.onnx": text_encoder,
            "vae_decoder/model.onnx": vae_decoder,
            **{transformer_name(depth): transformer(depth) for depth in MODEL.depths},
            **(replaced or {}),
        }

    def problem(self) -> str | None:
        return self.reason

    def open(self, path: Path) -> FakeSession:
        name = path.relative_to(path.parent.parent).as_posix()
        self.opened.append(name)
        return FakeSession(name, self.functions[name], self.calls)


def golden() -> Arrays:
    """What the fake engine computes, as an exporter would have written it."""
    rng = np.random.default_rng(0)
    ids = np.array([[1, 4, 10, 8, 2, 0, 0, 0, 0], [1, 5, 2, 0, 0, 0, 0, 0, 0]], np.int64)
    latents = rng.standard_normal((2, *MODEL.latent_shape)).astype(np.float32)
    arrays = {"ids": ids, **text_encoder({"ids": ids}), "latents": latents}
    arrays["timestep"] = np.array([1000, 400], np.float32)
    for depth in MODEL.depths:
        outputs = transformer(depth)(arrays)
        arrays |= {f"velocity_{depth}": outputs["velocity"], f"routes_{depth}": outputs["routes"]}
    return {**arrays, "decoder_latents": latents * 0.5, **vae_decoder({"latents": latents * 0.5})}


def seal(root: Path, manifest: Manifest = MANIFEST_OF_PAPER) -> Bundle:
    """Write the manifest of whatever now lies at `root`, as if it had been exported that way."""
    manifest = replace(manifest, files=describe_files(root))
    (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(root, manifest)


def write_vocabulary(root: Path, **changes: object) -> None:
    facts = {"kind": "word", "tokens": TOKENS, "text_tokens": MODEL.text_tokens, **changes}
    (root / "tokenizer").mkdir(exist_ok=True)
    (root / "tokenizer/vocab.json").write_text(json.dumps(facts), encoding="utf-8")


def make_bundle(root: Path) -> Path:
    """Write the bundle of paper at `root`; its graphs are bytes without meaning."""
    names = [
        "text_encoder/model.onnx",
        "vae_decoder/model.onnx",
        "transformer/weights.data",
        GOLDEN,
        SCHEDULER,
    ]
    names += [transformer_name(depth, plain) for depth in MODEL.depths for plain in (False, True)]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number]) * 100)
    np.savez(root / GOLDEN, **golden())
    (root / SCHEDULER).write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}')
    write_vocabulary(root)
    seal(root)
    return root
