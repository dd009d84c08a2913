"""Actor, critic, reference and reward model: attention, adapters, frozen prefix, weights to sample from."""
