"""Measurements of one process that shares a model with others; as a script, one such process."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, StaticCache

from eigenzoo.hub_export import register
from eigenzoo.kernels.install import install
from eigenzoo.zoo.inference.generate import Generator, answer

assert register  # the classes here, without remote code
IDS = torch.arange(2, 42).view(2, 20)
MASK = (torch.arange(20) >= torch.tensor([[0], [7]])).long()
PROMPTS = [IDS[0].tolist(), IDS[1, 7:].tolist()]


def generated(model, cache: str | None = None) -> list[list[int]]:
    """Greedy continuations of a padded batch."""
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    return model.generate(IDS, attention_mask=MASK, cache_implementation=cache, **greedy).tolist()


def measured(model) -> dict:
    """Logits, tokens and gradients, and the bytes of cache and weights in this process."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        logits = model(IDS, attention_mask=MASK, past_key_values=cache).logits
    model(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters()}
    return {
        "logits": logits.tolist(),
        "grads": {name: [g.norm().item(), *g.flatten()[-3:].tolist()] for name, g in grads.items()},
        "growing": generated(model),
        "static": generated(model, "static"),
        "cache": sum(x.nbytes for part in cache.layers for x in (part.keys, part.values)),
        "weights": {name: local(p).nbytes for name, p in model.named_parameters()},
    }


def whole(x):
    """The whole of a tensor that may be distributed."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local(x):
    """This process's part of a tensor that may be distributed."""
    return x.to_local() if hasattr(x, "to_local") else x


if __name__ == "__main__":
    from transformers.distributed import DistributedConfig

    auto = DistributedConfig(tp_plan="auto")
    for folder in map(Path, sys.argv[1:]):
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=auto)
        except ValueError as error:
            result = {"error": str(error)}
        else:
            result = measured(model)
            model.save_pretrained(folder / "again")
            install(model.model)
            result["fused"] = generated(model, "static")
            generator = Generator(model.model, batch=2, slots=40, compile=False)
            result["native"] = answer(generator, PROMPTS, max_new_tokens=8).tokens
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
