"""What a denoising loop does between two calls of the transformer, as a graph, so that latents stay on the device.

Every deterministic sampler is a weighted sum of the first latents and of all predictions since
(tpx_runtime/sampling/recurrence.py), and guidance (arXiv:2207.12598) a weighted sum of the rows of both branches. So one
graph serves them all: it stores the last prediction in `slot` of the history, sums, and picks the conditions of the next
call.

    history [slots, rows, C, H, W]     the first latents, then each call's prediction; the output `kept` may share its memory
    prediction [rows, C, H, W]         goes to `slot` and to all later slots, so that no older values are left there
    weights [slots, slots]             row i has the weights of the sum after call i
    mix [rows, rows]                   row i has the weights of all rows in the guided row i
    table [slots, distinct, K], told [rows]    conditions by slot, and which of them each row has
"""

import onnx
from onnx.parser import parse_model

from tpx_export.operator import OPSET
from tpx_runtime.manifest import ModelSpec


def step(model: ModelSpec) -> onnx.ModelProto | None:
    """The graph of docs/bundle.md; None for a model whose guided or predicted channels are not those of its latents."""
    channels, (height, width) = model.latent_channels, model.latent_size
    if not channels == model.out_channels == model.guided_channels:
        return None
    rows, conditions = f"float[rows, {channels}, {height}, {width}]", f"float[rows, {model.conditions_width}]"
    history = f"float[slots, rows, {channels}, {height}, {width}]"
    made = parse_model(
        f"""<ir_version: 8, opset_import: ["": {OPSET}], producer_name: "tpx">
        step ({history} history, {rows} prediction, int64 slot, int64[slots, 1, 1, 1, 1] places, float[slots, slots] weights,
              float[rows, rows] mix, float[slots, distinct, {model.conditions_width}] table, int64[rows] told)
          => ({history} kept, {rows} latents, {conditions} conditions)
          <int64[2] by_slot = {{0, -1}}, int64[2] by_row = {{-1, {channels * height * width}}},
           int64[4] as_latents = {{-1, {channels}, {height}, {width}}}>
        {{
          open = GreaterOrEqual (places, slot)
          kept = Where (open, prediction, history)
          said = Reshape (kept, by_slot)
          weighed = Gather (weights, slot)
          sum = MatMul (weighed, said)
          branches = Reshape (sum, by_row)
          guided = MatMul (mix, branches)
          latents = Reshape (guided, as_latents)
          ahead = Gather (table, slot)
          conditions = Gather (ahead, told)
        }}"""
    )
    onnx.checker.check_model(made, full_check=True)
    return made
