"""Builds engines from a bundle for one kind of GPU: the command `tpx-build` and its modules."""
