"""eigenzoo inspect."""

import json

from .options import AsJson, Revision, Source


def inspect(source: Source, as_json: AsJson = False, revision: Revision = None) -> None:
    """What is in a checkpoint: ranks of every layer, bytes, and where it comes from."""
    from .. import report
    from ..checkpoint import inspect as look

    found = look(source, revision)
    print(json.dumps(found)) if as_json else report.checkpoint(found)
