"""Ask a server that `eigenzoo serve OUT` started. Needs only Python: the API is like OpenAI's.

python examples/client.py "Why is the sky blue?" [--url http://127.0.0.1:8000]
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen


def asked(url: str, body: dict[str, Any]) -> Any:
    """The open answer to a request: body as JSON."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urlopen(request)


def streamed(url: str, prompt: str, tokens: int) -> Iterator[str]:
    """The parts of the answer as they are generated."""
    with urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    with asked(f"{url}/v1/chat/completions", body) as lines:
        for line in lines:
            _, found, event = line.decode().partition("data: ")
            if found and event.strip() != "[DONE]":
                yield json.loads(event)["choices"][0]["delta"].get("content") or ""


def main() -> None:
    """Print an answer as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    for part in streamed(args.url, args.prompt, args.max_tokens):
        print(part, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
