"""Fake bundles, in which everything but the graphs is real, and a numpy engine that replaces the graphs.

FAKE has one text encoder, THREE_ENCODERS has three as in Stable Diffusion 3, CLASSES is a class-conditional diffusion model.
"""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from tpx_runtime.bundle import (
    CONDITIONS,
    GOLDEN,
    MANIFEST,
    SCHEDULER,
    VAE_DECODER,
    VAE_ENCODER,
    Bundle,
    GraphVariant,
    describe_files,
    transformer_name,
)
from tpx_runtime.conditioning import combine
from tpx_runtime.engine import Arrays
from tpx_runtime.manifest import Defaults, EncoderSpec, LatentSpec, Manifest, ModelSpec, Tolerance

Function = Callable[[Arrays], Arrays]

WORDS = ["a", "an", "and", "blue", "cube", "on", "red", "sphere", "two", ",", "."]
TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
MODEL = ModelSpec(  # all sizes differ, so that mixed-up sizes fail
    latent_channels=4,
    latent_size=(2, 3),
    image_size_px=(8, 12),
    context_tokens=9,
    context_width=5,
    pooled_width=7,
    conditions_width=11,
    classes=0,
    prediction="velocity",
    out_channels=4,
    guided_channels=4,
    visual_tokens=6,
    depths=(1, 2, 4),
    experts=2,
    thinking_blocks=(0, 2),
)
FAKE = Manifest(
    name="fake",
    license="Apache-2.0",
    producer="tests",
    precision="fp32",
    model=MODEL,
    text_encoders=(EncoderSpec("text_encoder", "tokenizer", tokens=9, context_width=5, pooled_width=7),),
    latent=LatentSpec(scale=2.0, shift=0.25),
    defaults=Defaults(sampler="euler", steps=3, guidance=3.0, depth=2),
    tolerance=Tolerance(
        text_encoder=1e-4, conditions=1e-4, transformer=1e-4, vae=1e-4, routing_agreement=0.9
    ),
    files={},
)
THREE_ENCODERS = replace(
    FAKE,
    name="three",
    model=replace(MODEL, context_tokens=21, context_width=16, pooled_width=19),
    text_encoders=(
        EncoderSpec("text_encoder", "tokenizer", tokens=8, context_width=5, pooled_width=9),
        EncoderSpec("text_encoder_2", "tokenizer_2", tokens=8, context_width=7, pooled_width=10),
        EncoderSpec("text_encoder_3", "tokenizer_3", tokens=13, context_width=16, pooled_width=0),
    ),
)
CLASSES = replace(
    FAKE,
    name="classes",
    model=replace(
        MODEL,
        context_tokens=0,
        context_width=0,
        pooled_width=0,
        classes=13,
        prediction="epsilon",
        out_channels=8,
        guided_channels=3,
        depths=(1,),
        experts=0,
        thinking_blocks=(),
    ),
    text_encoders=(),
    defaults=Defaults(sampler="ddim", steps=3, guidance=3.0, depth=1),
)


def encoder(spec: EncoderSpec) -> Function:
    """A text encoder: sines of its ids, with another frequency in every encoder."""

    def run(inputs: Arrays) -> Arrays:
        ids = inputs["ids"] + spec.context_width / 10
        context = np.sin(ids[:, :, None] * np.arange(1, spec.context_width + 1))
        if not spec.pooled_width:
            return {"context": context.astype(np.float32)}
        pooled = np.cos(ids.sum(1)[:, None] * np.arange(1, spec.pooled_width + 1))
        return {"context": context.astype(np.float32), "pooled": pooled.astype(np.float32)}

    return run


text_encoder = encoder(FAKE.text_encoders[0])


def conditions(model: ModelSpec = MODEL) -> Function:
    """Linear in the timestep and the pooled text or class; all rows and columns differ."""

    def run(inputs: Arrays) -> Arrays:
        condition = inputs["class_id"] / model.classes if model.classes else inputs["pooled"].mean(1)
        rows = condition + inputs["timestep"] / 1000
        outputs = rows[:, None] * np.linspace(0.5, 1.5, model.conditions_width)
        return {"conditions": outputs.astype(np.float32)}

    return run


def transformer(depth: int, model: ModelSpec = MODEL) -> Function:
    def run(inputs: Arrays) -> Arrays:
        x = inputs["latents"]
        condition = inputs["conditions"].mean(1)
        if not model.classes:
            condition = condition + inputs["context"].mean((1, 2))
        condition = condition[:, None, None, None]
        prediction = 0.3 * depth * x + condition
        if model.out_channels > model.latent_channels:
            prediction = np.concatenate([prediction, np.tanh(x - condition)], axis=1)
        outputs = {model.prediction: prediction.astype(np.float32)}
        if model.thinking_blocks:
            routes = np.zeros((len(x), len(model.thinking_blocks) * depth, model.visual_tokens), np.int64)
            routes[:, :, ::2] = x[:, 0, :1, :1] > 0
            outputs["routes"] = routes
        return outputs

    return run


def vae_decoder(inputs: Arrays) -> Arrays:
    return {"image": np.tanh(inputs["latents"][:, :3]).repeat(4, axis=2).repeat(4, axis=3)}


