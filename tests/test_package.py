"""The built wheel: its contents, and that its runtime generates an image where torch and onnx cannot be imported."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
GENERATE = """
import sys

class ImportBlocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnxscript", "tpx_export", "tpx_engines", "safetensors"}:
            raise ImportError(f"the runtime imported {name}")

sys.meta_path.insert(0, ImportBlocker())
import tpx_runtime
from tpx_runtime.cli import run
print(tpx_runtime.__file__)
run([sys.argv[1], "--bundle", sys.argv[2], "--out", sys.argv[3], "--engine", "onnxruntime"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
    ]
    subprocess.run(
        [*command, str(ROOT)], check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    )
    [path] = out.glob("*.whl")
    return path


def test_contains_three_packages_and_no_weights(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.startswith("tpx-")} == {
        "tpx_runtime",
        "tpx_export",
        "tpx_engines",
    }
    assert "tpx_runtime/py.typed" in names
    assert wheel.stat().st_size < 400_000


def test_packages_for_one_platform_are_not_required_on_others(wheel: Path) -> None:
    """`make demo` installs the extra dev; on a Mac or on ARM pip must find all of it."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()
    found = [Requirement(line.split(": ", 1)[1]) for line in lines if line.startswith("Requires-Dist: ")]
    here = {"extra": "dev", "sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.11"}

    def required(**changes: str) -> dict[str, str]:
        chosen = (one for one in found if one.marker is None or one.marker.evaluate({**here, **changes}))
        return {one.name: str(one.specifier) for one in chosen if "tensorrt" in one.name}

    assert required().keys() == {
        "tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-cu13-bindings"
    }  # fmt: skip
    assert required(python_version="3.12").keys() == {"tensorrt-cu13-bindings"}
    for other in ({"platform_machine": "aarch64"}, {"sys_platform": "darwin"}, {"sys_platform": "win32"}):
        assert required(**other) == {}
    assert required(extra="tensorrt-rtx").items() <= required().items()


@pytest.mark.parametrize(
    ("module", "arguments", "missing"),
    [
        ("tpx_export.cli", "--ckpt x.safetensors", "onnx"),
        ("tpx_export.training.cli", "--base x --data y --out z", "torch"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    module: str, arguments: str, missing: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from {module} import main; main()"
    command = [sys.executable, "-c", code, *arguments.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (4, "", 1), result.stderr
    assert f"expected the package {missing} for " in result.stderr
    assert "pip install 'tpx[export]'" in result.stderr


def test_building_for_an_engine_that_is_not_installed_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['openvino'] = None; from tpx_engines.cli import main; main()"
    command = [sys.executable, "-c", code, str(tiny_bundle), "--engine", "openvino"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr.startswith("error: expected the package openvino") and result.stderr.count("\n") == 1


def test_the_runtime_in_the_wheel_works_without_torch_and_onnx(
    wheel: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    installed, out = tmp_path / "installed", tmp_path / "cube.png"
    zipfile.ZipFile(wheel).extractall(installed)
    result = subprocess.run(
        [sys.executable, "-c", GENERATE, "a red cube on a blue sphere", str(tiny_bundle), str(out)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [str(installed / "tpx_runtime/__init__.py"), str(out)]
    assert out.exists()
