"""The parts of a text-to-image or class-to-image model to export, each loaded only when it is needed.

Only one part is in memory at a time, so an export needs only the memory of the largest part.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tpx_export.model.class_to_image import ClassToImage
from tpx_export.model.dit import DiTSpec
from tpx_export.model.mmdit import MMDiTSpec
from tpx_export.model.text_encoder import TextEncoder
from tpx_export.model.text_to_image import TextToImage
from tpx_runtime.bundle import VOCABULARY
from tpx_runtime.errors import BadInput, BundleInvalid
from tpx_runtime.manifest import Defaults, EncoderSpec, LatentSpec, ModelSpec
from tpx_runtime.tokenizer import Tokenizer, WordTokenizer, make_tokenizer

_SEED = 20260428
_EXAMPLES = (
    "a red cube on a blue sphere",
    "a photograph of two old boats in a harbour, early in the morning",
)


@dataclass(frozen=True)
class TextPart:
    """A text encoder: its manifest entry, the content of its tokenizer's `vocab.json`, and how to load it.

    `ids`, int64 [2, tokens], are the golden inputs. The loaded module maps ids to the tuple of `spec.outputs`: (context,
    pooled), or (context,) if it has no pooled output. `parameters` is the module's number of weights, 0 if unknown.
    """

    spec: EncoderSpec
    vocabulary: dict[str, object]
    ids: npt.NDArray[np.int64]
    load: Callable[[], nn.Module]
    parameters: int = 0

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the runtime makes of the vocabulary. Raises BundleInvalid."""
        return make_tokenizer(self.vocabulary, Path(self.spec.tokenizer, VOCABULARY))


@dataclass(frozen=True)
class Pipeline:
    """A model to export. `shift` is the time shift of a flow's schedule, None for a diffusion with linear betas.

    `transformer` loads an MMDiT, which takes latents, timestep, context, pooled and depth, or a DiT, which takes class_id
    instead of the text. `autoencoder` loads a module with `encoder(image) -> (latents, ...)` and
    `decoder(latents) -> image`. `blocks` and `width` are the transformer's; `precision` is a bundle's default: that of the
    transformer's stored weights for a base, fp32 for a TPX checkpoint. `parameters` is the number of weights of the
    transformer, without the adapters of a base, and of the autoencoder; 0 if unknown.
    """

    name: str
    license: str
    model: ModelSpec
    latent: LatentSpec
    defaults: Defaults
    shift: float | None
    text: tuple[TextPart, ...]
    blocks: int
    width: int
    transformer: Callable[[], nn.Module]
    autoencoder: Callable[[], nn.Module]
    precision: str = "fp32"
    parameters: int = 0

    @property
    def schedule_shift(self) -> float:
        """The time shift for a sampler's schedule; a diffusion's ignores it."""
        return 1.0 if self.shift is None else self.shift

    @property
    def t5(self) -> bool:
        """Whether one of the text encoders is T5, the only one that does not pool."""
        return any(not part.spec.pooled_width for part in self.text)

    @classmethod
    def from_model(cls, model: TextToImage | ClassToImage) -> "Pipeline":
        """The parts of a TPX model: a flow conditioned on a prompt, or a diffusion conditioned on a class.

        Raises BadInput for a vocabulary that the runtime cannot tokenize prompts with.
        """
        spec, transformer = model.spec, model.spec.transformer
        flow = model if isinstance(model, TextToImage) else None
        return cls(
            name=spec.name,
            license=spec.license,
            model=model_spec(transformer, spec.autoencoder.factor),
            latent=LatentSpec(spec.autoencoder.scale, spec.autoencoder.shift),
            defaults=spec.defaults,
            shift=flow.spec.shift if flow else None,
            text=(_text_part(flow.text_encoder, spec.name),) if flow else (),
            blocks=transformer.blocks,
            width=transformer.width,
            # In training mode routes are sampled at random.
            transformer=lambda: copy.deepcopy(model.transformer).eval(),
            autoencoder=lambda: copy.deepcopy(model.autoencoder).eval(),
            parameters=count_parameters(lambda: model.transformer, lambda: model.autoencoder),
        )


