"""Writes the record of the ShapesEval run in docs/shapes-eval.md, with which other runs can be compared.

    python -m samples.shapes.eval_record out/shapes-eval
    tpx-eval compare samples/shapes/shapes_eval.json out/shapes-eval

shapes_eval.json is the run's report.json with the checkpoint's hash instead of the bundle's, because a bundle's hash changes
with the format and the exporter.
"""

import json
from pathlib import Path
from typing import Any

import click

from tpx_runtime.bundle import hash_file
from tpx_runtime.command import TpxCommand
from tpx_runtime.errors import BadInput
from tpx_runtime.evaluation.compare import Report
from tpx_runtime.records import write_atomic

SHIPPED = Path(__file__).with_name("shapes.safetensors")
RECORD = Path(__file__).with_name("shapes_eval.json")


def record(run: Path, weights: Path = SHIPPED) -> str:
    """The JSON record of the complete run in folder `run`, generated with `weights`. Raises BadInput."""
    path = run / "report.json"
    Report.load(path)  # raises BadInput if there is no valid report
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not {"limit", "bundle_sha256"} <= facts.keys():
        raise BadInput(
            f"expected a report with its limit and bundle in {path}, found one without them; run `tpx-eval shapes` again"
        )
    if facts["limit"] is not None:
        raise BadInput(
            f"expected a run of all prompts in {run}, found --limit {facts['limit']}; run it without --limit"
        )
    del facts["bundle_sha256"]
    return as_json({"weights_sha256": hash_file(weights), **facts})


def as_json(facts: dict[str, Any]) -> str:
    """The JSON text of the record, one line per prompt."""
    lines = ",\n".join(f"    {json.dumps(prompt)}" for prompt in facts["prompts"])
    head = json.dumps({key: value for key, value in facts.items() if key != "prompts"}, indent=2)
    return head.removesuffix("\n}") + ',\n  "prompts": [\n' + lines + "\n  ]\n}\n"


@click.command(cls=TpxCommand)
@click.argument("run", type=click.Path(path_type=Path))
def main(run: Path) -> None:
    """Write the finished RUN of the shipped weights to shapes_eval.json."""
    write_atomic(RECORD, record(run).encode())
    click.echo(RECORD)


if __name__ == "__main__":
    main()
