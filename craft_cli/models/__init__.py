"""Base models: finding, reading, loading, streaming and writing checkpoints."""
