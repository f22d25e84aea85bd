"""Small random models and a small tokenizer, saved as a Hugging Face checkpoint would be."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eigenzoo.zoo.checkpoint import build, native_config
from eigenzoo.zoo.model import Model

WORDS = "the cat sat on a mat and saw 12 birds fly over hills, rivers and towns. " * 4
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama; its biases are not zero, its norms not one."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_()
        elif "norm" in name:
            p.uniform_(0.5, 1.5)
        else:
            p.mul_(3)  # else attention is nearly uniform, and hides mistakes
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save(folder: Path, chat: bool = False, **changes) -> LlamaForCausalLM:
    """Write a random Llama and its tokenizer to `folder`; return the model."""
    model, words = llama(**changes), tokenizer()
    words.chat_template = CHAT if chat else None
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model


def native(seed: int = 0, **changes) -> Model:
    """A random Llama as a native model."""
    hf = llama(seed, **changes)
    return build(native_config(hf.config.to_dict()), iter(hf.state_dict().items()))


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))
