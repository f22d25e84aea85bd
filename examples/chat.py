"""Chat with a checkpoint. The cache keeps earlier turns, so each turn processes only new tokens.

python examples/chat.py OUT
"""

import argparse

import torch
from transformers import TextStreamer

from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.checkpoint import load, stop_tokens
from eigenzoo.zoo.inference.generate import Generator, fastest_dtype


def main() -> None:
    """Read lines and answer them, until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder, GGUF file or Hub id, with a chat template")
    parser.add_argument("--slots", type=int, default=2048, help="tokens of the whole chat")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()

    checkpoint = load(args.source, fastest_dtype(torch.device("cpu")))
    tokenizer, stop = checkpoint.tokenizer, stop_tokens(checkpoint)
    install(checkpoint.model)
    generator = Generator(
        checkpoint.model, 1, args.slots, not args.no_compile, compile_prefill=False
    )
    chat: list[dict[str, str]] = []
    cached: list[int] = []  # the tokens in the cache
    while line := read():
        chat.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # waits for whole characters
        answer = []
        for token in reply(generator, cached, ids, stop):
            answer.append(token)
            streamer.put(torch.tensor([token]))
        streamer.end()
        chat.append({"role": "assistant", "content": tokenizer.decode(answer)})


def read() -> str:
    """The next line of input; empty at its end."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def reply(generator: Generator, cached: list[int], ids: list[int], stop: list[int]):
    """Yield the tokens that follow ids, up to a stop token or the end of the cache."""
    same = 0  # the template may change earlier turns: process again from the first difference
    while same < min(len(cached), len(ids) - 1) and cached[same] == ids[same]:
        same += 1
    try:
        generator.cache.check_start(same, generator.filled)
    except ValueError:  # layers with windows do not hold what came before: process all again
        same = 0
    del cached[same:]
    new = ids[same:]
    while len(cached) + len(new) <= generator.slots:
        logits = generator.advance(torch.tensor([new]), len(cached))
        cached += new
        token = int(logits.argmax(-1))
        if token in stop:
            return
        yield token
        new = [token]
    print("[the cache is full]")


if __name__ == "__main__":
    main()
