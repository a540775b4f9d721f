"""The transformer's conditioning: prompts through one or several text encoders, or class numbers.

A conditioner turns user input into the transformer's inputs; text can be checked before any work is done. The outputs of
several encoders are combined as in SD3 (Esser et al., 2403.03206, section 3); a single encoder is the simplest case.
"""

from collections.abc import Sequence

import numpy as np

from .bundle import Bundle
from .caller_warning import warn_caller
from .engine import Arrays, checked_output
from .errors import BadInput, BundleInvalid, shorten
from .graphs import Graphs
from .manifest import EncoderSpec, ModelSpec
from .memory import available_bytes
from .sampling import Array
from .tokenizer import Encoding, Tokenizer, load_tokenizer

EncoderOutput = tuple[
    Array, Array | None
]  # context [B, tokens, width]; pooled [B, width], or None if it does not pool
_MAX_CACHED_PROMPTS = 32  # most recent ones, so that further batches of a prompt do not encode it again


class PromptTruncated(UserWarning):
    """Warning: a text encoder does not read the end of a long prompt."""


def combine(outputs: Sequence[EncoderOutput], model: ModelSpec) -> Arrays:
    """`context` [B, context_tokens, context_width] and `pooled` [B, pooled_width] from the outputs of all encoders.

    Contexts of encoders with pooled output are placed side by side in the first rows, those of the others below; the rest is
    zero, such as T5's rows if it was left out. Pooled outputs are concatenated.
    """
    pooling = [(context, pooled) for context, pooled in outputs if pooled is not None]
    context = np.zeros((len(outputs[0][0]), model.context_tokens, model.context_width), np.float32)
    column, row = 0, pooling[0][0].shape[1]
    for part, _ in pooling:
        context[:, :row, column : column + part.shape[2]] = part
        column += part.shape[2]
    for part, pooled in outputs:
        if pooled is None:
            context[:, row : row + part.shape[1]] = part
            row += part.shape[1]
    return {"context": context, "pooled": np.concatenate([pooled for _, pooled in pooling], axis=1)}


class TextConditioner:
    """Converts prompts to `context` and `pooled`. `t5=False` skips encoders without pooled output (T5).

    An encoder is loaded on first use. If all of them would take more than half of the available memory, each is released
    before the next is loaded, even if `graphs` keeps its sessions.
    """

    def __init__(self, bundle: Bundle, graphs: Graphs, t5: bool = True) -> None:
        self._bundle, self._model = bundle, bundle.manifest.model
        every = bundle.manifest.text_encoders
        self.encoders = [encoder for encoder in every if t5 or encoder.pooled_width]
        self.left_out = [encoder.folder for encoder in every if encoder not in self.encoders]
        self.tokenizers = [self._tokenizer(encoder) for encoder in self.encoders]
        size = sum(bundle.folder_bytes(encoder.folder) for encoder in self.encoders)
        available = available_bytes()
        fits = available is None or size < available / 2
        self._graphs = graphs if fits else Graphs(graphs.engine, keep=False)
        self._rows: dict[str | None, Arrays] = {}

    def check(self, prompt: str, name: str = "prompt") -> None:
        """Raise BadInput if a tokenizer rejects the text; warn with PromptTruncated if it truncates it.

        `name` is what messages call the text.
        """
        try:
            dropped = {e.folder: self._encode(t, prompt).dropped for e, t in self._pairs()}
        except BadInput as error:
            raise BadInput(f"{name}: {error}" if name != "prompt" else str(error)) from None
        if not any(dropped.values()):
            return
        folders: dict[int, list[str]] = {}
        for folder, tokens in dropped.items():
            folders.setdefault(tokens, []).append(folder)
        complete = folders.pop(0, [])
        unread = [
            f"its last {f'{tokens} tokens are' if tokens > 1 else 'token is'} not read by {', '.join(names)}"
            for tokens, names in folders.items()
        ]
        rest = f"; {', '.join(complete)} reads all of it" if complete else ""
        warn_caller(
            f"the {name} {shorten(prompt)} is too long: {', and '.join(unread)}{rest}", PromptTruncated
        )

    def __call__(self, prompts: Sequence[str | None]) -> Arrays:
        """The transformer's inputs for prompts; None stands for the unconditional branch of guidance."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if new:
            combined = combine([self._run(e, t, new) for e, t in self._pairs()], self._model)
            for i, prompt in enumerate(new):
                self._rows[prompt] = {name: values[i].copy() for name, values in combined.items()}
        for prompt in prompts:
            self._rows[prompt] = self._rows.pop(prompt)  # in order of last use
        inputs = {name: np.stack([self._rows[p][name] for p in prompts]) for name in ("context", "pooled")}
        for old in list(self._rows)[:-_MAX_CACHED_PROMPTS]:
            del self._rows[old]
        return inputs

    def _run(self, encoder: EncoderSpec, tokenizer: Tokenizer, prompts: list[str | None]) -> EncoderOutput:
        session = self._graphs.open(self._bundle.text_encoder(encoder))
        ids = np.array([self._encode(tokenizer, prompt).ids for prompt in prompts], np.int64)
        outputs = session.run({"ids": ids})
        context = checked_output(outputs, "context", (*ids.shape, encoder.context_width))
        if not encoder.pooled_width:
            return context, None
        return context, checked_output(outputs, "pooled", (len(ids), encoder.pooled_width))

    def _encode(self, tokenizer: Tokenizer, prompt: str | None) -> Encoding:
        return tokenizer.encode_empty() if prompt is None else tokenizer.encode(prompt)

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
    """Converts classes in 0..classes - 1 to `class_id`; `classes` itself means no class."""

    def __init__(self, classes: int) -> None:
        self._classes = classes

    def __call__(self, class_ids: Sequence[int | None]) -> Arrays:
        """The transformer's inputs; None stands for the unconditional branch of guidance."""
        return {"class_id": np.array([self._classes if c is None else c for c in class_ids], np.int64)}
