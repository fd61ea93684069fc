"""The command line: from a table to a folder with a model, and from it to predictions."""
