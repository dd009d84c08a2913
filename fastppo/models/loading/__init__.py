"""Loading: where a model comes from, whether it can be trained here, its weights, and what of it trains."""
