"""Rows: from files and data sets to token ids and batches."""
