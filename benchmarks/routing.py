"""Times implementations of tpx::RoutedLora in ONNX, in ONNX Runtime and OpenVINO.

    python -m benchmarks.routing [--rounds 9]

For each size, the models of all variants are interleaved (A B C A B C ...); the table gives median times relative to
`masked`, and the milliseconds of `masked`. Every variant is first checked against the PyTorch operator. Needs OpenVINO
2026.4.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import onnx
import onnx.inliner
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.interleave import interleaved, warm_seconds
from tpx_export.fusion.attention import DOMAIN as MICROSOFT
from tpx_export.model.routed_lora import routed_lora
from tpx_export.operator import DOMAIN, NAME, OPSET, register_schema
from tpx_export.routing import masked, permuted
from tpx_runtime.command import TpxCommand

Call = Callable[[dict[str, np.ndarray]], np.ndarray]

# batch x tokens, D, r, M, share of tokens on the first expert (the rest evenly)
SIZES = (
    ((2, 64), 256, 32, 4, 0.25),
    ((8, 64), 256, 32, 4, 0.25),
    ((8, 64), 256, 32, 4, 0.85),
    ((2, 256), 384, 32, 4, 0.25),
    ((2, 4096), 384, 32, 4, 0.25),
    ((2, 4096), 384, 32, 4, 0.85),
    ((2, 4096), 1536, 128, 5, 0.20),
)


def routed_lora_function(body: str, more_imports: str = "") -> onnx.FunctionProto:
    """tpx::RoutedLora as an ONNX function with the given body."""
    head = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}{more_imports}]> {NAME} (x, expert, a, b) => (out)'
    )
    return onnx.parser.parse_function(f"{head} {{\n{body}\n}}")


def scattered(experts: int) -> onnx.FunctionProto:
    """Scatter the rows of one expert after the other into the output (ScatterND), a common form of gather/scatter."""
    body = [
        "zero = Constant <value_ints = [0]> ()",
        "minus = Constant <value_ints = [-1]> ()",
        "d = Shape <start = 1, end = 2> (a)",
        "o = Shape <start = 2, end = 3> (b)",
        "flat = Concat <axis = 0> (minus, d)",
        "tokens = Reshape (x, flat)",
        "chosen = Reshape (expert, minus)",
        "many = Shape (chosen)",
        "blank = Concat <axis = 0> (many, o)",
        "nothing = ConstantOfShape <value = float[1] {0.0}> (blank)",
        "to0 = CastLike (nothing, x)",
    ]
    for m in range(experts):
        body += [
            f"m{m} = Constant <value_int = {m}> ()",
            f"hit{m} = Equal (chosen, m{m})",
            f"at{m} = NonZero (hit{m})",
            f"rows{m} = Transpose <perm = [1, 0]> (at{m})",
            f"x{m} = GatherND (tokens, rows{m})",
            f"a{m} = Gather <axis = 0> (a, m{m})",
            f"b{m} = Gather <axis = 0> (b, m{m})",
            f"low{m} = MatMul (x{m}, a{m})",
            f"out{m} = MatMul (low{m}, b{m})",
            f"to{m + 1} = ScatterND (to{m}, rows{m}, out{m})",
        ]
    body += [
        "lead = Shape <start = 0, end = 2> (x)",
        "shape = Concat <axis = 0> (lead, o)",
        f"out = Reshape (to{experts}, shape)",
    ]
    return routed_lora_function("\n".join(body))


def batched(experts: int) -> onnx.FunctionProto:
    """Gather A and B for each token and multiply a batch of vectors: no redundant products, but much copying."""
    return routed_lora_function("""
        two = Constant <value_ints = [2]> ()
        row = Unsqueeze (x, two)
        a_own = Gather <axis = 0> (a, expert)
        b_own = Gather <axis = 0> (b, expert)
        low = MatMul (row, a_own)
        high = MatMul (low, b_own)
        out = Squeeze (high, two)
    """)


def mixture(experts: int) -> onnx.FunctionProto:
    """ONNX Runtime's MoE operator, three times, because its outputs have the width of its inputs."""
    body = """
        minus = Constant <value_ints = [-1]> ()
        d = Shape <start = 1, end = 2> (a)
        flat = Concat <axis = 0> (minus, d)
        tokens = Reshape (x, flat)
        chosen = Reshape (expert, minus)
        many = Constant <value_int = EXPERTS> ()
        sure = Constant <value = float[2] {0.0, 1000.0}> ()
        router = OneHot (chosen, many, sure)
        first = Transpose <perm = [0, 2, 1]> (a)
        b0, b1, b2 = Split <axis = 2, num_outputs = 3> (b)
        second0 = Transpose <perm = [0, 2, 1]> (b0)
        second1 = Transpose <perm = [0, 2, 1]> (b1)
        second2 = Transpose <perm = [0, 2, 1]> (b2)
        out0 = com.microsoft.MoE <k = 1, activation_type = "identity"> (tokens, router, first, "", second0)
        out1 = com.microsoft.MoE <k = 1, activation_type = "identity"> (tokens, router, first, "", second1)
        out2 = com.microsoft.MoE <k = 1, activation_type = "identity"> (tokens, router, first, "", second2)
        joined = Concat <axis = 1> (out0, out1, out2)
        lead = Shape <start = 0, end = 2> (x)
        o = Shape <start = 2, end = 3> (b)
        shape = Concat <axis = 0> (lead, o)
        out = Reshape (joined, shape)
    """
    return routed_lora_function(body.replace("EXPERTS", str(experts)), f', "{MICROSOFT}" : 1')


