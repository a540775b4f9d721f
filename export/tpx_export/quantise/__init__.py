"""INT8: which layers, on which grid, from which activations, and whether it was worth it (docs/int8.md).

    transformer ─layers─▶ names ─calibration over real trajectories─▶ |x| of each ─grid─▶ scales
                └────────────────────────linear: each layer replaced by its int8 form────────▶ the graphs' export
    bundle, and the same in fp32 ─measure, speed, score─▶ report ─verdict─▶ kept, or refused and gone

"int8" quantises activations and weights of the blocks' linear layers; "int8-weights" stores weights alone.
"""
