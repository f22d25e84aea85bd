"""What several rooms use: rows of results, state of long work, provenance, memory, Ctrl-C."""
