"""Generate in several processes that each hold a part of the weights and of the cache.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py OUT "Once upon a time"

Run one process per GPU, or several on a CPU. Needs transformers 5.23 or newer, not eigenzoo.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.distributed import DistributedConfig


def main() -> None:
    """Load this process's part, generate together, print in the first process."""
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
        do_sample=False,  # all processes must choose the same token: to sample, seed them alike
        cache_implementation="static",
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if first else None,
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
