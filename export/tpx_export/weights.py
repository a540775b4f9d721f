"""One external weight file for all graphs of a folder: every tensor is stored once, however many graphs use it."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx
import onnx_ir as ir

WEIGHTS = "weights.data"
_MAX_INLINE_BYTES = 1024  # tensors up to this size stay in the graph: engines need shapes and scalars there
_ALIGN_BYTES = 4096  # a page, so that engines can map tensors into memory instead of copying them


class WeightFile:
    """Writes `weights.data` of one folder tensor by tensor; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: BinaryIO = (folder / WEIGHTS).open("wb")
        self._offsets: dict[tuple[ir.DataType, bytes], int] = {}  # by data type and SHA-256

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def externalise(self, model: ir.Model) -> onnx.ModelProto:
        """Write the large tensors of `model` to the file, one at a time, and return the graph that refers to them."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes > _MAX_INLINE_BYTES:
                value.const_value = ir.ExternalTensor(
                    WEIGHTS,
                    self._store(tensor.dtype, tensor.tobytes()),
                    tensor.nbytes,
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]  # no initializer's shape is symbolic
                    name=tensor.name or "",
                    base_dir=self._folder,
                )
        self._file.flush()
        return ir.to_proto(model)

    def write(self, model: onnx.ModelProto, name: str) -> None:
        """Write a graph that `externalise` returned as `name` to this folder. Raises onnx's ValidationError."""
        path = self._folder / name
        onnx.save_model(model, path)
        onnx.checker.check_model(str(path))

    def _store(self, data_type: ir.DataType, data: bytes) -> int:
        """Write a tensor unless the file has it already, and return its offset."""
        key = (data_type, hashlib.sha256(data).digest())
        if key not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGN_BYTES))
            self._offsets[key] = self._file.tell()
            self._file.write(data)
        return self._offsets[key]
