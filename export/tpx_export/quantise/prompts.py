"""What is drawn to calibrate int8 and to show what it costs: the user's prompts, or some that the model can read.

a file            one prompt a line
CLIP and T5       plain descriptions of varied things
words             captions of the shapes world where the model knows their words, else prompts of its own random words
classes           classes spread over all of them
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpx_export.pipeline import Pipeline, TextPart
from tpx_runtime.errors import BadInput, shorten
from tpx_runtime.manifest import ModelSpec
from tpx_runtime.prompts import read_prompt_lines
from tpx_runtime.tokenizer import Tokenizer, WordTokenizer, make_tokenizer, reject_unknown

EACH = 8  # prompts to calibrate with, and as many others to show
EACH_LARGE = 1
LARGE = 1024  # visual tokens
_TOGETHER = 512  # visual tokens of pictures that are drawn at once

_PLAIN = (
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
class Subjects:
    """Prompts (text) or classes (numbers) to calibrate with, and others to show."""

    calibrating: tuple[str | int, ...]
    shown: tuple[str | int, ...]


def drawn_together(model: ModelSpec) -> int:
    """How many pictures one call of the transformer draws: fewer of larger ones, which take more memory."""
    return max(1, _TOGETHER // model.visual_tokens)


def subjects_of(pipeline: Pipeline, file: Path | None = None) -> Subjects:
    """The prompts of `file`, all to calibrate with and the first to show, or the model's own subjects. Raises BadInput."""
    each = EACH_LARGE if pipeline.model.visual_tokens > LARGE else EACH
    if file is not None:
        given = read_prompts(file, pipeline)
        return Subjects(given, given[:each])
    if pipeline.model.classes:
        spread = np.linspace(0, pipeline.model.classes - 1, 2 * each).round().astype(int).tolist()
        return Subjects(tuple(spread[::2]), tuple(spread[1::2]))
    prompts = own_prompts(pipeline, 2 * each)
    half = len(prompts) // 2
    return Subjects(prompts[:half], prompts[half:])


def read_prompts(file: Path, pipeline: Pipeline) -> tuple[str, ...]:
    """The prompts of a file. Raises BadInput for one that the model cannot read, and names its line."""
    if pipeline.model.classes:
        raise BadInput(
            f"expected no prompts for a model of classes, found {file}; leave it out, its classes are used"
        )
    prompts, tokenizers = read_prompt_lines(file), [_tokenizer(part) for part in pipeline.text]
    for number, prompt in prompts.items():
        try:
            _require_readable(prompt, tokenizers)
        except BadInput as error:
            raise BadInput(f"{file}, line {number}: {error}") from None
    return tuple(prompts.values())


def own_prompts(pipeline: Pipeline, count: int) -> tuple[str, ...]:
    """Up to `count` prompts that the model can read, always the same ones."""
    tokenizers = [_tokenizer(part) for part in pipeline.text]
    words = next((t for t in tokenizers if isinstance(t, WordTokenizer)), None)
    if words is None:
        return _PLAIN[:count]
    captions = [text for text in _captions(count) if _readable(text, tokenizers)]
    if len(captions) == count:
        return tuple(captions)
    return tuple(_spoken(part, row) for part in pipeline.text[:1] for row in part.ids)


def _captions(count: int) -> Sequence[str]:
    """Captions of the shapes world, all kinds in turn; none if a checkout's folder samples is missing."""
    try:
        from samples.shapes.captions import KINDS, caption, prompt_of
    except ImportError:
        return ()
    rng, texts = random.Random("int8"), dict[str, None]()
    while len(texts) < count:
        texts[caption(prompt_of(rng, KINDS[len(texts) % len(KINDS)]), rng)] = None
    return tuple(texts)


def _spoken(part: TextPart, ids: Sequence[int]) -> str:
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
        raise BadInput(f"expected text, found {shorten(text)} with characters that cannot be printed")
    for tokenizer in tokenizers:
        reject_unknown(tokenizer.encode(text), tokenizer)


def _tokenizer(part: TextPart) -> Tokenizer:
    return make_tokenizer(part.vocabulary, Path(part.spec.tokenizer) / "vocab.json")
