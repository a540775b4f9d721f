"""tpx-eval: pictures laid out for the evaluators of GenEval and DPG-Bench, ShapesEval, and paired comparison.

Each module says which step it is: `benchmarks` reads prompts and names files, `drawing` draws what is missing and counts,
`record` keeps the settings of a run, `statistics` and `compare` turn verdicts into figures, `cli` is the command.
"""
