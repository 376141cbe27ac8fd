"""The distributed evaluation: embedding, sharded search, metrics."""
