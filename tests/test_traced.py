"""Tests share a traced graph only between equal modules: the fingerprints of all others differ."""

import copy

import torch
from tiny import make_tiny
from traced import fingerprint

from tpx_export.graphs import Graph, TransformerGraph
from tpx_export.model import ThinkingSpec
from tpx_export.model.text_to_image import TextToImage


def fingerprint_of(model: TextToImage, depth: int = 1, rows: int = 2) -> str:
    inputs = {"latents": torch.zeros(rows, 8, 8, 8)}
    return fingerprint(Graph(TransformerGraph(model.transformer, depth, True), inputs, ("velocity",)))


def test_equal_modules_share_a_fingerprint_and_different_ones_do_not(tiny_model: TextToImage) -> None:
    thinking = tiny_model.spec.transformer.thinking
    assert thinking is not None
    assert (
        fingerprint_of(tiny_model)
        == fingerprint_of(make_tiny(thinking))
        == fingerprint_of(copy.deepcopy(tiny_model))
    )
    changed = copy.deepcopy(tiny_model)
    changed.transformer.blocks[1].visual.proj.weight[0, 0] += 1e-3
    different = [
        fingerprint_of(changed),
        fingerprint_of(copy.deepcopy(tiny_model).half()),
        fingerprint_of(tiny_model, depth=2),
        fingerprint_of(tiny_model, rows=3),
        # The same weights and shapes, but another attribute.
        fingerprint_of(make_tiny(ThinkingSpec(**{**vars(thinking), "temperature": 2.0}))),
    ]
    assert len({fingerprint_of(tiny_model), *different}) == 1 + len(different)
