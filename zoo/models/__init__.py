"""The models: torch and one another only, for every file here travels with checkpoints."""
