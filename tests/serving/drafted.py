"""Serve a tiny model with drafts from the prompt: drafted.py KIND FOLDER. Fails if answers differ.

`test_features.py` runs this in a process of its own.
"""

import sys
from pathlib import Path

from exported import of_kind
from served import native, prompts, served, serving, write

DRAFT = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}

if __name__ == "__main__":
    exported = of_kind(sys.argv[1])
    texts = [text * 3 for text in prompts([5, 20, 33])]
    options = {"speculative_config": DRAFT, "disable_log_stats": False}
    with serving(write(exported, Path(sys.argv[2])), **options) as llm:
        got, want = served(llm, texts, 40), native(exported.model, texts, 40)
        metrics = {x.name: x.value for x in llm.get_metrics() if hasattr(x, "value")}
    assert got == want, (got, want)
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0, metrics
