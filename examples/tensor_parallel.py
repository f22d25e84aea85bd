"""Generate in several processes, each of which holds its share of weights and cache.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py OUT "Once upon a time"

One process a GPU, or several on a CPU. Needs transformers 5.23, and no eigenzoo.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.distributed import DistributedConfig


def main() -> None:
    """Load a share, generate together, let the first process print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.source, distributed_config=DistributedConfig(tp_plan="auto"), trust_remote_code=True
    )
    first = torch.distributed.get_rank() == 0
    model.generate(
        **tokenizer(args.prompt, return_tensors="pt").to(model.device),
        max_new_tokens=args.max_new_tokens,
        do_sample=False,  # every process must choose the same token: else give all the same seed
        cache_implementation="static",
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if first else None,
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
