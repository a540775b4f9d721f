"""Measures the speed of a bundle and its alternatives on this machine: the command `tpx-bench`.

    cli  ▶  request, configurations  ▶  measure  ──JSON lines──▶  worker ▶ runner (a Generator)    one process each
                                          │                                engines of the runtime
                                          ▼                                baselines: PyTorch, naive export
                                       record (JSON)  ▶  report, plot

Only `baselines`, `compiled` and `naive` need torch; only `flops` and `naive` need onnx; only `plot` needs matplotlib.
"""

PROMPT = "a red cube on a blue sphere"  # default of --prompt
