"""Loading of models: their source, the check that fastppo can train them, their weights, their trainable parameters."""
