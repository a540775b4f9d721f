"""Writes the interface of a TensorRT Python module as a stub file for mypy, from the module itself and without a GPU.

    python surface.py tensorrt_bindings OUT [FOLDER]     # FOLDER: where the wheel was unpacked, if it is not installed

The modules of full TensorRT want libraries that are not to be had; they load beside stubs of the nine C symbols that they
ask for. pybind11 writes each signature into the docstring, and mypy's stubgen reads it from there.
"""

import ast
import ctypes
import importlib
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

SYMBOLS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
_DULL = re.compile(
    r"bool: DataType|\s+(def __(eq|ne|hash|index|enter|exit|del|and|or|xor|invert|r\w+)__|__\w+: ClassVar)"
)
_IN_CPP = {
    "get_error": ", index: int) -> ParserError",
    "create_runtime_cache": ") -> IRuntimeCache",
    "set_runtime_cache": ", cache: IRuntimeCache) -> bool",
}
_LEFT_OUT = re.compile(r"I\w+Layer|I?Plugin(?!Registry)\w*|I\w+Plugin\w*")


def load_beside_stubs(folder: Path, major: str | None = None) -> ModuleType:
    """Load tensorrt_bindings with stub libraries that are compiled in `folder`."""
    major = major or metadata.version("tensorrt-cu13-bindings").split(".")[0]
    for library, symbols in SYMBOLS.items():
        name = f"lib{library}.so.{major}"
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    return importlib.import_module("tensorrt_bindings")


def write_stub(module: ModuleType, out: Path) -> None:
    """The stub of a loaded module, without its layers and plugins, which TPX does not use directly."""
    from mypy.stubgenc import generate_stub_for_c_module

    [inner] = [name for name in sys.modules if name.startswith(f"{module.__name__}.tensorrt")][:1]
    generate_stub_for_c_module(inner, str(out), known_modules=[inner])
    lines = [line for line in out.read_text().splitlines() if not _DULL.match(line)]
    while True:  # stubgen writes defaults before parameters without, which is a syntax error
        try:
            tree = ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            wrong = (error.lineno or 1) - 1
            lines[wrong] = re.sub(r"\(self.*", "(self, *args: Any, **kwargs: Any) -> Any: ...", lines[wrong])
    tree.body = [node for node in tree.body if not _LEFT_OUT.fullmatch(getattr(node, "name", ""))]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "INetworkDefinition":
            node.body = [one for one in node.body if not getattr(one, "name", "").startswith("add_")]
        if isinstance(node, ast.ClassDef) and node.name == "IHostMemory":  # pybind11 does not document it
            node.body += ast.parse("def __buffer__(self, flags: int) -> memoryview: ...").body
    text = f'__version__ = "{module.__version__}"\n{ast.unparse(tree)}\n'
    text = re.sub(r"\n\n+", "\n", text.replace("collections.abc.", "").replace(":\n        ...", ": ..."))
    for cpp, python in _IN_CPP.items():  # stubgen cannot read the C++ names in docstrings
        text = text.replace(f"def {cpp}(self, *args, **kwargs)", f"def {cpp}(self{python}")
    text = text.replace("typing.SupportsInt", "int")  # it would forbid callbacks that accept an int
    out.write_text(f"# mypy: ignore-errors\nfrom collections.abc import Sequence\n{text}")


def main() -> None:
    name, out, *where = sys.argv[1:]
    sys.path[:0] = where
    with tempfile.TemporaryDirectory() as folder:
        if name == "tensorrt_bindings":
            found = [path.name for path in Path(where[0]).glob("*.dist-info")] if where else []
            major = found[0].split("-")[1].split(".")[0] if found else None
            module = load_beside_stubs(Path(folder), major)
        else:
            from tpx_runtime.engine.tensorrt_flavours import RTX, bindings

            module = bindings(RTX)
        write_stub(module, Path(out))


if __name__ == "__main__":
    main()
