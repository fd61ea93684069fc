"""The command line: train a model on a table, evaluate it, and predict with it."""
