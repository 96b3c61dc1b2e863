"""Triton kernels, which serve GPUs where the CUDA extension is not built; imported only if triton is there.

`cells` has each cell's mathematics, `kernels` the scan around it, `scan` cuts and launches it for `rnnkit.gpu`.
"""
