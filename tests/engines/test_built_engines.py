"""A bundle built with tpx-build and run: the same results as in ONNX Runtime, which runs it as it is."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tpx_engines.cli import main as tpx_build
from tpx_runtime.bundle import Bundle
from tpx_runtime.engine import ENGINES
from tpx_runtime.environment import CUDA_GRAPHS_VARIABLE, ENGINES_VARIABLE
from tpx_runtime.generator import Generator
from tpx_runtime.verify import verify_bundle


def on_a_gpu(name: str) -> list[pytest.MarkDecorator]:
    problem = ENGINES[name].problem()
    return [pytest.mark.gpu, pytest.mark.skipif(problem is not None, reason=str(problem))]


@pytest.mark.parametrize(
    ("name", "cuda_graphs"),
    [
        ("openvino", "0"),
        *(
            pytest.param(name, cuda_graphs, marks=on_a_gpu(name))
            for name in ("tensorrt-rtx", "tensorrt")
            for cuda_graphs in ("0", "1")
        ),
    ],
)
def test_a_built_bundle_gives_the_results_of_onnxruntime(
    name: str, cuda_graphs: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENGINES_VARIABLE, str(tmp_path))
    monkeypatch.setenv(CUDA_GRAPHS_VARIABLE, cuda_graphs)
    result = CliRunner().invoke(tpx_build, [str(tiny_bundle), "--engine", name, "--batch", "1,4"])
    assert result.exit_code == 0, result.output
    bundle, engine = Bundle.open(tiny_bundle), ENGINES[name]
    assert [part.part for part in verify_bundle(bundle, engine) if not part.ok] == []
    settings = {"steps": 3, "num_images": 3, "batch_size": 2}
    expected = Generator.load(tiny_bundle, "onnxruntime")("a red cube", **settings)
    for image, other in zip(Generator(bundle, engine)("a red cube", **settings), expected, strict=True):
        assert np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16)).max() <= 1
