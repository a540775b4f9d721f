"""A small random model and its bundle: what most tests run on."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import make_tiny

from tpx_export.exporter import Summary, export_bundle
from tpx_export.model import ThinkingSpec
from tpx_export.model.text_to_image import TextToImage
from tpx_export.pipeline import Pipeline
from tpx_export.quantise.quantiser import Int8Options


@pytest.fixture(scope="session")
def tiny_model() -> TextToImage:
    return make_tiny(ThinkingSpec(blocks=(0, 2), experts=3, rank=4, max_depth=3))


@pytest.fixture(scope="session")
def tiny_export(tiny_model: TextToImage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    summary = export_bundle(Pipeline.of(tiny_model), out)
    return out, summary


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: tuple[Path, Summary]) -> Path:
    """A bundle with depths 1..3; copy it before changing anything in it."""
    return tiny_export[0]


@pytest.fixture(scope="session")
def int8_export(tiny_model: TextToImage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    """In int8 with depths 1 and 2, kept whatever it costs: so small a model gains nothing."""
    out = tmp_path_factory.mktemp("int8") / "tiny"
    options = Int8Options(accept_loss=True)
    return out, export_bundle(Pipeline.of(tiny_model), out, depth=2, precision="int8", int8=options)


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGHUP"])
def how(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """Each signal that ends a command politely, also where the tests themselves run under nohup, which ignores one."""
    if not hasattr(signal, request.param):
        pytest.skip(f"this system has no {request.param}")
    asked = signal.Signals[request.param]
    if asked == signal.SIGINT:
        yield asked
        return
    before = signal.signal(asked, signal.SIG_DFL)
    yield asked
    signal.signal(asked, before)
