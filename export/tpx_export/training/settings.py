"""The options of tpx-train that affect the adapters, and their checks."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from tpx_export.model.thinking import ThinkingSpec
from tpx_runtime.errors import BadInput, shorten

PAPER_BLOCKS = (4, 8, 12)  # of SD3-medium's 24 (arXiv 2604.25299)
PRECISIONS = ("bf16", "fp32")
DEPTHS = ("fixed", "random")


@dataclass(frozen=True)
class Settings:
    """The settings of a run; tpx-train has their defaults: the paper's for `thinking`, our choices for the rest.

    `depth` is "fixed" (max_depth at every step) or "random" (1..max_depth, for adapters that work at every depth). The
    learning rate `lr` rises linearly during the first `warmup` steps and is constant afterwards.
    """

    thinking: ThinkingSpec
    batch: int
    lr: float
    warmup: int
    weight_decay: float
    seed: int
    precision: str
    caption_dropout: float
    depth: str

    def __post_init__(self) -> None:
        """Raises BadInput for an invalid value."""
        _require(self.batch >= 1, "--batch of 1 or more", self.batch)
        _require(self.warmup >= 0, "--warmup of 0 or more", self.warmup)
        _require(0 < self.lr < math.inf, "--lr above 0", self.lr)
        _require(0 <= self.weight_decay < math.inf, "--weight-decay of 0 or more", self.weight_decay)
        _require(0 <= self.seed < 2**31, "--seed in 0..2147483647", self.seed)
        _require(0 <= self.caption_dropout <= 1, "--caption-dropout in 0..1", self.caption_dropout)
        _require(self.precision in PRECISIONS, f"--precision {' or '.join(PRECISIONS)}", self.precision)
        _require(self.depth in DEPTHS, f"--depth {' or '.join(DEPTHS)}", self.depth)

    def options(self) -> dict[str, Any]:
        """The settings by option name, as saved in the state of a run."""
        thinking = self.thinking
        return {
            "--experts": thinking.experts,
            "--rank": thinking.rank,
            "--max-depth": thinking.max_depth,
            "--blocks": ",".join(map(str, thinking.blocks)),
            "--temperature": thinking.temperature,
            "--no-modulation": not thinking.modulation,
            "--gate-tokens-only": not thinking.gate_sees_condition,
            "--base-every-step": thinking.base_every_step,
            "--batch": self.batch,
            "--lr": self.lr,
            "--warmup": self.warmup,
            "--weight-decay": self.weight_decay,
            "--seed": self.seed,
            "--precision": self.precision,
            "--caption-dropout": self.caption_dropout,
            "--depth": self.depth,
        }


def thinking_spec(
    experts: int, rank: int, max_depth: int, temperature: float, blocks: str | None
) -> ThinkingSpec:
    """The specification from the options; `blocks` is text such as "4,8,12", or None for the paper's. Raises BadInput."""
    block_numbers = PAPER_BLOCKS if blocks is None else _parse_blocks(blocks)
    for option, value, maximum in (
        ("--experts", experts, 64),
        ("--rank", rank, 4096),
        ("--max-depth", max_depth, 64),
    ):
        _require(1 <= value <= maximum, f"{option} in 1..{maximum}", value)
    _require(0 < temperature < math.inf, "--temperature above 0", temperature)
    return ThinkingSpec(block_numbers, experts, rank, max_depth, temperature)


def check_device(device: str) -> None:
    """Raise BadInput unless torch can train on `device`."""
    _require(device in ("cpu", "cuda"), "--device cpu or cuda", device)
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            "expected a GPU that torch can use, found none; use --device cpu, or install torch for CUDA"
        )


def limit_to_base(thinking: ThinkingSpec, base_blocks: int, explicit: bool) -> ThinkingSpec:
    """`thinking` for a base with that many blocks.

    Raises BadInput if the base lacks blocks that the user named (`explicit`). Of the default blocks only those that the base
    has remain, or its middle block if it has none of them.
    """
    existing = tuple(block for block in thinking.blocks if block < base_blocks)
    if explicit:
        expected = f"--blocks within 0..{base_blocks - 1} (this base's)"
        _require(existing == thinking.blocks, expected, ",".join(map(str, thinking.blocks)))
    return replace(thinking, blocks=existing or (base_blocks // 2,))


def _parse_blocks(blocks: str) -> tuple[int, ...]:
    parts = [part.strip() for part in blocks.split(",")]
    valid = all(part.isascii() and part.isdecimal() and len(part) < 6 for part in parts)
    numbers = sorted({int(part) for part in parts}) if valid else []
    _require(valid and len(numbers) == len(parts), "--blocks such as 4,8,12, without repetition", blocks)
    return tuple(numbers)


def _require(valid: bool, expected: str, found: object) -> None:
    if not valid:
        raise BadInput(f"expected {expected}, found {shorten(found)}")
