"""Kernels of other libraries that compute attention on CUDA, behind one interface, and the choice between them.

They are no kernels of fastppo, so `fastppo.models.attention` calls them through this room and not through `ops`.
"""
