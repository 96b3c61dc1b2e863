"""Triton kernels, which serve GPUs where the CUDA extension is not built; imported only if triton is there.

`cells` has each cell's mathematics, `carry` what a row has before a step, `kernels` the scan around them; `scan` plans
and launches the scan for `rnnkit.gpu`.
"""
