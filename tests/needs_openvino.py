"""A module of tests that imports this one is skipped where OpenVINO is not installed."""

import pytest

pytest.importorskip("openvino", reason="needs openvino (pip install 'tpx[openvino]')")
