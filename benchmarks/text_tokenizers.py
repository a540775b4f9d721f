"""Compares the runtime's tokenizers for Stable Diffusion 3 with transformers and SentencePiece: equal ids, and speed.

    python benchmarks/text_tokenizers.py DATA [--runs 5]

DATA is a folder with clip/bpe_simple_vocab_16e6.txt.gz, t5/spiece.model, geneval/generation_prompts.txt and
dpg/dpg_prompts.jsonl. Every run creates a new tokenizer and encodes all prompts twice, in one thread: the first time with an
empty word cache, the second time with all words cached. Times are medians.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click

from tpx_export.base.tokenizers import clip_tokenizer, t5_tokenizer
from tpx_runtime.command import TpxCommand
from tpx_runtime.tokenizer import load_tokenizer
from tpx_runtime.tokenizer.clip import WORD_END, byte_alphabet

Encode = Callable[[str], list[int]]


def clip_reference(facts: dict[str, Any], pad: str) -> Any:
    """transformers' tokenizer with the same merges."""
    from transformers import CLIPTokenizer

    characters = list(byte_alphabet().values())
    tokens = characters + [character + WORD_END for character in characters]
    tokens += [merge.replace(" ", "") for merge in facts["merges"]] + ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(merge.split(" ")) for merge in facts["merges"]]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, pad_token=pad)


def t5_references(spiece: Path) -> tuple[Any, Encode]:
    """transformers' tokenizer, and SentencePiece with the same truncation and padding."""
    from sentencepiece import SentencePieceProcessor
    from transformers import T5TokenizerFast

    processor = SentencePieceProcessor(model_file=str(spiece))

    def encode(prompt: str) -> list[int]:
        ids = [*processor.encode(prompt)[:255], processor.eos_id()]
        return ids + [processor.pad_id()] * (256 - len(ids))

    return T5TokenizerFast.from_pretrained(spiece.parent), encode


def pipeline_encode(tokenizer: Any, length: int) -> Encode:
    """The encode function with the arguments of StableDiffusion3Pipeline."""
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    return lambda prompt: list(tokenizer(prompt, **options).input_ids)


def seconds(encode: Callable[[str], object], prompts: list[str]) -> float:
    began = time.perf_counter()
    for prompt in prompts:
        encode(prompt)
    return time.perf_counter() - began


@click.command(cls=TpxCommand)
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--runs", default=5, show_default=True)
def main(data: Path, runs: int) -> None:
    """Print a table of agreement and speed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    lines = (data / "dpg/dpg_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = (data / "geneval/generation_prompts.txt").read_text(encoding="utf-8").splitlines()
    prompts += [json.loads(line)["prompt"] for line in lines]
    merges, spiece = data / "clip/bpe_simple_vocab_16e6.txt.gz", data / "t5/spiece.model"
    clip_l, clip_g = clip_tokenizer(merges), clip_tokenizer(merges, pad=0)
    t5, sentencepiece = t5_references(spiece)
    rows: dict[str, tuple[dict[str, object], Encode, Encode | None]] = {
        "CLIP-L": (clip_l, pipeline_encode(clip_reference(clip_l, "<|endoftext|>"), 77), None),
        "CLIP-G": (clip_g, pipeline_encode(clip_reference(clip_g, "!"), 77), None),
        "T5": (t5_tokenizer(spiece), pipeline_encode(t5, 256), sentencepiece),
    }
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {len(prompts)} prompts, medians of {runs}\n"
    )
    print(
        "| tokenizer | equal to transformers | to SentencePiece | truncated | load, ms | prompts/s, no cache "
        "| words cached | transformers |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for name, (facts, reference, other) in rows.items():
            path = Path(folder) / "vocab.json"
            path.write_text(json.dumps(facts), encoding="utf-8")
            times: list[tuple[float, float, float, float]] = []
            for _ in range(runs):
                began = time.perf_counter()
                tokenizer = load_tokenizer(path)
                loaded = time.perf_counter() - began
                new, cached = seconds(tokenizer.encode, prompts), seconds(tokenizer.encode, prompts)
                times.append((loaded, new, cached, seconds(reference, prompts)))
            load, *encode_s = (median(column) for column in zip(*times, strict=True))
            encodings = [tokenizer.encode(prompt) for prompt in prompts]
            same = sum(e.ids == reference(p) for e, p in zip(encodings, prompts, strict=True))
            same_as_other = (
                sum(e.ids == other(p) for e, p in zip(encodings, prompts, strict=True)) if other else ""
            )
            truncated = sum(e.dropped > 0 for e in encodings)
            rates = " | ".join(f"{len(prompts) / s:,.0f}" for s in encode_s)
            print(f"| {name} | {same} | {same_as_other} | {truncated} | {1e3 * load:.0f} | {rates} |")


if __name__ == "__main__":
    main()
