"""Load checkpoints, read text, generate, and measure perplexity."""
