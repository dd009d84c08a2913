"""Packed batches and their types, microbatches, and prompts, pairs and responses from files."""
