"""From a bundle to engines for one kind of GPU: the command `tpx-build` and what it stands on."""
