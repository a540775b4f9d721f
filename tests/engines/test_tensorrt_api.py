"""Every attribute and call that the code uses exists in TensorRT: mypy checks our sources against the real modules.

The interfaces of TensorRT for RTX and of TensorRT 11 are read from the installed bindings; that of 10.16 was recorded by
surface.py. Every source file that contains `trt = bindings(...)` is checked. In a copy for mypy this statement becomes
`import tensorrt as trt`, `ICudaEngine = Any` becomes an import of the real class, and functions that end in `_rtx` or
`_full`, and classes that end in `Rtx` or `Full`, are emptied for the other flavour.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_cuda import FakeDriver
from fake_tensorrt import FakeTensorRt

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORDED = {"10.16": HERE / "tensorrt-10.16.1.11.surface"}
INSTALLED = {"11.4": "tensorrt_bindings", "rtx": "tensorrt_rtx_bindings"}
SURFACES = [*RECORDED, *INSTALLED]
MODULES = {"trt", "trtp", "np", "npt", "cuda", "tensorrt", "Path", "threading", "ctypes"}
# Members of IRuntimeConfig that only TensorRT for RTX has.
RTX_MEMBERS = {
    "cuda_graph_strategy",
    "dynamic_shapes_kernel_specialization_strategy",
    "create_runtime_cache",
    "set_runtime_cache",
}
USES = re.compile(r"= bindings\(|^\s*import tensorrt\b", re.MULTILINE)
# test_routed_lora_plugin.py runs it with NVIDIA's own tensorrt.plugin.
TESTED_ELSEWHERE = "routed_lora_plugin.py"
SOURCES = [
    path
    for folder in (ROOT / "tpx_runtime", ROOT / "engines/tpx_engines")
    for path in sorted(folder.rglob("*.py"))
    if USES.search(path.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a stub package `tensorrt`, without those whose bindings are not installed."""
    folders = {}
    for name in SURFACES:
        folder = tmp_path_factory.mktemp(name) / "stubs"
        package = folder / "tensorrt"
        package.mkdir(parents=True)
        stub, module = package / "__init__.pyi", INSTALLED.get(name)
        if module is None:
            shutil.copy(RECORDED[name], stub)
        elif find_spec(module) is None or shutil.which("gcc") is None:
            continue
        else:
            subprocess.run(
                [sys.executable, HERE / "surface.py", module, stub], check=True, capture_output=True
            )
        (package / "plugin.pyi").write_text(
            "from typing import Any\ndef __getattr__(name: str) -> Any: ...\n"
        )
        folders[name] = folder
    return folders


def names(surface: Path) -> dict[str, set[str]]:
    """The classes of an interface, with the names of their members."""
    tree = ast.parse((surface / "tensorrt/__init__.pyi").read_text(encoding="utf-8"))
    members = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            members[node.name] = {
                getattr(member, "name", "") or ast.unparse(getattr(member, "target", ast.Constant(0)))
                for member in node.body
            }
    return members