def count_parameters(*factories: Callable[[], nn.Module]) -> int:
    """The number of weights of the modules that are returned; new ones get no memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for new in factories for parameter in new().parameters())


def model_spec(
    transformer: MMDiTSpec | DiTSpec, factor: int, guided_channels: int | None = None
) -> ModelSpec:
    """The manifest's description of a transformer whose autoencoder has `factor` pixels per latent along one side.

    Guidance acts on the first `guided_channels` of the latents, or on all if None.
    """
    (height, width), thinking = transformer.latent_size, transformer.thinking
    return ModelSpec(
        latent_channels=transformer.latent_channels,
        latent_size=(height, width),
        image_size_px=(height * factor, width * factor),
        **_inputs_and_output(transformer),
        conditions_width=transformer.conditions_width,
        guided_channels=guided_channels or transformer.latent_channels,
        visual_tokens=transformer.visual_tokens,
        depths=tuple(range(1, transformer.max_depth + 1)),
        experts=thinking.experts if thinking else 0,
        thinking_blocks=thinking.blocks if thinking else (),
    )


def _inputs_and_output(transformer: MMDiTSpec | DiTSpec) -> dict[str, Any]:
    """The fields of ModelSpec that differ between prompt-conditional and class-conditional models."""
    if isinstance(transformer, MMDiTSpec):
        return {
            "context_tokens": transformer.context_tokens,
            "context_width": transformer.context_width,
            "pooled_width": transformer.pooled_width,
            "classes": 0,
            "prediction": "velocity",
            "out_channels": transformer.latent_channels,
        }
    return {
        **dict.fromkeys(("context_tokens", "context_width", "pooled_width"), 0),
        "classes": transformer.classes,
        "prediction": "epsilon",
        "out_channels": transformer.out_channels,
    }


def _text_part(encoder: TextEncoder, model: str) -> TextPart:
    spec = encoder.spec
    vocabulary = {"kind": "word", "tokens": list(spec.vocabulary), "text_tokens": spec.tokens}
    try:
        tokenizer = WordTokenizer.from_vocab(Path(VOCABULARY), vocabulary)
    except BundleInvalid as error:
        reason = str(error).removeprefix(f"{VOCABULARY}: ")
        raise BadInput(f"{reason} in the vocabulary of {model}; correct it") from None
    words = [number for number, word in enumerate(spec.vocabulary) if not word.startswith("<")]
    if not words:
        raise BadInput(f"expected words in the vocabulary of {model}, found only special tokens; correct it")
    return TextPart(
        spec=EncoderSpec("text_encoder", "tokenizer", spec.tokens, spec.width, spec.width),
        vocabulary=vocabulary,
        ids=_random_words(tokenizer, words),
        load=lambda: copy.deepcopy(encoder).eval(),
        parameters=count_parameters(lambda: encoder),
    )


def example_ids(vocabulary: dict[str, object]) -> npt.NDArray[np.int64]:
    """Token ids [2, tokens] of two fixed prompts. `vocabulary` is the content of a vocab.json. Raises BundleInvalid."""
    tokenizer = make_tokenizer(vocabulary, Path(VOCABULARY))
    return np.array([tokenizer.encode(text).ids for text in _EXAMPLES], np.int64)


def _random_words(tokenizer: WordTokenizer, words: Sequence[int]) -> npt.NDArray[np.int64]:
    """Token ids [2, tokens] of random ones of `words`, with the special tokens that the tokenizer adds."""
    rng = np.random.Generator(np.random.Philox(key=_SEED))
    tokens = tokenizer.text_tokens
    chosen = np.array(words)[rng.integers(0, len(words), (2, tokens - 2))]
    bos, eos, pad = tokenizer.encode_empty().ids[:3]
    ids = np.full((2, tokens), pad, np.int64)
    for row, length in enumerate(rng.integers(2, max(3, tokens // 2), 2)):
        ids[row, : length + 2] = [bos, *chosen[row, :length], eos]
    return ids
