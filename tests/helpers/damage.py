"""Changes to a checkpoint folder."""

import json

from safetensors.torch import load_file, save_file


def change_config(folder, **changes):
    """Set fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    """Let `change` edit the weights by name."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
