"""Generate with a compressed checkpoint in transformers, without eigenzoo.

    python examples/transformers_generate.py OUT "Once upon a time"

With a static cache, transformers compiles decoding: by default on a GPU only, here also on a CPU.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, TextStreamer


def main() -> None:
    """Load with the checkpoint's own code, compile, stream."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.source, trust_remote_code=True)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = not args.no_compile
    model.generate(
        **inputs,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        cache_implementation="static",
        compile_config=config,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


if __name__ == "__main__":
    main()
