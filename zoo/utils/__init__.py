"""What no room owns: rows of results, state of long work, provenance, memory, Ctrl-C."""
