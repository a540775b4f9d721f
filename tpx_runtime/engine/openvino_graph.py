"""A compiled graph, run whole or as two halves side by side.

A call's rows do not depend on one another: they are guidance's branches, or pictures of a batch. Run as one, all threads
wait for each other after every one of some 200 kernels; as halves each is left to its own cores and they meet once. How
much that is depends on how near the cores are to one another: docs/performance.md.
"""

from contextlib import ExitStack

import numpy as np
import openvino

from . import Arrays


class Graph:
    """`parts` requests of one compiled graph: each takes an equal share of a call's rows."""

    def __init__(self, model: openvino.CompiledModel, parts: int = 1) -> None:
        self._requests = [model.create_infer_request() for _ in range(parts)]
        self._outputs = [port.names for port in model.outputs]
        self._inputs = [port.names for port in model.inputs]

    def problem(self, inputs: Arrays) -> str | None:
        """What the graph's inputs are and what is there instead, or None.

        An input has several names where OpenVINO drops a conversion: of what was converted, and of what was made of it.
        """
        given = [names & inputs.keys() for names in self._inputs]
        if len(inputs) == len(given) and all(given):
            return None
        wanted = ", ".join(sorted("/".join(sorted(names)) for names in self._inputs))
        return f"expected the inputs {wanted}, found {', '.join(sorted(inputs)) or 'none'}"

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs, each with the rows of `inputs` in their order. Raises what OpenVINO raises."""
        *others, mine = self._requests
        shares = (
            {name: np.split(rows, len(self._requests)) for name, rows in inputs.items()} if others else {}
        )
        with ExitStack() as running:  # whatever happens, none is left at work
            for index, request in enumerate(others):
                # Before the start: an interrupt may come between the two, and to wait for what does not run is no error.
                running.callback(request.wait)
                request.start_async({name: share[index] for name, share in shares.items()}, share_inputs=True)
            mine.infer({name: share[-1] for name, share in shares.items()} or inputs, share_inputs=True)
        made: Arrays = {}
        for names in self._outputs:
            rows = [request.get_tensor(next(iter(names))).data for request in self._requests]
            made |= dict.fromkeys(names, np.concatenate(rows))
        return made
