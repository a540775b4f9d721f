"""Quantisation: the layers, the grids, the calibration, and the comparison with fp32 (docs/quantisation.md).

    transformer ─layers─▶ names ─calibration over sampling trajectories─▶ histograms of |x| ─activation_grid─▶ step sizes
                │                                                      └▶ X^T X ─weight_grid, gptq─▶ int8 and int4 weights
                └────────────────────────linear: each layer replaced by its quantised form───▶ export of the graphs
    quantised and fp32 bundle ─measure, speed, score─▶ report ─verdict─▶ kept, or refused and deleted

"int8" quantises activations and weights of the blocks' linear layers, "int8-weights" and "int4-weights" only weights.
"""
