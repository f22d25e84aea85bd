"""Load a checkpoint, read text, generate, measure perplexity."""
