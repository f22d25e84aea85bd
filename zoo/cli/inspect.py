"""eigenzoo inspect."""

import json

from .options import AsJson, Revision, Source


def inspect(source: Source, as_json: AsJson = False, revision: Revision = None) -> None:
    """What is in a checkpoint: ranks of every layer, bytes, where it comes from, whose code."""
    from ..inference.checkpoint import inspect as look
    from ..inference.checkpoint import locate
    from ..measure import tables as report

    found = look(source, revision)
    if found["format_version"] is not None:
        from ...hub_export.code import verdict

        folder = locate(source, revision, ["config.json", "*.py"])
        found["code"] = verdict(folder, found["code"])
    print(json.dumps(found)) if as_json else report.checkpoint(found)
