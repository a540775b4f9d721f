"""What the runtime may import: numpy, Pillow, click and one engine, each only when it is needed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tpx_runtime

PACKAGE = Path(tpx_runtime.__file__).parent
LIBRARIES = {"numpy", "PIL", "click"}
ENGINES = {"onnxruntime", "openvino"}


def loaded_after(code: str, folder: Path) -> set[str]:
    """The top-level and full names of the modules that a new process has imported after running `code`."""
    report = "\nimport sys\nprint('|'.join(name for name, module in sys.modules.items() if module))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code + report], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    names = result.stdout.splitlines()[-1].split("|")
    return {name.split(".")[0] for name in names} | set(names)


RUN = """
from tpx_runtime.cli import run
arguments = ["a red cube", "--bundle", {bundle!r}, "--engine", {engine!r}, "--steps", "1"]
assert not run(arguments, standalone_mode=False)
"""
GENERATE = """
from tpx_runtime import Generator
Generator.load({bundle!r}, {engine!r})("a red cube", steps=1)
"""
VERIFY = """
from tpx_runtime.cli import verify
assert not verify([{bundle!r}, "--engine", {engine!r}], standalone_mode=False)
"""


@pytest.mark.parametrize(
    ("code", "engine"),
    [(RUN, "onnxruntime"), (GENERATE, "onnxruntime"), (VERIFY, "onnxruntime"), (RUN, "openvino")],
    ids=["tpx-run", "Generator", "tpx-verify", "tpx-run with OpenVINO"],
)
def test_running_a_bundle_imports_one_engine_and_neither_torch_nor_onnx(
    tiny_bundle: Path, tmp_path: Path, code: str, engine: str
) -> None:
    loaded = loaded_after(code.format(bundle=str(tiny_bundle), engine=engine), tmp_path)
    assert {"numpy", engine} <= loaded
    assert not loaded & {"torch", "onnx", "onnxscript", "tpx_export", "tpx_engines"}
    assert not loaded & (ENGINES - {engine})
    assert not loaded & {"openvino.tools", "openvino_telemetry"}


@pytest.mark.parametrize("preset", [None, "0"])
def test_onnxruntime_telemetry_is_disabled_unless_the_variable_is_set(
    tiny_bundle: Path, tmp_path: Path, preset: str | None
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment |= {"PYTHONPATH": str(PACKAGE.parent), "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment |= {"ORT_DISABLE_TELEMETRY": preset} if preset else {}
    code = GENERATE.format(bundle=str(tiny_bundle), engine="onnxruntime")
    code += "\nimport os\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{preset or 1}\n"), result.stderr
    assert preset or not list(tmp_path.iterdir())


@pytest.mark.parametrize(("preset", "calls"), [("1", 1), ("0", 0)])
def test_onnxruntime_telemetry_is_disabled_where_it_does_not_read_the_variable(
    tmp_path: Path, preset: str, calls: int
) -> None:
    code = f"""
import os
os.environ["ORT_DISABLE_TELEMETRY"] = "{preset}"
import tpx_runtime, onnxruntime
calls = []
onnxruntime.disable_telemetry_events = lambda: calls.append(1)
import tpx_runtime.engine.onnxruntime
assert len(calls) == {calls}, calls
"""
    assert "onnxruntime" in loaded_after(code, tmp_path)


SILENCED_BY = {"CI", "TF_BUILD", "JENKINS_URL"}  # with these, OpenVINO's package sends nothing
OPENVINO_EVENTS = """
import openvino.tools.ovc as converter
print(type(converter.telemetry).__module__)
"""


@pytest.mark.parametrize(
    ("first", "sender"),
    [("import tpx_runtime", "openvino.tools.ovc.telemetry_stub"), ("", "openvino_telemetry.main")],
    ids=["with TPX", "OpenVINO by itself"],
)
def test_openvino_sends_no_event_and_stores_no_client_id(tmp_path: Path, first: str, sender: str) -> None:
    """The second case shows that there is something to disable; it runs as in a CI job, which sends nothing either."""
    environment = {name: value for name, value in os.environ.items() if name not in SILENCED_BY}
    environment |= {"PYTHONPATH": str(PACKAGE.parent), "HOME": str(tmp_path)}
    environment |= {} if first else {"CI": "true"}
    result = subprocess.run(
        [sys.executable, "-c", first + OPENVINO_EVENTS], env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, f"{sender}\n"), result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "statement",
    ["from samples.shapes.parser import Parser; Parser.load()", "import benchmarks.openvino_profile"],
    ids=["samples", "benchmarks"],
)
def test_samples_and_benchmarks_disable_telemetry_before_they_import_an_engine(
    statement: str, tmp_path: Path
) -> None:
    code = f"""
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("onnxruntime", "openvino"):
            assert os.environ.get("ORT_DISABLE_TELEMETRY") == "1" and "openvino_telemetry" in sys.modules
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
sys.meta_path.insert(0, Watch())
{statement}
"""
    assert loaded_after(code, tmp_path) & ENGINES


def test_importing_the_command_line_imports_neither_numpy_nor_an_engine(tmp_path: Path) -> None:
    loaded = loaded_after("import tpx_runtime.cli", tmp_path)
    assert "click" in loaded
    assert not loaded & (ENGINES | {"numpy", "PIL", "importlib.metadata"})


def test_importing_the_generator_imports_neither_an_engine_nor_click(tmp_path: Path) -> None:
    loaded = loaded_after("from tpx_runtime import Generator", tmp_path)
    assert not loaded & (ENGINES | {"click"})


def test_importing_the_package_imports_no_library(tmp_path: Path) -> None:
    assert not loaded_after("import tpx_runtime", tmp_path) & (ENGINES | LIBRARIES)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_source_imports_only_allowed_packages(path: Path) -> None:
    """No torch and no onnx, not even inside a function that no test runs."""
    allowed = set(sys.stdlib_module_names) | LIBRARIES | {"tpx_runtime"}
    if path.parent.name == "engine":
        allowed |= {path.stem.split("_")[0]} & ENGINES
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).split(".")[0])
    assert found <= allowed
