"""Loading a trained role from the checkpoint of another number of ranks, ZeRO stage or offload."""
