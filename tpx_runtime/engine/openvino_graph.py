"""A compiled graph: with dynamic shapes, or with static shapes and run whole or as two halves in parallel.

The rows of a batch (guidance branches, images) are independent. Run whole, all threads synchronise after each of some 200
kernels; as halves, each half has its own cores and they synchronise once. The gain depends on the distance between the
cores: docs/optimisations.md.
"""

import numpy as np
import openvino

from .session import Arrays


class Graph:
    """A graph with dynamic shapes."""

    def __init__(self, model: openvino.CompiledModel) -> None:
        self._request = model.create_infer_request()
        self._outputs = [port.names for port in model.outputs]
        self._inputs = [port.names for port in model.inputs]

    def problem(self, inputs: Arrays) -> str | None:
        """An "expected ..., found ..." message if the names of `inputs` are not the graph's, else None.

        An input has several names if OpenVINO removed a conversion: those before and after the conversion.
        """
        given = [names & inputs.keys() for names in self._inputs]
        if len(inputs) == len(given) and all(given):
            return None
        wanted = ", ".join(sorted("/".join(sorted(names)) for names in self._inputs))
        return f"expected the inputs {wanted}, found {', '.join(sorted(inputs)) or 'none'}"

    def run(self, inputs: Arrays) -> Arrays:
        """All outputs by name. Raises OpenVINO's exceptions."""
        self._request.infer(inputs, share_inputs=True, share_outputs=True)
        outputs: Arrays = {}
        for names in self._outputs:
            outputs |= dict.fromkeys(names, self._request.get_tensor(next(iter(names))).data.copy())
        return outputs


class StaticGraph(Graph):
    """A graph with static shapes as `parts` infer requests, each for an equal share of the rows.

    Arrays are copied to and from the requests' own memory, looked up once. Passing them at each call took 4% longer for the
    transformer of the sample model.
    """

    def __init__(self, model: openvino.CompiledModel, parts: int) -> None:
        super().__init__(model)
        self._requests = [self._request, *(model.create_infer_request() for _ in range(parts - 1))]
        self._input_memory = [self._memory(names) for names in self._inputs]
        self._output_memory = [self._memory(names) for names in self._outputs]

    def run(self, inputs: Arrays) -> Arrays:
        """All outputs by name, with rows in the order of `inputs`. Raises OpenVINO's exceptions."""
        given = [next(inputs[name] for name in names if name in inputs) for names in self._inputs]
        *others, last = range(len(self._requests))
        try:
            for part in others:
                self._copy_inputs(part, given)
                self._requests[part].start_async()
            self._copy_inputs(last, given)
            self._requests[last].infer(share_outputs=True)
        finally:  # leave no request running; waiting for one that was not started is no error
            for part in others:
                self._requests[part].wait()
        outputs: Arrays = {}
        for names, rows in zip(self._outputs, self._output_memory, strict=True):
            outputs |= dict.fromkeys(names, np.concatenate(rows))
        return outputs

    def parts_agree(self) -> bool:
        """Whether all parts, run in parallel on the same rows, give equal and finite outputs."""
        parts, rng, inputs = len(self._requests), np.random.default_rng(0), {}
        if parts == 1:
            return True
        for names, (memory, *_) in zip(self._inputs, self._input_memory, strict=True):
            rows = np.abs(rng.standard_normal(memory.shape)).astype(memory.dtype)
            inputs[next(iter(names))] = np.concatenate([rows] * parts)
        outputs = [array.reshape(parts, -1) for array in self.run(inputs).values()]
        return all(np.isfinite(array).all() and (array == array[0]).all() for array in outputs)

    def _memory(self, names: set[str]) -> list[np.ndarray]:
        """The memory of one input or output in each request."""
        return [request.get_tensor(next(iter(names))).data for request in self._requests]

    def _copy_inputs(self, part: int, given: list[np.ndarray]) -> None:
        for rows, memory in zip(given, self._input_memory, strict=True):
            target = memory[part]
            np.copyto(target, rows[part * len(target) : (part + 1) * len(target)])
