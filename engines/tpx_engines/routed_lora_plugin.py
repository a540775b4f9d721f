"""`tpx::RoutedLora` as a TensorRT plugin whose PTX is stored in the engine: only building needs this file.

    register(89)                                            # once, before the parser sees the graph
    trtp.op.tpx.RoutedLora(x, expert, a, b, aot=True)       # or a node with plugin_namespace = "tpx" and aot = 1

For TensorRT 10.16 and 11.4. The plugin has no attributes (sizes come from the tensors' shapes). TensorRT needs annotations
that are types, not strings, so this file must never import `annotations` from `__future__`.
"""

from tpx_engines.routed_lora_kernel import Sizes
from tpx_engines.routed_lora_ptx import TARGETS, compile_ptx
from tpx_runtime.errors import BadInput, EngineUnavailable

PLUGIN = "tpx::RoutedLora"
SPLITS = (1, 2, 3, 6)  # the tactics: TensorRT times each and selects the fastest


def register(capability: int) -> None:
    """Register the plugin for engines of this compute capability (times ten), once per process.

    Raises EngineUnavailable without TensorRT's Python package, BadInput for a capability that the kernel does not support,
    and TensorRT's own ValueError if the plugin is already registered.
    """
    if capability not in TARGETS:
        raise BadInput(f"expected a compute capability of {', '.join(map(str, TARGETS))}, found {capability}")
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as missing:
        raise EngineUnavailable(
            f"expected TensorRT with its module tensorrt.plugin (10.14 or later), found none ({missing}); install tensorrt"
        ) from None

    @trtp.register(PLUGIN)
    def describe(
        x: trtp.TensorDesc, expert: trtp.TensorDesc, a: trtp.TensorDesc, b: trtp.TensorDesc
    ) -> trtp.TensorDesc:
        """x [B, N, D], expert int64 [B, N], a [M, D, r], b [M, r, O] -> [B, N, O] of x's type."""
        return trtp.from_shape_expr((x.shape_expr[0], x.shape_expr[1], b.shape_expr[2]), x.dtype)

    @trtp.autotune(PLUGIN)
    def offer(
        x: trtp.TensorDesc,
        expert: trtp.TensorDesc,
        a: trtp.TensorDesc,
        b: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        """The supported types: one floating type for all but the int64 ids, in linear layout."""
        value = "FP32|FP16"
        return [trtp.AutoTuneCombination(f"{value}, INT64, {value}, {value}, {value}", "LINEAR", SPLITS)]

    @trtp.aot_impl(PLUGIN)
    def implement(
        x: trtp.TensorDesc,
        expert: trtp.TensorDesc,
        a: trtp.TensorDesc,
        b: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        """The kernel for the shapes of a and b, which must be static; B and N may be dynamic. `tactic` is `splits`."""
        experts, width, rank = a.shape
        out = b.shape[2]
        if min(experts, width, rank, out) < 1:
            raise BadInput(
                f"expected weights of static shape, found a {tuple(a.shape)} and b {tuple(b.shape)}; "
                "export them as constants of the graph"
            )
        dtypes = {trt.DataType.HALF: "fp16", trt.DataType.FLOAT: "fp32"}
        sizes = Sizes(experts, width, rank, out, dtypes.get(x.dtype, str(x.dtype)))
        compiled = compile_ptx(sizes, capability)
        tokens = expert.shape_expr.numel()
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(tokens, compiled.rows) + (experts - 1)
        launch.grid_y = tactic
        launch.block_x = compiled.threads
        launch.shared_mem = compiled.shared
        scalars = trtp.SymIntExprs(1)
        scalars[0] = trtp.SymInt32(tokens)
        return compiled.name, compiled.ptx, launch, scalars
