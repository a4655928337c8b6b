"""Batches, loss, trainer and memory plan."""
