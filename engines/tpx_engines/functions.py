"""A graph without the function of `tpx::RoutedLora`: what parsers before TensorRT 10.15 need to take the plugin instead."""

from pathlib import Path

from tpx_runtime.errors import EngineUnavailable

DOMAIN, NAME = "tpx", "RoutedLora"


def without_function(path: Path) -> bytes:
    """The graph at `path`, its weights still beside it, without that function; its nodes stay. Needs the package onnx."""
    try:
        import onnx
    except ImportError:
        raise EngineUnavailable(
            "expected the package onnx, found none, which TensorRT before 10.15 needs for the plugin; "
            "install TensorRT 10.15 or later, or `pip install 'tpx[export]'`"
        ) from None
    model = onnx.load(str(path), load_external_data=False)
    kept = [f for f in model.functions if (f.domain, f.name) != (DOMAIN, NAME)]
    del model.functions[:]
    model.functions.extend(kept)
    return bytes(model.SerializeToString())
