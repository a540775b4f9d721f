"""Exports a PyTorch model to a bundle (docs/bundle.md), and trains thinking adapters for published models.

    checkpoint, or base/ with adapters  ▶  pipeline: the parts, loaded one at a time
                                              │
                  golden: PyTorch's outputs   ┤
                  graphs ▶ routing ▶ weights: ┤ ONNX graphs, quantise/ in few bits
                  step, description:          ┤ the graph of the sampling loop, the manifest
                                              ▼
                                           exporter ▶ atomic_folder: the bundle, published only after verification
    training/ ▶ adapters                   cli: the command tpx-export

`model/` has the networks, `operator` the translation of their operations to ONNX. Importing this package imports nothing.
"""
