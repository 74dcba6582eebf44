"""Sweeps: the search space, trials in a shared Optuna storage, the runs of a trial, and the results."""
