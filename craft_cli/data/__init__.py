"""Data: from files and datasets to token ids and batches."""
