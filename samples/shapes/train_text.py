"""Stage 2: pre-trains the text encoder, without images, to predict the objects and the relation of a caption.

The paper's base has a frozen, pre-trained text encoder. Ours is trained to classify the meaning of a caption, slot by slot,
so that the word vectors given to the transformer encode which colour belongs to which shape.
"""

import itertools
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samples.shapes.captions import Prompt, caption, training_pairs, vocabulary
from samples.shapes.fit import fit
from samples.shapes.world import COLOURS, MAX_OBJECTS, RELATIONS, SHAPES
from tpx_export.model.text_encoder import TextEncoder, TextEncoderSpec
from tpx_runtime.tokenizer import WordTokenizer

VALIDATION_SEED = 2**40  # no training step has this seed
SHAPE_IDS = {shape: i for i, shape in enumerate(SHAPES)}
COLOUR_IDS = {None: 0} | {colour: i + 1 for i, colour in enumerate(COLOURS)}
RELATION_IDS = {None: 0} | {relation: i + 1 for i, relation in enumerate(RELATIONS)}
SLOT_CLASSES = (len(SHAPES) + 1, len(COLOUR_IDS))  # shapes (the last class: no object) and colours of a slot


def default_spec() -> TextEncoderSpec:
    return TextEncoderSpec(("<pad>", "<bos>", "<eos>", "<unk>", *vocabulary()))


def labels_of(prompt: Prompt) -> list[int]:
    """Shape and colour of each slot, then the relation: 2 * MAX_OBJECTS + 1 class ids."""
    slots = [(SHAPE_IDS[g.shape], COLOUR_IDS[g.colour]) for g in prompt.groups for _ in range(g.count)]
    slots += [(len(SHAPES), 0)] * (MAX_OBJECTS - len(slots))
    return [*itertools.chain.from_iterable(slots), RELATION_IDS[prompt.relation]]


class CaptionClassifier(nn.Module):
    """The encoder with two heads that predict `labels_of`: one from the pooled vector, one with attention over the words."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.encoder = TextEncoder(spec)
        sizes = [*SLOT_CLASSES * MAX_OBJECTS, len(RELATION_IDS)]
        self.from_pooled = nn.ModuleList(nn.Linear(spec.width, n) for n in sizes)
        self.questions = nn.Parameter(torch.randn(len(sizes), spec.width) * spec.width**-0.5)
        self.from_words = nn.ModuleList(nn.Linear(spec.width, n) for n in sizes)

    def forward(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        context, pooled = self.encoder(ids)
        attended = (self.questions @ context.transpose(1, 2)).softmax(-1) @ context
        return [
            (p(pooled), w(attended[:, i]))
            for i, (p, w) in enumerate(zip(self.from_pooled, self.from_words, strict=True))
        ]


def batch_at(seed: int, count: int, tokenizer: WordTokenizer) -> tuple[Tensor, Tensor]:
    """Token ids and labels of `count` captions."""
    rng = random.Random(seed)
    prompts = [prompt for prompt, _ in itertools.islice(training_pairs(seed), count)]
    ids = torch.tensor([tokenizer.encode(caption(prompt, rng)).ids for prompt in prompts])
    return ids, torch.tensor([labels_of(prompt) for prompt in prompts])


def tokenizer_for(spec: TextEncoderSpec) -> WordTokenizer:
    return WordTokenizer(list(spec.vocabulary), spec.tokens)


def train(out: Path, *, steps: int, batch: int, seed: int, device: str, rate: float = 1e-3) -> TextEncoder:
    """Train the text encoder, or resume its training in `out`; returns the EMA encoder."""
    torch.manual_seed(seed)
    model = CaptionClassifier(default_spec()).to(device)
    tokenizer = tokenizer_for(model.encoder.spec)

    def loss_at(step: int) -> Tensor:
        ids, labels = batch_at(seed * 1_000_003 + step, batch, tokenizer)
        labels = labels.to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(ids.to(device))
        losses = [
            F.cross_entropy(p.float(), labels[:, i]) + F.cross_entropy(w.float(), labels[:, i])
            for i, (p, w) in enumerate(logits)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def show(ema: nn.Module, step: int) -> None:
        ids, labels = batch_at(VALIDATION_SEED, 1000, tokenizer)
        logits = ema(ids.to(device))
        for name, part in (("pooled", 0), ("words", 1)):
            right = torch.stack(
                [pair[part].argmax(-1).cpu() == labels[:, i] for i, pair in enumerate(logits)]
            )
            print(
                f"text: {right.all(0).float().mean():.1%} of fresh captions fully correct from {name}",
                flush=True,
            )

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    trained = fit(
        "text",
        model,
        [optimizer],
        loss_at,
        steps=steps,
        state=out / "text.state.pt",
        settings={"batch": batch, "seed": seed},
        ema_decay=0.99,
        show=show,
        show_every=250,
    )
    assert isinstance(trained, CaptionClassifier)
    return trained.encoder.eval()
