"""How fast a bundle is on this machine, and what else its user could run: the command `tpx-bench`.

    cli  ▶  configurations  ▶  measure  ──JSON lines──▶  worker ▶ subject (a Generator)      one process a configuration
                                  │                               engines: the runtime's own
                                  ▼                               baselines: PyTorch, and the naive export in an engine
                               record (JSON)  ▶  report, plot

Only `baselines`, `compiled` and `naive` need torch, only `flops` and `naive` onnx, only `plot` matplotlib.
"""
