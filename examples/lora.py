"""Recover quality with LoRA, as in the Eigen Attention paper (arXiv 2408.05646, rank 64).

    pip install peft
    python examples/lora.py OUT text.txt NEW

OUT is a folder written by `eigenzoo compress`. NEW is the same checkpoint with the adapters merged;
it loads wherever OUT does. Needs transformers and peft, not eigenzoo.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]  # they hold the folded bases


def main() -> None:
    """Load, adapt, train, merge, save."""
    args = arguments()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.source, trust_remote_code=True)
    nonlinear = {"clip_qkv", "qk_ln"} & {name for name, x in model.config.to_dict().items() if x}
    if nonlinear:  # adapters would be added after it, but merged before it
        raise SystemExit(
            f"error: this model has {', '.join(nonlinear)}, after which adapters cannot be merged: "
            "expected a model without"
        )
    rows = windows(tokenizer(args.text.read_text())["input_ids"], args.length)

    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    losses = train(adapted, rows, args.steps, args.batch, args.lr)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    merged = adapted.merge_and_unload()
    # the evaluation of the model before LoRA is no longer valid
    changes = {"evaluation": None, "lora": {"rank": args.rank, "steps": args.steps, "lr": args.lr}}
    merged.config.compression = merged.config.compression | changes
    merged.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}")


def windows(ids: list[int], length: int) -> Tensor:
    """Token ids as rows (N, length)."""
    rows = len(ids) // length
    if rows == 0:
        raise SystemExit(f"error: the text has {len(ids)} tokens: expected {length} or more")
    return torch.tensor(ids[: rows * length]).view(rows, length)


def train(model: torch.nn.Module, rows: Tensor, steps: int, batch: int, lr: float) -> list[float]:
    """Train on random batches; returns the mean next-token loss of each tenth of the steps."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    model.train()
    for _ in tqdm(range(steps), desc="training", disable=None, leave=False):
        x = rows[torch.randint(len(rows), (batch,))].to(model.device)
        loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    tenth = max(1, steps // 10)
    return [sum(x) / len(x) for x in (losses[i : i + tenth] for i in range(0, steps, tenth))]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="OUT", help="a compressed checkpoint")
    parser.add_argument("text", metavar="TEXT", type=Path, help="a text file to train on")
    parser.add_argument("out", metavar="NEW", help="folder for the merged checkpoint")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
