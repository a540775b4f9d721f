"""Graphs without weights beside one file of weights: every tensor is stored once, whichever graphs use it."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx
from onnx.external_data_helper import set_external_data

WEIGHTS = "weights.data"
_SMALL_BYTES = 1024  # tensors up to here stay inside the graph: engines want shapes and scalars at hand
_ALIGN_BYTES = 4096  # a page, so that engines can map tensors into memory instead of copying them


class WeightFile:
    """`weights.data` of one folder, written tensor by tensor; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: BinaryIO = (folder / WEIGHTS).open("wb")
        self._places: dict[tuple[int, bytes], int] = {}  # (data type, SHA-256) -> offset

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def save(self, model: onnx.ModelProto, name: str) -> Path:
        """Write the graph as `name` in this folder, its large tensors into the weight file."""
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        for tensor in bare.graph.initializer:
            data = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(data) > _SMALL_BYTES:
                set_external_data(tensor, WEIGHTS, self._place(tensor.data_type, data), len(data))
                tensor.ClearField("raw_data")
        path = self._folder / name
        self._file.flush()
        onnx.save_model(bare, path)
        onnx.checker.check_model(str(path))
        return path

    def _place(self, data_type: int, data: bytes) -> int:
        key = (data_type, hashlib.sha256(data).digest())
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGN_BYTES))
            self._places[key] = self._file.tell()
            self._file.write(data)
        return self._places[key]
