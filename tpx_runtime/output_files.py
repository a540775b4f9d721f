"""Chooses the files that tpx-run writes and the images in each; never replaces a file without --force."""

import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from .errors import BadInput, shorten
from .image_files import check_image_writable, save_image
from .settings import Settings

# Placeholders in the name of --out: the seed (one file per seed), the prompt as a slug, and the number of the prompt from 1.
SEED, PROMPT, NUMBER = "{seed}", "{prompt}", "{number}"


@dataclass(frozen=True)
class OutputFile:
    """A file to write and the number of images in it; `named`: the user chose the name; `skipped`: it is there already."""

    path: Path
    images: int
    named: bool
    skipped: bool = False

    def save(self, image: Image.Image, force: bool) -> Path:
        """Write the image and return its path. Raises BadInput.

        If another process has created the file in the meantime, a generated name gets a number.
        """
        path, number = self.path, 1
        while True:
            try:
                save_image(image, path, replace=force)
                return path
            except FileExistsError:
                if self.named:
                    raise _exists(path) from None
                number += 1
                path = self.path.with_name(f"{self.path.stem}-{number}{self.path.suffix}")


def choose_output_files(
    given: Path | None, prompts: Sequence[str], seeds: Sequence[int], force: bool, skip_existing: bool = False
) -> list[OutputFile]:
    """The output files of each prompt: one per seed if `given` contains {seed}, else one grid. Raises BadInput.

    Without `given`, names are generated from the prompt and the first seed. A file that is there already is an error, or a
    reason for another generated name, unless `force` replaces it or `skip_existing` skips it.
    """
    keep_names = force or skip_existing
    each = seeds if given and SEED in given.name else seeds[:1]
    if given is None:
        taken: dict[Path, int] = {}
        paths = [_unused_name(prompt, seeds[0], keep_names, taken) for prompt in prompts]
    else:
        _check_name(given)
        paths = [
            given.with_name(_fill(given.name, prompt, number, seed))
            for number, prompt in enumerate(prompts, start=1)
            for seed in each
        ]
    outputs = [
        OutputFile(path, len(seeds) // len(each), given is not None, skip_existing and path.exists())
        for path in paths
    ]
    for output in outputs:
        _check_new(output.path, keep_names)
    if len({output.path for output in outputs}) < len(outputs):
        raise BadInput(
            f"expected a file for each of {len(prompts)} prompts, found one name for several in --out {given}; "
            f"add {NUMBER} to it"
        )
    return outputs


def remaining_jobs(jobs: Sequence[Settings], outputs: Sequence[OutputFile]) -> list[Settings]:
    """The jobs without those of skipped files; `jobs` are in the order of `outputs`."""
    rest, remaining = iter(jobs), list[Settings]()
    for output in outputs:
        group = list(islice(rest, output.images))
        remaining += [] if output.skipped else group
    return remaining


def _check_name(given: Path) -> None:
    """Raise BadInput for --out without a file's name, or with braces that are none of the placeholders."""
    if not given.name:
        raise BadInput(f"expected a file's name in --out, found {shorten(str(given))}; name an image")
    if unknown := set(re.findall(r"\{[^{}]*\}", given.name)) - {SEED, PROMPT, NUMBER}:
        raise BadInput(
            f"expected only {SEED}, {PROMPT} and {NUMBER} in braces in --out, found {', '.join(sorted(unknown))}"
        )
    if any(placeholder in str(given.parent) for placeholder in (SEED, PROMPT, NUMBER)):
        raise BadInput(
            f"expected placeholders in the file's name alone, found one in the folder {given.parent}"
        )


def _fill(name: str, prompt: str, number: int, seed: int) -> str:
    parts = {SEED: str(seed), NUMBER: str(number), PROMPT: _slug(prompt)}
    return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], name)


def _slug(prompt: str) -> str:
    """The letters, marks and digits of the prompt that file names can have, in at most 60 characters and 120 bytes."""
    text, encoding = unicodedata.normalize("NFC", prompt.lower()), sys.getfilesystemencoding()
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text).split()
    slug = "-".join(words).encode(encoding, "ignore").decode(encoding)[:60]
    return slug.encode()[:120].decode(errors="ignore").strip("-") or "image"


def _unused_name(prompt: str, seed: int, may_exist: bool, taken: dict[Path, int]) -> Path:
    """A name that is not in `taken`, to which it is added, nor, unless it `may_exist`, that of a file.

    `taken` has the last number of each name, so that many prompts of one name do not all count from 1.
    """
    stem = f"{_slug(prompt)}-{seed}"
    path = first = Path(f"{stem}.png")
    number = taken.get(first, 1)
    while path in taken or (path.exists() and not may_exist):
        number += 1
        path = Path(f"{stem}-{number}.png")
    taken[path] = 1
    taken[first] = number
    return path


def _check_new(path: Path, may_exist: bool) -> None:
    check_image_writable(path)
    if os.path.lexists(path) and not may_exist:
        raise _exists(path)


def _exists(path: Path) -> BadInput:
    return BadInput(
        f"expected a new file, found {path} there already; replace it with --force, or keep it with --skip-existing"
    )
