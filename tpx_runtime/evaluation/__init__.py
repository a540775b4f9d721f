"""tpx-eval: images in the layouts of GenEval and DPG-Bench, ShapesEval, and paired comparison of runs.

`benchmarks` reads prompts and names files, `generation` generates the missing images, `record` checks the settings of a
run, `statistics` and `compare` compute scores and intervals, `cli` is the command.
"""
