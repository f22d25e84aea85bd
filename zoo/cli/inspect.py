"""eigenzoo inspect."""

import json

from .options import AsJson, Revision, Source


def inspect(source: Source, as_json: AsJson = False, revision: Revision = None) -> None:
    """Show ranks, bytes and provenance.

    A compressed checkpoint contains Python files; inspect says whether they
    are those of a release.
    """
    from ..inference.checkpoint import inspect as look
    from ..inference.checkpoint import locate
    from ..measure import tables as report

    facts = look(source, revision)
    if facts["format_version"] is not None:
        from ...hub_export.code import verdict

        folder = locate(source, revision, ["config.json", "*.py"])
        facts["code"] = verdict(folder, facts["code"])
    print(json.dumps(facts)) if as_json else report.checkpoint(facts)
