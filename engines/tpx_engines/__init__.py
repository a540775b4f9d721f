"""From a bundle to an engine for one machine. `tensorrt_rtx` builds without a GPU; running it needs one."""
