"""The processes of a run: ranks, DeepSpeed's engines, what is on the GPU in which phase, and signals."""
