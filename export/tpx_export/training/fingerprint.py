"""A hash of a base's files, by which adapters name their base, and caches and states recognise it."""

import hashlib
from collections.abc import Collection
from pathlib import Path

from tpx_export.checkpoint import CheckpointInvalid

_SUFFIXES = (".safetensors", ".pt", ".pth", ".json", ".txt", ".model", ".gz")
_PARTS = (
    *("transformer", "vae", "scheduler"),
    *("text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)
_WHOLE_BYTES = 1 << 24
_PIECES, _PIECE_BYTES = 1024, 1 << 12


def of_base(path: Path, components: Path | None = None, leave_out: Collection[Path] = ()) -> str:
    """SHA-256 of the weights, configurations and tokenizers at `path` and in the components' folder.

    Of a folder, only files that an import may read count, without those in `leave_out`: a run may keep its pictures and
    write its adapters there. Files are known by their names within it and by their content: up to 16 MiB as a whole, above
    by their size, their first MiB (where .safetensors has its names) and 1,024 pieces of 4 KiB, evenly spaced; hashing 15 GB
    would take longer than most starts. Raises CheckpointInvalid for what cannot be read.
    """
    digest = hashlib.sha256()
    for root in (path, components):
        files = [root] if root is None or root.is_file() else _files(root, leave_out)
        for file in files:
            if file is None or root is None:
                continue
            name = file.relative_to(root).as_posix() if file != root else "."
            digest.update(f"{name}\0{_content(file)}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a whole file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(root: Path, leave_out: Collection[Path]) -> list[Path]:
    # Only a folder that has a config.json is a part by itself.
    own = root.glob("*" if (root / "config.json").exists() else "model_index.json")
    found = [*own, *(path for part in _PARTS for path in (root / part).glob("*"))]
    without = {path.resolve() for path in leave_out}
    return sorted(
        path
        for path in found
        if path.suffix in _SUFFIXES and path.is_file() and path.resolve() not in without
    )


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{size}\0".encode())
            file.seek(0)
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                return digest.hexdigest()
            digest.update(file.read(1 << 20))
            for piece in range(_PIECES):
                file.seek((size - _PIECE_BYTES) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    except OSError as error:
        raise CheckpointInvalid(f"{path}: expected a file to read, found: {error.strerror}") from None
    return digest.hexdigest()
