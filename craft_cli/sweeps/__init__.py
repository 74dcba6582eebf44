"""Sweeps: which settings are tried, their trials in one shared study, a trial at work, and what came of them."""
