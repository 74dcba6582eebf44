"""Kinds of work: what a row means, its loss, its metrics, its answers."""
