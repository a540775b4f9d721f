"""Published tokenizer files and prompts that the project does not contain, and tokenizer folders in diffusers' layout."""

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
    """Return `path`; skip the test if there is no such file."""
    if not path.is_file():
        pytest.skip(f"needs {path.parent.name}/{path.name} in the folder TPX_DATA")
    return path


def prompts() -> list[str]:
    """All prompts of GenEval and of DPG-Bench."""
    simple = need(DATA / "geneval/generation_prompts.txt").read_text(encoding="utf-8").splitlines()
    dense = need(DATA / "dpg/dpg_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return simple + [json.loads(line)["prompt"] for line in dense]


def token(content: str, normalized: bool) -> dict[str, object]:
    """A special token in the form of tokenizer_config.json."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": content, "normalized": normalized, "special": True, **flags}


def published_config(pad: str) -> dict[str, object]:
    """tokenizer_config.json in the form of published SD3 folders."""
    tokens = {"49406": token(BOS, True), "49407": token(EOS, False)}
    if pad == "!":
        tokens = {"0": token("!", False)} | tokens
    special_tokens = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    return {"added_tokens_decoder": tokens, "tokenizer_class": "CLIPTokenizer", **special_tokens}


def clip_folder(folder: Path, **files: object) -> Path:
    """Write vocab.json and merges.txt made from OpenAI's file, and each of `files` as NAME.json."""
    folder.mkdir(parents=True)
    lines = gzip.decompress(need(OPENAI).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = characters + [character + "</w>" for character in characters]
    tokens += ["".join(line.split()) for line in lines] + [BOS, EOS]
    write(folder, vocab={name: i for i, name in enumerate(tokens)}, **files)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    return folder


def t5_folder(folder: Path) -> Path:
    """A folder with only spiece.model."""
    folder.mkdir(parents=True)
    shutil.copy(need(SPIECE), folder)
    return folder


def write(folder: Path, **files: object) -> None:
    """Write each of `files` to NAME.json."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