def grouped(lead: tuple[int, int], a: np.ndarray, b: np.ndarray) -> Any:
    """OpenVINO's GroupedMatMul (opset 17, from 2026.4 on), on tokens sorted by expert."""
    from openvino import Model
    from openvino import opset16 as op
    from openvino.opset17 import grouped_matmul

    many, experts = lead[0] * lead[1], len(a)
    x, expert = op.parameter([*lead, a.shape[1]], np.float32), op.parameter(lead, np.int64)
    tokens = op.reshape(x, [many, a.shape[1]], False)
    hit = op.convert(op.equal(op.reshape(expert, [1, many], False), np.arange(experts)[:, None]), np.int32)
    ends = op.cum_sum(op.reduce_sum(hit, [1], False), 0)
    before = op.cum_sum(op.reduce_sum(hit, [1], True), 0, exclusive=True)  # tokens of lower experts
    own = op.add(before, op.cum_sum(hit, 1, exclusive=True))
    place = op.reduce_sum(op.multiply(hit, own), [0], False)
    order = op.scatter_elements_update(np.zeros(many, np.int32), place, np.arange(many, dtype=np.int32), 0)
    low = grouped_matmul(op.gather(tokens, order, 0), np.ascontiguousarray(a.transpose(0, 2, 1)), ends)
    high = grouped_matmul(low, np.ascontiguousarray(b.transpose(0, 2, 1)), ends)
    out = op.reshape(op.gather(high, place, 0), [*lead, b.shape[2]], False)
    x.output(0).tensor.names, expert.output(0).tensor.names = {"x"}, {"expert"}
    return Model([op.result(out)], [x, expert])


VARIANTS: dict[str, Callable[[int], onnx.FunctionProto]] = {
    "masked": lambda experts: masked(),
    "permuted": permuted,
    "scattered": scattered,
    "batched": batched,
}
MAX_BATCHED_ELEMENTS = 2**30  # of A and B, copied by `batched`


