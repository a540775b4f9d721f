"""The run of ShapesEval whose figures docs/shapes-eval.md gives, kept so that another run can be held against it.

    python -m samples.shapes.eval_record out/shapes-eval
    tpx-eval compare samples/shapes/shapes_eval.json out/shapes-eval

shapes_eval.json is the run's report.json with the hash of the checkpoint in the place of the bundle's: that of a bundle
changes with the format and the exporter.
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
    """The record of the whole run in the folder `run`, drawn with `weights`, a line a prompt. Raises BadInput."""
    Report.load(run)  # refuses what is no report
    facts = json.loads((run / "report.json").read_text(encoding="utf-8"))
    if facts["limit"] is not None:
        raise BadInput(
            f"expected a run of all prompts in {run}, found --limit {facts['limit']}; run it whole"
        )
    del facts["bundle_sha256"]
    return as_json({"weights_sha256": hash_file(weights), **facts})


def as_json(facts: dict[str, Any]) -> str:
    lines = ",\n".join(f"    {json.dumps(one)}" for one in facts["prompts"])
    head = json.dumps({key: value for key, value in facts.items() if key != "prompts"}, indent=2)
    return head.removesuffix("\n}") + ',\n  "prompts": [\n' + lines + "\n  ]\n}\n"


@click.command(cls=TpxCommand)
@click.argument("run", type=click.Path(path_type=Path))
def main(run: Path) -> None:
    """Take the finished RUN of the shipped weights for the record."""
    write_atomic(RECORD, record(run).encode())
    click.echo(RECORD)


if __name__ == "__main__":
    main()
