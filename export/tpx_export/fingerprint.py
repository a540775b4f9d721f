"""A hash of a base's files, which identifies the base in adapter files, caches and training states."""

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
_MAX_WHOLE_BYTES = 1 << 24
_PIECES, _PIECE_BYTES = 1024, 1 << 12


def base_fingerprint(path: Path, components: Path | None = None, exclude: Collection[Path] = ()) -> str:
    """SHA-256 of the weights, configurations and tokenizers at `path` and in the folder `components`.

    In a folder, only files that an import may read are hashed, except those in `exclude`: a run may have its images and
    write its adapters there. The hash covers relative names and contents. Files of more than 16 MiB are sampled, because
    hashing 15 GB takes too long: their size, their first MiB (where .safetensors has its names) and 1,024 evenly spaced
    pieces of 4 KiB. Raises CheckpointInvalid for files that cannot be read.
    """
    digest = hashlib.sha256()
    for root in (path, components):
        files = [root] if root is None or root.is_file() else _files(root, exclude)
        for file in files:
            if file is None or root is None:
                continue
            name = file.relative_to(root).as_posix() if file != root else "."
            digest.update(f"{name}\0{_content(file)}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files(root: Path, exclude: Collection[Path]) -> list[Path]:
    # Only a folder with a config.json is itself a part of a model. It is no tokenizer, so its texts are captions.
    top_level = root.glob("*" if (root / "config.json").exists() else "model_index.json")
    found = [
        *(path for path in top_level if path.suffix != ".txt"),
        *(path for part in _PARTS for path in (root / part).glob("*")),
    ]
    excluded = {path.resolve() for path in exclude}
    return sorted(
        path
        for path in found
        if path.suffix in _SUFFIXES and path.is_file() and path.resolve() not in excluded
    )


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{size}\0".encode())
            file.seek(0)
            if size <= _MAX_WHOLE_BYTES:
                digest.update(file.read())
                return digest.hexdigest()
            digest.update(file.read(1 << 20))
            for piece in range(_PIECES):
                file.seek((size - _PIECE_BYTES) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE_BYTES))
    except OSError as error:
        raise CheckpointInvalid(f"{path}: expected a readable file, found: {error.strerror}") from None
    return digest.hexdigest()
