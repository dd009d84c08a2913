"""Sequence parallelism: ranks that compute a packed row together, each its tokens, and in attention its heads."""
