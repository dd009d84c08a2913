"""Fused layers: modules of a loaded model that compute what an op of `fastppo.ops` computes call that op.

What a module computes is found by running its own forward pass on random numbers, with stand-ins for its children.
"""
