"""The command line: flags, one-line errors, and what is printed."""
