"""Fused kernels for the operations of streamgen, one operation a file.

A file holds the reference in plain torch, the Triton kernel, the wrapper with its checks, and the
registration. Nothing here is needed: `streamgen.ops` has a reference for every operation, and it is
the only file that imports this package.
"""