class ForMypy(ast.NodeTransformer):
    """Rewrites a source as if TensorRT could be imported.

    With `reveal`, mypy reports the type of every object whose attribute has the name of a TensorRT member.
    """

    def __init__(self, classes: dict[str, set[str]], emptied: str, reveal: bool = False) -> None:
        self.classes, self.emptied, self.reveal = classes, emptied, reveal
        self.members = {name for members in classes.values() for name in members} | set(classes)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        [target] = node.targets
        if isinstance(target, ast.Name) and ast.unparse(node.value) == "Any" and target.id in self.classes:
            return ast.copy_location(ast.ImportFrom("tensorrt", [ast.alias(target.id)], 0), node)
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
        statements: list[ast.stmt] = []
        for name, value in pairs:
            is_import = ast.unparse(value).startswith("bindings(")
            statement = self._import() if is_import else ast.Assign([name], value)
            statements.append(ast.copy_location(statement, node))
        return statements

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        is_import = node.value is not None and ast.unparse(node.value).startswith("bindings(")
        return ast.copy_location(self._import(), node) if is_import else node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if node.name.endswith(self.emptied[1:].title()):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    member.body = ast.parse("raise NotImplementedError").body
            return ast.fix_missing_locations(node)
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.name.endswith(self.emptied):
            node.body = ast.parse("raise NotImplementedError").body
            ast.fix_missing_locations(node)
            return node
        self.generic_visit(node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`x.run` becomes `(reveal_type(x), x.run)[1]`, except for modules, which mypy knows."""
        self.generic_visit(node)
        skipped = ast.unparse(node.value) in MODULES or node.attr.startswith("__")
        if not self.reveal or skipped or node.attr not in self.members or not isinstance(node.ctx, ast.Load):
            return node
        reveal_call = ast.Call(ast.Name("reveal_type"), [node.value], [])
        return ast.Subscript(ast.Tuple([reveal_call, node]), ast.Constant(1))

    @staticmethod
    def _import() -> ast.stmt:
        return ast.Import([ast.alias("tensorrt", "trt")])


def check(
    surface: Path,
    flavour: str,
    folder: Path,
    reveal: bool = False,
    replacements: dict[str, str] | None = None,
) -> list[str]:
    """The output of mypy for all sources, after the text replacements.

    With `reveal`, only for sources that no other test runs with the real TensorRT.
    """
    shadows, modules = [], []
    for path in SOURCES:
        if reveal and path.name == TESTED_ELSEWHERE:
            continue
        text = path.read_text(encoding="utf-8")
        for old, new in (replacements or {}).items():
            text = text.replace(old, new)
        transform = ForMypy(names(surface), "_full" if flavour == "rtx" else "_rtx", reveal)
        tree = ast.fix_missing_locations(transform.visit(ast.parse(text)))
        shadow = folder / f"{path.stem}-{path.parent.name}.py"
        shadow.write_text(ast.unparse(tree), encoding="utf-8")
        shadows += ["--shadow-file", str(path), str(shadow)]
        base = ROOT / "engines" if "tpx_engines" in path.parts else ROOT
        modules += ["-m", ".".join(path.relative_to(base).with_suffix("").parts)]
    options = ["--config-file=", "--check-untyped-defs", "--no-strict-optional", "--follow-imports=silent"]
    options += ["--ignore-missing-imports", "--no-error-summary", f"--cache-dir={folder}"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *shadows, *modules],
        env={**os.environ, "MYPYPATH": os.pathsep.join(map(str, (surface, ROOT, ROOT / "engines")))},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of mypy, which also caches its analysis of numpy."""
    return tmp_path_factory.mktemp("mypy")


@pytest.mark.parametrize("name", SURFACES)
def test_every_call_exists_in_tensorrt(surfaces: dict[str, Path], name: str, folder: Path) -> None:
    if name not in surfaces:
        pytest.skip(f"expected the package {INSTALLED[name]} and gcc, found not both")
    assert check(surfaces[name], name, folder) == []


def test_wrong_calls_are_detected(surfaces: dict[str, Path], folder: Path) -> None:
    replacements = {
        "execute_async_v3": "execute_async_v2",
        "trt.Runtime(": "trt.RunTime(",
        "set_tensor_address(name, ": "set_tensor_address(",
        "min_shape, max_shape, max_shape)": "min_shape, max_shape)",
    }
    output = "\n".join(check(surfaces["10.16"], "10.16", folder, replacements=replacements))
    assert '"IExecutionContext" has no attribute "execute_async_v2"' in output
    assert 'Module has no attribute "RunTime"' in output
    for call in ("set_tensor_address", "set_shape"):
        assert re.search(f'Missing positional argument.* in call to "{call}"', output)


@pytest.mark.parametrize("name", ["10.16", "rtx"])
def test_no_object_of_tensorrt_has_type_any(surfaces: dict[str, Path], name: str, folder: Path) -> None:
    """Every object with an attribute of TensorRT has a known type; objects of type Any would not be checked."""
    if name not in surfaces:
        pytest.skip(f"expected the package {INSTALLED[name]} and gcc, found not both")
    output = check(surfaces[name], name, folder, reveal=True)
    assert len([line for line in output if 'Revealed type is "tensorrt.' in line]) > 20
    assert [line for line in output if 'Revealed type is "Any"' in line] == []


def test_finds_the_sources_that_use_tensorrt() -> None:
    stems = {path.stem for path in SOURCES}
    assert {"tensorrt_flavours", "tensorrt_session", "tensorrt", "routed_lora_plugin"} <= stems


@pytest.mark.parametrize("name", SURFACES)
def test_the_fake_has_only_names_that_exist_in_tensorrt(surfaces: dict[str, Path], name: str) -> None:
    if name not in surfaces:
        pytest.skip(f"expected the package {INSTALLED[name]} and gcc, found not both")
    real, fake = names(surfaces[name]), FakeTensorRt(FakeDriver())
    classes = {n: v for n, v in vars(fake).items() if isinstance(v, type)}
    if name != "rtx":
        for class_name in ("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeCache"):
            del classes[class_name]
        real["IRuntimeConfig"] |= RTX_MEMBERS
    assert classes.keys() <= real.keys()
    for class_name, kind in classes.items():
        members = {member for member in vars(kind) if not member.startswith("_")}
        assert members <= real[class_name], class_name
