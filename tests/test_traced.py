"""What tests share is the graph of an equal module alone."""

import copy

import torch
from tiny import make_tiny
from traced import fingerprint

from tpx_export.graphs import Graph, TransformerGraph
from tpx_export.model import ThinkingSpec
from tpx_export.model.text_to_image import TextToImage


def of(model: TextToImage, depth: int = 1, rows: int = 2) -> str:
    inputs = {"latents": torch.zeros(rows, 8, 8, 8)}
    return fingerprint(Graph(TransformerGraph(model.transformer, depth, True), inputs, ("velocity",)))


def test_equal_modules_are_one_and_every_difference_is_seen(tiny_model: TextToImage) -> None:
    thinking = tiny_model.spec.transformer.thinking
    assert thinking is not None
    assert of(tiny_model) == of(make_tiny(thinking)) == of(copy.deepcopy(tiny_model))
    changed = copy.deepcopy(tiny_model)
    changed.transformer.blocks[1].visual.proj.weight[0, 0] += 1e-3
    others = [
        of(changed),
        of(copy.deepcopy(tiny_model).half()),
        of(tiny_model, depth=2),
        of(tiny_model, rows=3),
        # No weight differs, nor any shape.
        of(make_tiny(ThinkingSpec(**{**vars(thinking), "temperature": 2.0}))),
    ]
    assert len({of(tiny_model), *others}) == 1 + len(others)
