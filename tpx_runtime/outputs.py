"""Where tpx-run writes: which files, with which images, and never over another without --force."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .errors import BadInput
from .images import check_writable, save_png

# In the name of --out: the seed, which makes a file for each; the prompt in letters and digits; its number from 1.
SEED, PROMPT, NUMBER = "{seed}", "{prompt}", "{number}"


@dataclass(frozen=True)
class Output:
    """A PNG to write, and the number of images in it; `named` says whether the user chose the name."""

    path: Path
    images: int
    named: bool

    def save(self, image: Image.Image, force: bool) -> Path:
        """Write it, and say where: where another process took a name that was free, a name of ours gets a number.

        Raises BadInput.
        """
        path, number = self.path, 1
        while True:
            try:
                save_png(image, path, replace=force)
                return path
            except FileExistsError:
                if self.named:
                    raise _taken(path) from None
                number += 1
                path = self.path.with_name(f"{self.path.stem}-{number}.png")


def choose_outputs(
    given: Path | None, prompts: Sequence[str], seeds: Sequence[int], force: bool
) -> list[Output]:
    """The files for `seeds` of each prompt: one for each seed where `given` says {seed}, else one grid. Raises BadInput.

    Without `given` they are named after prompt and first seed, as no file is called yet.
    """
    if given is None:
        taken: set[Path] = set()
        return [Output(_free(prompt, seeds[0], force, taken), len(seeds), False) for prompt in prompts]
    each = seeds if SEED in given.name else seeds[:1]
    outputs = [
        Output(given.with_name(_filled(given.name, prompt, number, seed)), len(seeds) // len(each), True)
        for number, prompt in enumerate(prompts, start=1)
        for seed in each
    ]
    for output in outputs:
        _check_new(output.path, force)
    if len({output.path for output in outputs}) < len(outputs):
        raise BadInput(
            f"expected a file for each of {len(prompts)} prompts, found one name for several in --out {given}; "
            f"add {NUMBER} to it"
        )
    return outputs


def _filled(name: str, prompt: str, number: int, seed: int) -> str:
    parts = {SEED: str(seed), NUMBER: str(number), PROMPT: _slug(prompt)}
    return re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], name)


def _slug(prompt: str) -> str:
    return re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"


def _free(prompt: str, seed: int, force: bool, taken: set[Path]) -> Path:
    """A name that no file has yet, nor one in `taken`, which it is added to."""
    stem, number = f"{_slug(prompt)}-{seed}", 1
    path = Path(f"{stem}.png")
    while path in taken or (path.exists() and not force):
        number += 1
        path = Path(f"{stem}-{number}.png")
    _check_new(path, force)
    taken.add(path)
    return path


def _check_new(path: Path, force: bool) -> None:
    check_writable(path)
    if os.path.lexists(path) and not force:
        raise _taken(path)


def _taken(path: Path) -> BadInput:
    return BadInput(f"expected a new file, found {path} there already; add --force to replace it")
