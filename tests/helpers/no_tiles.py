"""A plugin of pytest: the processor has no products of tiles (AMX)."""

import torch

torch.cpu._is_amx_tile_supported = lambda: False
