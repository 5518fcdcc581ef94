"""Passes that keep the store in order. One pattern: a checked config, ``run_once`` in bounded steps that returns counts, a loop that only calls it."""