def model(body: onnx.FunctionProto, lead: tuple[int, int], a: np.ndarray, b: np.ndarray) -> onnx.ModelProto:
    """A model of one RoutedLora node with its function inlined."""
    graph = helper.make_graph(
        [helper.make_node(NAME, ["x", "expert", "a", "b"], ["out"], domain=DOMAIN)],
        "routing",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [*lead, a.shape[1]]),
            helper.make_tensor_value_info("expert", TensorProto.INT64, list(lead)),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [*lead, b.shape[2]])],
        [numpy_helper.from_array(a, "a"), numpy_helper.from_array(b, "b")],
    )
    imports = [
        helper.make_opsetid(domain, version) for domain, version in (("", OPSET), (DOMAIN, 1), (MICROSOFT, 1))
    ]
    model_proto = helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10)
    return onnx.inliner.inline_local_functions(model_proto)


def onnxruntime_call(path: Path) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def openvino_call(model: Any) -> Call:
    """`model` is a path or an openvino.Model."""
    import openvino

    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", config)
    return lambda inputs: compiled(inputs)[0]


NATIVE_VARIANTS = {"ONNX Runtime": "mixture", "OpenVINO": "grouped"}  # the engine's own operator
COLUMNS = [*list(VARIANTS)[1:], *NATIVE_VARIANTS.values()]
ENGINES = {"ONNX Runtime": onnxruntime_call, "OpenVINO": openvino_call}


def calls_of(
    engine: str, lead: tuple[int, int], a: np.ndarray, b: np.ndarray, folder: Path
) -> dict[str, Call]:
    """The compiled variants of an engine, without `batched` if it would copy more than MAX_BATCHED_ELEMENTS."""
    experts = len(a)
    bodies = {name: body(experts) for name, body in VARIANTS.items()}
    if prod(lead) * (a[0].size + b[0].size) > MAX_BATCHED_ELEMENTS:
        del bodies["batched"]
    if engine == "ONNX Runtime":
        bodies["mixture"] = mixture(experts)
    calls = {}
    for name, body in bodies.items():
        path = folder / f"{name}.onnx"
        onnx.save(model(body, lead, a, b), path)
        calls[name] = ENGINES[engine](path)
    if engine == "OpenVINO":
        calls["grouped"] = openvino_call(grouped(lead, a, b))
    return calls


def medians(calls: dict[str, Call], inputs: dict[str, np.ndarray], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, each time after one warm-up call."""
    times = interleaved(calls, lambda name: warm_seconds(lambda: calls[name](inputs)), rounds)
    return {name: 1e3 * median(found) for name, found in times.items()}


@click.command(cls=TpxCommand)
@click.option("--rounds", default=9, show_default=True, help="Timed runs of each variant.")
def main(rounds: int) -> None:
    """Print the table of docs/routing.md."""
    register_schema()
    rng = np.random.default_rng(0)
    print(f"| engine | tokens | D | r | M | on one expert | masked, ms | {' | '.join(COLUMNS)} |")
    print("|---|---|---|---|---|---|---|" + "---|" * len(COLUMNS))
    for engine in ENGINES:
        for lead, width, rank, experts, share in SIZES:
            out = 3 * width
            x = rng.standard_normal((*lead, width), np.float32)
            chances = [share] + [(1 - share) / (experts - 1)] * (experts - 1)
            expert = rng.choice(experts, lead, p=chances)
            a = rng.standard_normal((experts, width, rank), np.float32) * width**-0.5
            b = rng.standard_normal((experts, rank, out), np.float32) * rank**-0.5
            expected = routed_lora(*map(torch.from_numpy, (x, expert, a, b))).numpy()
            with TemporaryDirectory() as folder:
                calls = calls_of(engine, lead, a, b, Path(folder))
                inputs: dict[str, np.ndarray] = {"x": x, "expert": expert}
                for name, call in calls.items():
                    error = np.abs(call(inputs) - expected).max() / np.abs(expected).max()
                    assert error < 1e-4, (engine, name, error)
                ms = medians(calls, inputs, rounds)
            ratios = [f"{ms[name] / ms['masked']:.2f}" if name in ms else "-" for name in COLUMNS]
            print(
                f"| {engine} | {lead[0]} x {lead[1]} | {width} | {rank} | {experts} | {share:.0%} "
                f"| {ms['masked']:.2f} | {' | '.join(ratios)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
