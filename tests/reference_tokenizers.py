"""Tokenizer files and prompts that the project does not contain, and folders of them as diffusers has them."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

DATA = Path(os.environ.get("TPX_DATA") or Path(__file__).parents[2] / "shared" / "data")
OPENAI, SPIECE = DATA / "clip/bpe_simple_vocab_16e6.txt.gz", DATA / "t5/spiece.model"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def need(path: Path) -> Path:
    """`path`, or a skipped test."""
    if not path.is_file():
        pytest.skip(f"needs {path.parent.name}/{path.name} in the folder TPX_DATA")
    return path


def prompts() -> list[str]:
    """All prompts of GenEval and of DPG-Bench."""
    simple = need(DATA / "geneval/generation_prompts.txt").read_text(encoding="utf-8").splitlines()
    dense = need(DATA / "dpg/dpg_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return simple + [json.loads(line)["prompt"] for line in dense]


def token(content: str, normalized: bool) -> dict[str, object]:
    """A special token as tokenizer_config.json describes it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": content, "normalized": normalized, "special": True, **flags}


def published_config(pad: str) -> dict[str, object]:
    """tokenizer_config.json in the form of published SD3 folders."""
    tokens = {"49406": token(BOS, True), "49407": token(EOS, False)}
    if pad == "!":
        tokens = {"0": token("!", False)} | tokens
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    return {"added_tokens_decoder": tokens, "tokenizer_class": "CLIPTokenizer", **named}


def clip_folder(folder: Path, **files: object) -> Path:
    """vocab.json and merges.txt out of OpenAI's file, and JSON files by name."""
    folder.mkdir(parents=True)
    lines = gzip.decompress(need(OPENAI).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(code) for code in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    tokens = characters + [character + "</w>" for character in characters]
    tokens += ["".join(line.split()) for line in lines] + [BOS, EOS]
    write(folder, vocab={name: i for i, name in enumerate(tokens)}, **files)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    return folder


def t5_folder(folder: Path) -> Path:
    """Nothing but spiece.model."""
    folder.mkdir(parents=True)
    shutil.copy(need(SPIECE), folder)
    return folder


def write(folder: Path, **files: object) -> None:
    """Write every object to NAME.json."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
