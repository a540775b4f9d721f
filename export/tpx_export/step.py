"""What a denoising loop does between two calls of the transformer, as a graph, for a device that latents do not leave.

Every deterministic sampler is a weighted sum of the first latents and of what the model has said since
(tpx_runtime/recurrence.py), and guidance (arXiv:2207.12598) one of the branches' rows. So one graph serves them all: it puts
what was said last beside the rest, in `slot`, sums, and picks the conditions of the next call.

    history [slots, rows, C, H, W]     the first latents, then what each call said; the outcome `kept` may be the same memory
    prediction [rows, C, H, W]         for `slot`; later ones get it too, so that nothing older is left in them
    weights [slots, slots]             row by row what is summed after each call
    mix [rows, rows]                   what each row takes of each
    table [slots, distinct, K], told [rows]    conditions by slot, and which of them each row has
"""

import onnx
from onnx.parser import parse_model

from tpx_export.operator import OPSET
from tpx_runtime.manifest import ModelSpec


def step(model: ModelSpec) -> onnx.ModelProto | None:
    """The graph of `docs/bundle.md`; None for a model that guides, or says, other channels than those of its latents."""
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
