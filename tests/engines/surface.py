"""Writes the interface of a TensorRT Python module as a stub file for mypy, from the module itself and without a GPU.

    python surface.py tensorrt_bindings OUT [FOLDER]     # FOLDER: where the wheel was unpacked, if it is not installed

The modules of full TensorRT need libraries that are not available here; they can be loaded with stub libraries of the nine
C symbols that they use. pybind11 writes each signature into the docstring, and mypy's stubgen reads it from there.
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
_SKIPPED_LINES = re.compile(
    r"bool: DataType|\s+(def __(eq|ne|hash|index|enter|exit|del|and|or|xor|invert|r\w+)__|__\w+: ClassVar)"
)
_SIGNATURES_IN_CPP = {
    "get_error": ", index: int) -> ParserError",
    "create_runtime_cache": ") -> IRuntimeCache",
    "set_runtime_cache": ", cache: IRuntimeCache) -> bool",
}
_SKIPPED_CLASSES = re.compile(r"I\w+Layer|I?Plugin(?!Registry)\w*|I\w+Plugin\w*")


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
    lines = [line for line in out.read_text().splitlines() if not _SKIPPED_LINES.match(line)]
    # stubgen writes parameters with defaults before those without, which is a syntax error.
    while True:
        try:
            tree = ast.parse("\n".join(lines))
            break
        except SyntaxError as error:
            bad_line = (error.lineno or 1) - 1
            lines[bad_line] = re.sub(
                r"\(self.*", "(self, *args: Any, **kwargs: Any) -> Any: ...", lines[bad_line]
            )
    tree.body = [node for node in tree.body if not _SKIPPED_CLASSES.fullmatch(getattr(node, "name", ""))]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "INetworkDefinition":
            node.body = [member for member in node.body if not getattr(member, "name", "").startswith("add_")]
        # pybind11 does not document the buffer protocol.
        if isinstance(node, ast.ClassDef) and node.name == "IHostMemory":
            node.body += ast.parse("def __buffer__(self, flags: int) -> memoryview: ...").body
    text = f'__version__ = "{module.__version__}"\n{ast.unparse(tree)}\n'
    text = re.sub(r"\n\n+", "\n", text.replace("collections.abc.", "").replace(":\n        ...", ": ..."))
    # stubgen cannot read the C++ names in docstrings.
    for method, signature in _SIGNATURES_IN_CPP.items():
        text = text.replace(f"def {method}(self, *args, **kwargs)", f"def {method}(self{signature}")
    # SupportsInt would forbid callbacks that accept an int.
    text = text.replace("typing.SupportsInt", "int")
    out.write_text(f"# mypy: ignore-errors\nfrom collections.abc import Sequence\n{text}")


def main() -> None:
    name, out, *unpacked = sys.argv[1:]
    sys.path[:0] = unpacked
    with tempfile.TemporaryDirectory() as folder:
        if name == "tensorrt_bindings":
            dist_infos = [path.name for path in Path(unpacked[0]).glob("*.dist-info")] if unpacked else []
            major = dist_infos[0].split("-")[1].split(".")[0] if dist_infos else None
            module = load_beside_stubs(Path(folder), major)
        else:
            from tpx_runtime.engine.tensorrt_flavours import RTX, bindings

            module = bindings(RTX)
        write_stub(module, Path(out))


if __name__ == "__main__":
    main()
