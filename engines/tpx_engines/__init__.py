"""Engines of a bundle: `tpx-build` makes them, `tpx-bench` measures them, and the routed-LoRA kernel runs in them."""
