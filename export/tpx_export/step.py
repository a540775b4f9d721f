"""The sampler step between two calls of the transformer as an ONNX graph, so that latents stay on the device.

The latents of every deterministic sampler are a weighted sum of the initial latents and all predictions so far
(tpx_runtime/sampling/recurrence.py), and guidance (arXiv:2207.12598) is a weighted sum of the rows of both branches. So one
graph works for all samplers: it stores the last prediction in `slot` of the history, computes the sums, and selects the
conditions of the next call.

    history [slots, rows, C, H, W]     the initial latents, then every prediction; `new_history` may share its memory
    prediction [rows, C, H, W]         is written to `slot` and all later slots, so that no older values remain there
    weights [slots, slots]             row i has the weights of the sum after call i
    mix [rows, rows]                   row i has the weights of all rows in the guided row i
    table [slots, distinct, K]         conditions by slot
    condition_index [rows]             the index of each row's conditions in `table`
"""

import onnx
from onnx.parser import parse_model

from tpx_export.operator import OPSET
from tpx_runtime.manifest import ModelSpec


def step_graph(model: ModelSpec) -> onnx.ModelProto | None:
    """The step graph of docs/bundle.md; None if the guided or predicted channels differ from those of the latents."""
    channels, (height, width) = model.latent_channels, model.latent_size
    if not channels == model.out_channels == model.guided_channels:
        return None
    rows, conditions = f"float[rows, {channels}, {height}, {width}]", f"float[rows, {model.conditions_width}]"
    history = f"float[slots, rows, {channels}, {height}, {width}]"
    graph = parse_model(
        f"""<ir_version: 8, opset_import: ["": {OPSET}], producer_name: "tpx">
        step ({history} history, {rows} prediction, int64 slot, int64[slots, 1, 1, 1, 1] slot_indices,
              float[slots, slots] weights, float[rows, rows] mix,
              float[slots, distinct, {model.conditions_width}] table, int64[rows] condition_index)
          => ({history} new_history, {rows} latents, {conditions} conditions)
          <int64[2] by_slot = {{0, -1}}, int64[2] by_row = {{-1, {channels * height * width}}},
           int64[4] as_latents = {{-1, {channels}, {height}, {width}}}>
        {{
          unwritten = GreaterOrEqual (slot_indices, slot)
          new_history = Where (unwritten, prediction, history)
          flat_history = Reshape (new_history, by_slot)
          slot_weights = Gather (weights, slot)
          sum = MatMul (slot_weights, flat_history)
          branches = Reshape (sum, by_row)
          guided = MatMul (mix, branches)
          latents = Reshape (guided, as_latents)
          next_conditions = Gather (table, slot)
          conditions = Gather (next_conditions, condition_index)
        }}"""
    )
    onnx.checker.check_model(graph, full_check=True)
    return graph
