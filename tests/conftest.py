"""Shared fixtures: a small random model, its exported bundles, and the signals that a command stops cleanly on."""

import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tiny import make_tiny
from traced import traced_once

from tpx_export import exporter
from tpx_export.exporter import Summary, export_bundle
from tpx_export.model import ThinkingSpec
from tpx_export.model.text_to_image import TextToImage
from tpx_export.pipeline import Pipeline
from tpx_export.quantise.quantiser import QuantisationOptions
from tpx_runtime.environment import ENGINES_VARIABLE, THREADS_VARIABLE

Export = tuple[Path, Summary]


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored, and the tested commands would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Small models are no faster with a second thread, and the threads of parallel test processes wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("TPX_BUNDLE", ENGINES_VARIABLE, THREADS_VARIABLE):
            patch.delenv(variable, raising=False)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all test processes share: the parent of the folders that pytest-xdist gives its workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if hasattr(request.config, "workerinput") else folder


@pytest.fixture(scope="session", autouse=True)
def equal_modules_are_traced_once(shared_folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "to_onnx", traced_once(exporter.to_onnx, shared_folder / "traced"))
        yield


@pytest.fixture(scope="session")
def tiny_model() -> TextToImage:
    return make_tiny(ThinkingSpec(blocks=(0, 2), experts=3, rank=4, max_depth=3))


@pytest.fixture(scope="session")
def export_once(tiny_model: TextToImage, shared_folder: Path) -> Callable[..., Export]:
    """Exports the tiny model once for each name; other calls and other test processes reuse the export."""

    def export(name: str, **options: Any) -> Export:
        out, pickled_summary = shared_folder / name / "tiny", shared_folder / f"{name}.pickle"
        with FileLock(shared_folder / f"{name}.lock"):
            if not pickled_summary.exists():
                pickled_summary.write_bytes(
                    pickle.dumps(export_bundle(Pipeline.from_model(tiny_model), out, **options))
                )
        return out, pickle.loads(pickled_summary.read_bytes())

    return export


@pytest.fixture(scope="session")
def tiny_export(export_once: Callable[..., Export]) -> Export:
    return export_once("fp32")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: Export) -> Path:
    """A bundle with depths 1..3; copy it before changing anything in it."""
    return tiny_export[0]


@pytest.fixture(scope="session")
def half_export(export_once: Callable[..., Export]) -> Export:
    """The tiny model in float16, with depths 1..3."""
    return export_once("fp16", precision="fp16")


@pytest.fixture(scope="session")
def int8_export(export_once: Callable[..., Export]) -> Export:
    """The tiny model in int8, with depths 1 and 2. `accept_loss`, because so small a model gains nothing from int8."""
    return export_once("int8", depth=2, precision="int8", quantisation=QuantisationOptions(accept_loss=True))


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGHUP"])
def how(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """Each signal that a command stops cleanly on, with its default handler, because nohup makes tests ignore SIGHUP."""
    if not hasattr(signal, request.param):
        pytest.skip(f"this system has no {request.param}")
    signal_number = signal.Signals[request.param]
    if signal_number == signal.SIGINT:
        yield signal_number
        return
    before = signal.signal(signal_number, signal.SIG_DFL)
    yield signal_number
    signal.signal(signal_number, before)
