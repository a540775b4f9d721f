"""From a model in PyTorch to a bundle (docs/bundle.md), and thinking adapters for published models.

    checkpoint, or base/ with adapters  ▶  pipeline: the parts, each loaded when its turn comes
                                              │
                  golden: its PyTorch outputs ┤
                  graphs ▶ routing ▶ weights: ┤ ONNX graphs, quantise/ in int8
                  step, description:          ┤ the loop's graph, the manifest
                                              ▼
                                           exporter ▶ whole_folder: a bundle, verified or not there
    training/ ▶ adapters                   cli: the command tpx-export

`model/` has the networks, `operator` how torch's exporter writes their operations. Importing this package imports nothing.
"""
