"""Checkpoints that resume bit for bit, and the trained model as a Hugging Face directory."""
