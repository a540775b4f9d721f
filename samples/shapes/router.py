"""Prints how a bundle's gates spread tokens over experts, and how many tokens change expert between latent steps.

    python -m samples.shapes.router --bundle bundles/shapes

Routes are those of inference (argmax, no noise), of the prompt's branch, on the ten prompts of `samples.shapes.score`.
Needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from samples.shapes import options
from samples.shapes.captions import caption
from samples.shapes.score import PAIRS, SINGLES
from tpx_runtime.bundle import Bundle
from tpx_runtime.command import TpxCommand
from tpx_runtime.engine import Arrays, GraphEngine, Session, resolve
from tpx_runtime.errors import BadInput
from tpx_runtime.generator import Generator
from tpx_runtime.options import find_bundle

PARTS = ("first third", "middle third", "last third")  # of the calls of the transformer, from noise to image
Routes = npt.NDArray[np.int64]


class RecordingEngine:
    """An engine that keeps the routes [B, S, N] of each call of a transformer in `routes`. Its loops run on the host."""

    device_loops = None

    def __init__(self, engine: GraphEngine) -> None:
        self._engine, self.name, self.variant = engine, engine.name, engine.variant
        self.routes: list[Routes] = []

    def open(self, path: Path) -> Session:
        """Load the graph at `path`. Raises EngineUnavailable or EngineFailed."""
        return _RecordingSession(self._engine.open(path), self.routes)


class _RecordingSession:
    def __init__(self, session: Session, routes: list[Routes]) -> None:
        self._session, self._routes = session, routes

    def run(self, inputs: Arrays) -> Arrays:
        outputs = self._session.run(inputs)
        if "routes" in outputs:
            self._routes.append(outputs["routes"].copy())
        return outputs


def table(calls: Sequence[Routes], blocks: Sequence[int], experts: int) -> str:
    """A row for each of `blocks` and latent steps: each expert's share of tokens in each part of the schedule, and the
    tokens that have another expert than at the latent step before, in percent. `calls` has the routes [B, S, N] of each.
    """
    head = ["block", "latent step", *PARTS, *(f"changed, {part}" for part in PARTS)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    parts = np.array_split(np.stack(calls), len(PARTS))
    for block in range(len(blocks)):
        # Of this block, each [calls, B, T, N].
        own = [part.reshape(*part.shape[:2], len(blocks), -1, part.shape[-1])[:, :, block] for part in parts]
        for step in range(own[0].shape[2]):
            now = [part[:, :, step] for part in own]
            shares = [[f"{100 * (routes == e).mean():.0f}" for e in range(experts)] for routes in now]
            cells = [str(blocks[block]), str(step + 1), *map(" ".join, shares)]
            for routes, part in zip(now, own, strict=True):
                cells.append(f"{100 * (routes != part[:, :, step - 1]).mean():.0f}" if step else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command(cls=TpxCommand)
@options.bundle
@options.engine
@options.steps
@options.guidance
@options.depth
@options.seed
def main(bundle: str | None, engine: str, **settings: Any) -> None:
    """Generate one image of each of ten prompts and print where the tokens went."""
    opened = Bundle.open(find_bundle(bundle))
    model, recorder = opened.manifest.model, RecordingEngine(resolve(engine))
    if not model.thinking_blocks:
        raise BadInput(
            f"expected a bundle with thinking blocks, found {opened.manifest.name} without; export with adapters"
        )
    generator = Generator(opened, recorder)
    jobs = generator.plan([caption(prompt) for prompt in SINGLES + PAIRS], **settings)
    if jobs[0].steps < len(PARTS):
        raise BadInput(f"expected --steps of {len(PARTS)} or more, found {jobs[0].steps}")
    generator.generate_latents(jobs)
    click.echo(table([call[-len(jobs) :] for call in recorder.routes], model.thinking_blocks, model.experts))


if __name__ == "__main__":
    main()
