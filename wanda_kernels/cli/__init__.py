"""The command line: one module per command, errors in one sentence."""
