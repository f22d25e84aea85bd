"""eigenzoo's public API. A name is imported when it is first used, so importing this is cheap."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compression.compress import Compressed as Compressed
    from .compression.compress import compress as compress
    from .compression.settings import Settings as Settings
    from .inference.checkpoint import Checkpoint as Checkpoint
    from .inference.checkpoint import load as load
    from .inference.data import calibration_tokens as calibration_tokens
    from .inference.evict import EvictingGenerator as EvictingGenerator
    from .inference.generate import Generator as Generator
    from .inference.perplexity import perplexity as perplexity
    from .inference.sampling import Sampling as Sampling
    from .inference.speculative import DraftModel as DraftModel
    from .inference.speculative import Lookup as Lookup

PUBLIC = {
    "load": ".inference.checkpoint",
    "Checkpoint": ".inference.checkpoint",
    "compress": ".compression.compress",
    "Compressed": ".compression.compress",
    "Settings": ".compression.settings",
    "calibration_tokens": ".inference.data",
    "Generator": ".inference.generate",
    "EvictingGenerator": ".inference.evict",
    "Sampling": ".inference.sampling",
    "Lookup": ".inference.speculative",
    "DraftModel": ".inference.speculative",
    "perplexity": ".inference.perplexity",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name], __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
