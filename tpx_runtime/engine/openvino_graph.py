"""A compiled graph: for any shapes, or for exact ones, run whole or as two halves side by side.

A call's rows do not depend on one another: they are guidance's branches, or pictures of a batch. Run as one, all threads
wait for each other after every one of some 200 kernels; as halves each is left to its own cores and they meet once. How
much that is depends on how near the cores are to one another: docs/performance.md.
"""

import numpy as np
import openvino

from .session import Arrays


class Graph:
    """A graph for any shapes."""

    def __init__(self, model: openvino.CompiledModel) -> None:
        self._request = model.create_infer_request()
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
        """Outputs. Raises what OpenVINO raises."""
        self._request.infer(inputs, share_inputs=True, share_outputs=True)
        made: Arrays = {}
        for names in self._outputs:
            made |= dict.fromkeys(names, self._request.get_tensor(next(iter(names))).data.copy())
        return made


class ExactGraph(Graph):
    """A graph for exact shapes as `parts` requests: each takes an equal share of a call's rows.

    Arrays go through the requests' own memory, found once: handed over at each call they cost the sample's transformer 4%.
    """

    def __init__(self, model: openvino.CompiledModel, parts: int) -> None:
        super().__init__(model)
        self._requests = [self._request, *(model.create_infer_request() for _ in range(parts - 1))]
        self._read = [self._memory(names) for names in self._inputs]
        self._written = [self._memory(names) for names in self._outputs]

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs, each with the rows of `inputs` in their order. Raises what OpenVINO raises."""
        given = [next(inputs[name] for name in names if name in inputs) for names in self._inputs]
        *others, last = range(len(self._requests))
        try:
            for part in others:
                self._fill(part, given)
                self._requests[part].start_async()
            self._fill(last, given)
            self._requests[last].infer(share_outputs=True)
        finally:  # whatever happened, none is left at work; to wait for what does not run is no error
            for part in others:
                self._requests[part].wait()
        made: Arrays = {}
        for names, rows in zip(self._outputs, self._written, strict=True):
            made |= dict.fromkeys(names, np.concatenate(rows))
        return made

    def agrees(self) -> bool:
        """Whether all parts, at work side by side, say the same of the same rows, and nothing but numbers."""
        parts, rng, inputs = len(self._requests), np.random.default_rng(0), {}
        if parts == 1:
            return True
        for names, (own, *_) in zip(self._inputs, self._read, strict=True):
            share = np.abs(rng.standard_normal(own.shape)).astype(own.dtype)
            inputs[next(iter(names))] = np.concatenate([share] * parts)
        shares = [said.reshape(parts, -1) for said in self.run(inputs).values()]
        return all(np.isfinite(each).all() and (each == each[0]).all() for each in shares)

    def _memory(self, names: set[str]) -> list[np.ndarray]:
        """Of one input or output, for each request."""
        return [request.get_tensor(next(iter(names))).data for request in self._requests]

    def _fill(self, part: int, given: list[np.ndarray]) -> None:
        for rows, memory in zip(given, self._read, strict=True):
            own = memory[part]
            np.copyto(own, rows[part * len(own) : (part + 1) * len(own)])
