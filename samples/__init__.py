"""The sample model: its training, its judge and its demo."""

import tpx_runtime as tpx_runtime  # before ONNX Runtime and OpenVINO, because it disables their telemetry
