"""The runtime's tokenizers for Stable Diffusion 3 against transformers and SentencePiece: same ids, and how fast.

    python benchmarks/text_tokenizers.py DATA [--runs 5]

DATA is a folder with clip/bpe_simple_vocab_16e6.txt.gz, t5/spiece.model, geneval/generation_prompts.txt and
dpg/dpg_prompts.jsonl. Every run is a new tokenizer that reads all prompts twice, in one thread: words of the first round are
new to it, those of the second it has kept. Times are medians.
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
from tpx_runtime.tokenizer import load_tokenizer
from tpx_runtime.tokenizer.clip import WORD_END, byte_alphabet

Encode = Callable[[str], list[int]]


def clip_reference(facts: dict[str, Any], pad: str) -> Any:
    """transformers' tokenizer of the same merges."""
    from transformers import CLIPTokenizer

    characters = list(byte_alphabet().values())
    tokens = characters + [character + WORD_END for character in characters]
    tokens += [merge.replace(" ", "") for merge in facts["merges"]] + ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(merge.split(" ")) for merge in facts["merges"]]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, pad_token=pad)


def t5_references(spiece: Path) -> tuple[Any, Encode]:
    """transformers' tokenizer, and SentencePiece cut and filled up in its way."""
    from sentencepiece import SentencePieceProcessor
    from transformers import T5TokenizerFast

    processor = SentencePieceProcessor(model_file=str(spiece))

    def encode(prompt: str) -> list[int]:
        ids = [*processor.encode(prompt)[:255], processor.eos_id()]
        return ids + [processor.pad_id()] * (256 - len(ids))

    return T5TokenizerFast.from_pretrained(spiece.parent), encode


def as_pipeline(tokenizer: Any, length: int) -> Encode:
    """As StableDiffusion3Pipeline calls it."""
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    return lambda prompt: list(tokenizer(prompt, **options).input_ids)


def seconds(encode: Callable[[str], object], prompts: list[str]) -> float:
    began = time.perf_counter()
    for prompt in prompts:
        encode(prompt)
    return time.perf_counter() - began


@click.command()
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
        "CLIP-L": (clip_l, as_pipeline(clip_reference(clip_l, "<|endoftext|>"), 77), None),
        "CLIP-G": (clip_g, as_pipeline(clip_reference(clip_g, "!"), 77), None),
        "T5": (t5_tokenizer(spiece), as_pipeline(t5, 256), sentencepiece),
    }
    print(
        f"{platform.machine()}, Python {platform.python_version()}, {len(prompts)} prompts, medians of {runs}\n"
    )
    print(
        "| tokenizer | as transformers | as SentencePiece | cut short | load, ms | prompts/s, new | kept | transformers |"
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
                new, kept = seconds(tokenizer.encode, prompts), seconds(tokenizer.encode, prompts)
                times.append((loaded, new, kept, seconds(reference, prompts)))
            load, *spent = (median(column) for column in zip(*times, strict=True))
            encodings = [tokenizer.encode(prompt) for prompt in prompts]
            same = sum(e.ids == reference(p) for e, p in zip(encodings, prompts, strict=True))
            also = sum(e.ids == other(p) for e, p in zip(encodings, prompts, strict=True)) if other else ""
            cut = sum(e.dropped > 0 for e in encodings)
            rates = " | ".join(f"{len(prompts) / s:,.0f}" for s in spent)
            print(f"| {name} | {same} | {also} | {cut} | {1e3 * load:.0f} | {rates} |")


if __name__ == "__main__":
    main()
