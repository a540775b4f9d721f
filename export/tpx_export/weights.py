"""Graphs without weights beside one file of weights: every tensor is stored once, whichever graphs use it."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx
import onnx_ir as ir

WEIGHTS = "weights.data"
_SMALL_BYTES = 1024  # tensors up to here stay inside the graph: engines want shapes and scalars at hand
_ALIGN_BYTES = 4096  # a page, so that engines can map tensors into memory instead of copying them


class WeightFile:
    """`weights.data` of one folder, written tensor by tensor; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: BinaryIO = (folder / WEIGHTS).open("wb")
        self._places: dict[tuple[ir.DataType, bytes], int] = {}  # (data type, SHA-256) -> offset

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def take(self, model: ir.Model) -> onnx.ModelProto:
        """Move the large tensors of `model` into the file, one at a time, and return the graph that refers to them."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _SMALL_BYTES:
                value.const_value = ir.ExternalTensor(
                    WEIGHTS,
                    self._place(tensor.dtype, tensor.tobytes()),
                    tensor.nbytes,
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]  # no initializer's shape is symbolic
                    name=tensor.name or "",
                    base_dir=self._folder,
                )
        self._file.flush()
        return ir.to_proto(model)

    def write(self, model: onnx.ModelProto, name: str) -> None:
        """Write a graph that `take` returned as `name` in this folder. Raises onnx's ValidationError."""
        path = self._folder / name
        onnx.save_model(model, path)
        onnx.checker.check_model(str(path))

    def _place(self, data_type: ir.DataType, data: bytes) -> int:
        key = (data_type, hashlib.sha256(data).digest())
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGN_BYTES))
            self._places[key] = self._file.tell()
            self._file.write(data)
        return self._places[key]