def vae_encoder(inputs: Arrays) -> Arrays:
    """Inverts the decoder: the mean of 4 x 4 pixels; the fourth channel is the mean of the others."""
    image = inputs["image"]
    means = image.reshape(len(image), 3, 2, 4, 3, 4).mean((3, 5)).clip(-0.99, 0.99)
    latents = np.arctanh(np.concatenate([means, means.mean(1, keepdims=True)], axis=1))
    return {"latents": latents.astype(np.float32)}


def functions(manifest: Manifest) -> dict[str, Function]:
    """The functions that replace the graphs of a fake bundle, by path."""
    return {
        **{f"{spec.folder}/model.onnx": encoder(spec) for spec in manifest.text_encoders},
        CONDITIONS: conditions(manifest.model),
        **{transformer_name(depth): transformer(depth, manifest.model) for depth in manifest.model.depths},
        VAE_DECODER: vae_decoder,
        VAE_ENCODER: vae_encoder,
    }


class FakeSession:
    def __init__(self, name: str, function: Function, calls: list[tuple[str, Arrays]]) -> None:
        self.name, self.function, self.calls = name, function, calls

    def run(self, inputs: Arrays) -> Arrays:
        self.calls.append((self.name, {key: value.copy() for key, value in inputs.items()}))
        return self.function(inputs)


class FakeEngine:
    """Records its use in `opened`, `calls` and `alive`; `replaced` maps the path of a graph to another function."""

    variant: GraphVariant = "operator"
    precision: str | None = None
    has_device_loop, device_loop = False, None

    def __init__(
        self,
        replaced: dict[str, Function] | None = None,
        name: str = "fake",
        reason: str | None = None,
        manifest: Manifest = FAKE,
    ) -> None:
        self.name, self.reason = name, reason
        self.opened: list[str] = []
        self.calls: list[tuple[str, Arrays]] = []
        self.functions = functions(manifest) | (replaced or {})
        self._sessions: weakref.WeakSet[FakeSession] = weakref.WeakSet()

    @property
    def alive(self) -> list[str]:
        """The names of sessions that are still referenced."""
        return sorted(session.name for session in self._sessions)

    def problem(self) -> str | None:
        return self.reason

    def open(self, path: Path) -> FakeSession:
        name = path.relative_to(path.parent.parent).as_posix()
        self.opened.append(name)
        session = FakeSession(name, self.functions[name], self.calls)
        self._sessions.add(session)
        return session


def golden(manifest: Manifest = FAKE) -> Arrays:
    """Golden tensors with the outputs of the fake engine."""
    rng, model = np.random.default_rng(0), manifest.model
    arrays: Arrays = {}
    encoded = []
    for spec in manifest.text_encoders:
        ids = np.zeros((2, spec.tokens), np.int64)
        ids[0, :5], ids[1, :3] = [1, 4, 10, 8, 2], [1, 5, 2]
        outputs = {"ids": ids, **encoder(spec)({"ids": ids})}
        arrays |= {f"{spec.folder}.{name}": array for name, array in outputs.items()}
        encoded.append((outputs["context"], outputs.get("pooled")))
    inputs = combine(encoded, model) if encoded else {"class_id": np.array([3, 0], np.int64)}
    inputs["latents"] = rng.standard_normal((2, *model.latent_shape)).astype(np.float32)
    inputs["timestep"] = np.array([1000, 400], np.float32)
    inputs |= conditions(model)(inputs)
    arrays |= inputs
    for depth in model.depths:
        arrays |= {f"{name}_{depth}": array for name, array in transformer(depth, model)(inputs).items()}
    arrays["decoder_latents"] = arrays["latents"] * 0.5
    arrays |= vae_decoder({"latents": arrays["decoder_latents"]})
    return {**arrays, "encoder_latents": vae_encoder({"image": arrays["image"]})["latents"]}


def seal(root: Path, manifest: Manifest = FAKE) -> Bundle:
    """Write a manifest for the current files at `root`, as if they had been exported that way."""
    manifest = replace(manifest, files=describe_files(root))
    (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(root, manifest)


def write_vocabulary(root: Path, spec: EncoderSpec = FAKE.text_encoders[0], **changes: object) -> None:
    facts = {"kind": "word", "tokens": TOKENS, "text_tokens": spec.tokens, **changes}
    (root / spec.tokenizer).mkdir(exist_ok=True)
    (root / spec.tokenizer / "vocab.json").write_text(json.dumps(facts), encoding="utf-8")


def make_bundle(root: Path, manifest: Manifest = FAKE) -> Path:
    """Write a fake bundle to `root`; its graphs are meaningless bytes."""
    names = [*functions(manifest), "transformer/weights.data", GOLDEN, SCHEDULER]
    names += [transformer_name(depth, "plain") for depth in manifest.model.depths]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes([number]) * 100)
    np.savez(root / GOLDEN, **golden(manifest))
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    diffusion = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}
    schedule = flow if manifest.model.prediction == "velocity" else diffusion
    (root / SCHEDULER).write_text(json.dumps(schedule), encoding="utf-8")
    for spec in manifest.text_encoders:
        write_vocabulary(root, spec)
    seal(root, manifest)
    return root


def without_encoder(root: Path, manifest: Manifest = FAKE) -> Bundle:
    """Remove the vae_encoder from the bundle at `root`."""
    (root / VAE_ENCODER).unlink()
    return seal(root, manifest)
