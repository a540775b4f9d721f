"""From the arguments of a call to the settings of each of its images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from .errors import BadInput, shorten
from .manifest import ALL_NOISE_LEVELS, Manifest
from .noise import MAX_SEED
from .settings import Settings, check_int, to_python

MAX_IMAGES = 1000  # per prompt and call


def plan_settings(
    manifest: Manifest,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    seed: int | Sequence[int],
    num_images: int,
    **given: Any,
) -> list[Settings]:
    """The settings of each image of each prompt, checked for the model of `manifest`.

    `given` are the other fields of Settings; those that are None get the bundle's defaults. Raises BadInput.
    """
    seeds = _seeds(seed, check_int("num_images", num_images, 1, MAX_IMAGES))
    if prompt is None and (manifest.model.classes or given["class_id"] is not None):
        prompt = ""  # Settings.check rejects a class_id for a text-to-image model
    prompts = _prompts(prompt)
    negatives = _negative_prompts(negative_prompt, len(prompts))
    chosen = {name: value for name, value in given.items() if value is not None}
    jobs = [
        Settings(prompt=text, negative_prompt=negative, seed=one, **{**asdict(manifest.defaults), **chosen})
        for text, negative in zip(prompts, negatives, strict=True)
        for one in seeds
    ]
    for job in jobs:
        job.check(manifest)
    first = jobs[0]
    if first.guidance == 1:
        limited = first.guidance_interval not in (ALL_NOISE_LEVELS, manifest.defaults.guidance_interval)
        if limited or first.guidance_every != 1:
            option = "guidance_interval" if limited else "guidance_every"
            raise BadInput(f"expected guidance other than 1 with {option}, found 1; leave out one of them")
        # The bundle's is not in effect, and images that recorded it would be rejected by other bundles.
        jobs = [replace(job, guidance_interval=ALL_NOISE_LEVELS) for job in jobs]
    return jobs


def job_list(jobs: Sequence[Settings]) -> list[Settings]:
    """The jobs as a list. Raises BadInput for a single one, and for anything that is no job."""
    if not isinstance(jobs, Iterable):
        raise BadInput(f"expected a list of jobs that Generator.plan returned, found {shorten(jobs)}")
    jobs = list(jobs)
    for job in jobs:
        if not isinstance(job, Settings):
            raise BadInput(f"expected jobs that Generator.plan returned, found {shorten(job)}")
    return jobs


def _prompts(given: str | Sequence[str] | None) -> list[str]:
    given = to_python(given)
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        found = "none; describe the image" if given is None else shorten(given)
        raise BadInput(f"expected a prompt or a list of prompts, found {found}")
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise BadInput("expected at least one prompt, found none")
    return prompts


def _negative_prompts(given: str | Sequence[str] | None, prompts: int) -> list[str]:
    """The negative prompt of each prompt. Raises BadInput for a list of another length."""
    given = to_python(given)
    if given is None or isinstance(given, str) or not isinstance(given, Sequence):
        return ["" if given is None else given] * prompts  # Settings.check rejects what is no text
    if len(given) != prompts:
        raise BadInput(
            f"expected one negative prompt, or one for each of {prompts} prompts, found {len(given)}"
        )
    return list(given)


def _seeds(given: int | Sequence[int], num_images: int) -> Sequence[int]:
    """The seed of each image of a prompt. Raises BadInput."""
    given = to_python(given)
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        first = check_int("seed", given, 0, MAX_SEED - num_images + 1)
        return range(first, first + num_images)
    if not 1 <= len(given) <= MAX_IMAGES or num_images not in (1, len(given)):
        expected = f"1 to {MAX_IMAGES}" if num_images == 1 else f"{num_images}, as many as num_images,"
        raise BadInput(f"expected {expected} seeds in the list, found {len(given)}")
    return [check_int("seed", one, 0, MAX_SEED) for one in given]
