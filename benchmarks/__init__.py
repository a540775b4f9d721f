"""Measurements behind the figures of docs/; each module names its command."""

import tpx_runtime as tpx_runtime  # before ONNX Runtime and OpenVINO, because it disables their telemetry
