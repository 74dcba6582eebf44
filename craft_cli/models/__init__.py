"""Base models: find, read, load, stream and write checkpoints."""
