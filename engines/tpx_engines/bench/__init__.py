"""How fast a bundle is on this machine, and what else its user could run: the command `tpx-bench`.

    cli  ▶  request, configurations  ▶  measure  ──JSON lines──▶  worker ▶ subject (a Generator)    a process for each
                                          │                                engines: the runtime's own
                                          ▼                                baselines: PyTorch, the naive export
                                       record (JSON)  ▶  report, plot

Only `baselines`, `compiled` and `naive` need torch, only `flops` and `naive` onnx, only `plot` matplotlib.
"""

PROMPT = "a red cube on a blue sphere"  # unless --prompt says another
