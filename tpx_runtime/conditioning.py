"""The transformer's conditioning: prompts through one or several text encoders, or classes by number.

Each conditioner checks a user's input before any work is done, and turns it into the transformer's inputs. The outputs of
several encoders are joined by SD3's rule (Esser et al., 2403.03206, section 3); a single encoder is its simplest case.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from .bundle import Bundle
from .engine import Arrays, output
from .errors import BadInput, BundleInvalid, shorten
from .graphs import Graphs
from .manifest import EncoderSpec, ModelSpec
from .memory import available_bytes
from .sampling import Array
from .tokenizer import Encoding, Tokenizer, load_tokenizer, refuse_unknown

Said = tuple[Array, Array | None]  # of one encoder: context [B, tokens, width], pooled [B, width] or none
_KEPT_PROMPTS = 32  # the latest ones, so that the next batch of a prompt does not encode it again


class PromptCut(UserWarning):
    """A prompt is longer than an encoder reads: no error, for the picture is one, but worth knowing."""


def combine(said: Sequence[Said], model: ModelSpec) -> Arrays:
    """`context` [B, context_tokens, context_width] and `pooled` [B, pooled_width] of the outputs of all encoders.

    Contexts of encoders with pooled output lie side by side in the first rows, those of the others below them; the rest is
    zero, such as T5's rows if it was left out. Pooled outputs are concatenated.
    """
    pooling = [(context, pooled) for context, pooled in said if pooled is not None]
    context = np.zeros((len(said[0][0]), model.context_tokens, model.context_width), np.float32)
    column, row = 0, pooling[0][0].shape[1]
    for part, _ in pooling:
        context[:, :row, column : column + part.shape[2]] = part
        column += part.shape[2]
    for part, pooled in said:
        if pooled is None:
            context[:, row : row + part.shape[1]] = part
            row += part.shape[1]
    return {"context": context, "pooled": np.concatenate([pooled for _, pooled in pooling], axis=1)}


class TextConditioner:
    """Prompts -> `context` and `pooled`. `t5=False` skips encoders without pooled output (T5).

    An encoder is loaded when first used. If all of them would take more than half of the available memory, each is released
    before the next is loaded, whatever `graphs` keeps.
    """

    def __init__(self, bundle: Bundle, graphs: Graphs, t5: bool = True) -> None:
        self._bundle, self._model = bundle, bundle.manifest.model
        every = bundle.manifest.text_encoders
        self.encoders = [encoder for encoder in every if t5 or encoder.pooled_width]
        self.left_out = [encoder.folder for encoder in every if encoder not in self.encoders]
        self.tokenizers = [self._tokenizer(encoder) for encoder in self.encoders]
        size, have = sum(bundle.weight_bytes(encoder.folder) for encoder in self.encoders), available_bytes()
        self._graphs = graphs if have is None or size < have / 2 else Graphs(graphs.engine, keep=False)
        self._rows: dict[str | None, Arrays] = {}

    def check(self, prompt: str, called: str = "prompt") -> None:
        """Raise BadInput for a text that a tokenizer refuses; warn, with PromptCut, of one that it cuts short.

        `called` is what messages call the text.
        """
        try:
            dropped = {e.folder: self._encode(t, prompt).dropped for e, t in self._pairs()}
        except BadInput as error:
            raise BadInput(f"{called}: {error}" if called != "prompt" else str(error)) from None
        short = [folder for folder, tokens in dropped.items() if tokens]
        whole = [folder for folder, tokens in dropped.items() if not tokens]
        if not short:
            return
        most, rest = max(dropped.values()), f"; {', '.join(whole)} reads it whole" if whole else ""
        warnings.warn(
            f"the {called} {shorten(prompt)} is longer than {', '.join(short)} read{'s' if len(short) == 1 else ''}: "
            f"{most} token{' is' if most == 1 else 's are'} left out there{rest}",
            PromptCut,
            stacklevel=3,
        )

    def __call__(self, prompts: Sequence[str | None]) -> Arrays:
        """The transformer's inputs for prompts; None is no prompt at all, guidance's unconditional branch."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if new:
            joined = combine([self._run(e, t, new) for e, t in self._pairs()], self._model)
            for i, prompt in enumerate(new):
                self._rows[prompt] = {name: values[i].copy() for name, values in joined.items()}
        for prompt in prompts:
            self._rows[prompt] = self._rows.pop(prompt)  # the latest last
        made = {name: np.stack([self._rows[p][name] for p in prompts]) for name in ("context", "pooled")}
        for old in list(self._rows)[:-_KEPT_PROMPTS]:
            del self._rows[old]
        return made

    def _run(self, encoder: EncoderSpec, tokenizer: Tokenizer, prompts: list[str | None]) -> Said:
        session = self._graphs.open(self._bundle.text_encoder(encoder))
        ids = np.array([self._encode(tokenizer, prompt).ids for prompt in prompts], np.int64)
        outputs = session.run({"ids": ids})
        context = output(outputs, "context", (*ids.shape, encoder.context_width))
        if not encoder.pooled_width:
            return context, None
        return context, output(outputs, "pooled", (len(ids), encoder.pooled_width))

    def _encode(self, tokenizer: Tokenizer, prompt: str | None) -> Encoding:
        if prompt is None:
            return tokenizer.encode_empty()
        encoding = tokenizer.encode(prompt)
        refuse_unknown(encoding, tokenizer)
        return encoding

    def _pairs(self) -> list[tuple[EncoderSpec, Tokenizer]]:
        return list(zip(self.encoders, self.tokenizers, strict=True))

    def _tokenizer(self, encoder: EncoderSpec) -> Tokenizer:
        path = self._bundle.vocabulary(encoder)
        tokenizer = load_tokenizer(path)
        if tokenizer.text_tokens != encoder.tokens:
            raise BundleInvalid(
                f"{path}: expected text_tokens {encoder.tokens} as in the manifest, found "
                f"{tokenizer.text_tokens}; export the bundle again"
            )
        return tokenizer


class ClassConditioner:
    """Classes 0 .. classes - 1 -> `class_id`; the number after the last means no class."""

    def __init__(self, classes: int) -> None:
        self._classes = classes

    def __call__(self, class_ids: Sequence[int | None]) -> Arrays:
        """The transformer's inputs; None is no class, guidance's unconditional branch."""
        return {"class_id": np.array([self._classes if c is None else c for c in class_ids], np.int64)}
