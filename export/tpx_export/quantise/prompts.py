"""The subjects (prompts or classes) for the calibration of a precision and its comparison with fp32.

a file            the user's prompts, one per line
CLIP and T5       descriptions of varied things
words             captions of the shapes world if the model knows their words, else prompts of random words
classes           evenly spaced classes
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tpx_export.pipeline import Pipeline, TextPart
from tpx_runtime.errors import BadInput, shorten
from tpx_runtime.manifest import ModelSpec
from tpx_runtime.prompts import read_prompt_lines
from tpx_runtime.tokenizer import Tokenizer, WordTokenizer

SUBJECTS = 8  # for the calibration, and as many others for the comparison
SUBJECTS_LARGE = 1
LARGE = 1e13  # FLOPs of an image, a minute on a CPU
_BATCH_TOKENS = 512  # visual tokens per batch

_GENERAL_PROMPTS = (
    "a portrait of an old fisherman with a grey beard, oil on canvas",
    "a red bicycle leaning against a white brick wall",
    "an aerial view of a river delta at dusk",
    "two cats asleep on a blue sofa under a window",
    "a bowl of ramen with a soft-boiled egg, seen from above",
    'a shop sign that says "open", with rain on the glass',
    "a pencil sketch of a cathedral",
    "a snow leopard on a cliff, clear morning light",
    "an astronaut rides a horse on the moon",
    "three green apples beside a glass of water",
    "a crowded market street at night with paper lanterns",
    "a minimal logo of a fox, flat colours",
    "a wooden cabin by a lake, autumn leaves",
    "macro photograph of a bee on a yellow flower",
    "a robot reading a newspaper in a café",
    "an isometric drawing of a small island with a lighthouse",
)


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, one per line; - is standard input."""

    path: Path

    @cached_property
    def lines(self) -> dict[int, str]:
        """The prompts by line number, read only once: the file may be a pipe. Raises BadInput."""
        return read_prompt_lines(self.path)


@dataclass(frozen=True)
class Subjects:
    """Prompts (str) or classes (int) for the calibration and for the comparison with fp32."""

    calibration: tuple[str | int, ...]
    comparison: tuple[str | int, ...]


def images_per_batch(model: ModelSpec) -> int:
    """The batch size: smaller for larger images, which need more memory."""
    return max(1, _BATCH_TOKENS // model.visual_tokens)


def image_flops(pipeline: Pipeline) -> float:
    """Roughly the FLOPs of one image with the default settings: those of the blocks' weights, both guidance branches."""
    tokens = pipeline.model.visual_tokens + pipeline.model.context_tokens
    rows = 1 if pipeline.defaults.guidance == 1 else 2
    return 24.0 * pipeline.width**2 * pipeline.blocks * tokens * pipeline.defaults.steps * rows


def choose_subjects(pipeline: Pipeline, file: PromptFile | None = None) -> Subjects:
    """The default subjects, or the prompts of `file`: all for the calibration, the first for the comparison.

    Raises BadInput.
    """
    count = SUBJECTS_LARGE if image_flops(pipeline) > LARGE else SUBJECTS
    if file is not None:
        from_file = read_prompts(file, pipeline)
        return Subjects(from_file, from_file[:count])
    if pipeline.model.classes:
        classes = np.linspace(0, pipeline.model.classes - 1, 2 * count).round().astype(int).tolist()
        return Subjects(tuple(classes[::2]), tuple(classes[1::2]))
    prompts = default_prompts(pipeline, 2 * count)
    half = len(prompts) // 2
    return Subjects(prompts[:half], prompts[half:])


def read_prompts(file: PromptFile, pipeline: Pipeline) -> tuple[str, ...]:
    """The prompts of a file. Raises BadInput for a prompt that the model cannot read, with its line number."""
    if pipeline.model.classes:
        raise BadInput(
            f"expected no prompts for a class-conditional model, found {file.path}; leave it out, classes are used instead"
        )
    prompts, tokenizers = file.lines, [part.tokenizer() for part in pipeline.text]
    for number, prompt in prompts.items():
        try:
            _require_readable(prompt, tokenizers)
        except BadInput as error:
            raise BadInput(f"{file.path}, line {number}: {error}") from None
    return tuple(prompts.values())


def default_prompts(pipeline: Pipeline, count: int) -> tuple[str, ...]:
    """Up to `count` prompts that the model can read; the result is deterministic."""
    tokenizers = [part.tokenizer() for part in pipeline.text]
    if not any(isinstance(tokenizer, WordTokenizer) for tokenizer in tokenizers):
        return _GENERAL_PROMPTS[:count]
    captions = [text for text in _captions(count) if _readable(text, tokenizers)]
    if len(captions) == count:
        return tuple(captions)
    return tuple(_decode(part, row) for part in pipeline.text[:1] for row in part.ids)


def _captions(count: int) -> Sequence[str]:
    """Captions of the shapes world, of all kinds in turn; none if the folder `samples` of a checkout is missing."""
    try:
        from samples.shapes.captions import KINDS, caption, prompt_of
    except ImportError:
        return ()
    rng, texts = random.Random("int8"), dict[str, None]()
    while len(texts) < count:
        texts[caption(prompt_of(rng, KINDS[len(texts) % len(KINDS)]), rng)] = None
    return tuple(texts)


def _decode(part: TextPart, ids: Sequence[int]) -> str:
    tokens = part.vocabulary["tokens"]
    assert isinstance(tokens, list)
    return " ".join(word for word in (tokens[i] for i in ids) if not word.startswith("<"))


def _readable(text: str, tokenizers: Sequence[Tokenizer]) -> bool:
    try:
        _require_readable(text, tokenizers)
    except BadInput:
        return False
    return True


def _require_readable(text: str, tokenizers: Sequence[Tokenizer]) -> None:
    if not text.isprintable():
        raise BadInput(f"expected text, found {shorten(text)} with unprintable characters")
    for tokenizer in tokenizers:
        tokenizer.encode(text)
