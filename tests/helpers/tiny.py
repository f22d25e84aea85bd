"""Small random models of every family and a small tokenizer, and folders of them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from eigenzoo.zoo.inference.checkpoint import native_config
from eigenzoo.zoo.inference.weights import build
from eigenzoo.zoo.models.model import Model

WORDS = "the cat sat on a mat and saw 12 birds fly over hills, rivers and towns. " * 4
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
ROTARY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SIZES = {
    "llama": ROTARY,
    "opt": {
        "vocab_size": 320,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "max_position_embeddings": 256,
    },
    "qwen2": ROTARY,
    "qwen3": ROTARY | {"head_dim": 8},
    "qwen3_moe": ROTARY
    | {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mistral": ROTARY,
    "mixtral": ROTARY,
    "gemma3_text": ROTARY
    | {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 7}
    | {"sliding_window_pattern": 3, "tie_word_embeddings": True},
    "mpt": {"vocab_size": 320, "d_model": 64, "n_heads": 8, "n_layers": 3, "max_seq_len": 256},
}
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that expose mistakes: biases are not zero, norms are not one."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
        elif "norm" in name or "_ln" in name:
            p.data.uniform_(0.5, 1.5)
        else:
            p.data.normal_(std=0.06)  # with a smaller one, attention would be nearly uniform
    return model.eval().requires_grad_(False)


def hf(family: str = "llama", seed: int = 0, **changes):
    """A random model of transformers' class."""
    config = CONFIG_MAPPING[family](**SIZES[family] | ENDS | changes)
    return stir(AutoModelForCausalLM.from_config(config), seed)


def tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE. begin: add the begin token before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    bpe.train_from_iterator([WORDS], trainer)
    if begin:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save(folder: Path, family: str = "llama", chat: bool = False, **changes):
    """Write a random model and its tokenizer to `folder`; return transformers' model."""
    model, words = hf(family, **changes), tokenizer()
    words.chat_template = CHAT if chat else None
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return model


def native(family: str = "llama", seed: int = 0, **changes) -> Model:
    """A random native model."""
    theirs = hf(family, seed, **changes)
    return build(native_config(theirs.config.to_dict()), theirs.state_dict().items())


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids (rows, length)."""
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


class FoundryMPT:
    """MPT as llm-foundry defines it: transformers' MPT with the config fields that it ignores.

    attn, other: fields of `attn_config` and of the config. Weights have llm-foundry's names.
    """

    def __init__(self, attn: dict | None = None, **other):
        self.attn = {"alibi": True, "attn_type": "multihead_attention"} | (attn or {})
        kv = {"multiquery_attention": 1}.get(self.attn["attn_type"], 8)
        self.kv = self.attn.get("kv_n_heads", kv)
        self.config = SIZES["mpt"] | {"no_bias": True, "tie_word_embeddings": True} | other
        known = {k: self.attn.get(k) for k in ("clip_qkv", "softmax_scale")}
        norm = self.attn.get("qk_ln")  # then `FusedQKV` clips, before its norms
        attn_config = known | {"clip_qkv": None if norm else known["clip_qkv"]}
        self.model = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING["mpt"](**SIZES["mpt"], attn_config=attn_config)
        )
        bias, rms = not self.config["no_bias"], "rmsnorm" in other.get("norm_type", "")
        hidden = int(64 * self.config.get("expansion_ratio", 4))
        for block in self.model.transformer.blocks:
            block.attn.Wqkv = FusedQKV(self.kv, bias, self.attn)
            block.attn.out_proj = nn.Linear(64, 64, bias=bias)
            block.ffn.up_proj = nn.Linear(64, hidden, bias=bias)
            block.ffn.down_proj = nn.Linear(hidden, 64, bias=bias)
            block.norm_1, block.norm_2 = (self.norm(rms, bias) for _ in range(2))
        self.model.transformer.norm_f = self.norm(rms, bias)
        if not self.attn["alibi"]:
            self.model.transformer.wpe = nn.Embedding(256, 64)
        bias_max = self.attn.get("alibi_bias_max", 8)
        slope = 1 if self.attn["alibi"] else 0
        self.model.transformer.build_mpt_alibi_tensor = lambda heads, length, device: (
            slope * build_mpt_alibi_tensor(heads, length, bias_max)
        )
        stir(self.model)

    @staticmethod
    def norm(rms: bool, bias: bool) -> nn.Module:
        return nn.RMSNorm(64, 1e-5) if rms else nn.LayerNorm(64, bias=bias)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights by llm-foundry's names."""
        names = {"Wqkv.linear": "Wqkv", "Wqkv.q_ln": "q_ln", "Wqkv.k_ln": "k_ln"}
        weights = {}
        for key, x in self.model.state_dict().items():
            for theirs, foundry in names.items():
                key = key.replace(theirs, foundry)
            weights[key] = x.clone()
        del weights["lm_head.weight"]  # tied
        return weights

    def raw(self) -> dict:
        """The content of config.json."""
        return {"model_type": "mpt", "attn_config": self.attn} | self.config | ENDS

    def save(self, folder: Path) -> None:
        """Write a checkpoint as llm-foundry does, and a tokenizer."""
        save_file(self.weights(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.raw()))
        tokenizer().save_pretrained(folder)

    def native(self) -> Model:
        """The native model with the same weights."""
        return build(native_config(self.raw()), self.weights().items())

    def __call__(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None):
        t = self.model.transformer
        vectors = t.wte(x)
        if not self.attn["alibi"]:
            mask = torch.ones_like(x) if attention_mask is None else attention_mask
            vectors = vectors + t.wpe((mask.cumsum(1) - 1).clamp(min=0))
        out = self.model(inputs_embeds=vectors, attention_mask=attention_mask)
        scale = self.config.get("logit_scale")
        out.logits *= {None: 1.0, "inv_sqrt_d_model": 1 / 8}.get(scale, scale)
        return out


class FusedQKV(nn.Module):
    """llm-foundry's Wqkv with its clip and norms; kv heads are repeated for transformers."""

    def __init__(self, kv: int, bias: bool, attn: dict):
        super().__init__()
        self.kv, self.clip = kv, attn.get("clip_qkv")
        self.linear = nn.Linear(64, 64 + 2 * kv * 8, bias=bias)
        if attn.get("qk_ln"):
            self.q_ln = nn.LayerNorm(64, bias=bias)
            self.k_ln = nn.LayerNorm(8 * kv, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.clip:
            x = x.clamp(-self.clip, self.clip)
        q, k, v = x.split([64, 8 * self.kv, 8 * self.kv], dim=-1)
        if hasattr(self, "q_ln"):
            q, k = self.q_ln(q), self.k_ln(k)
        k, v = (
            z.unflatten(-1, (self.kv, 8)).repeat_interleave(8 // self.kv, dim=-2).flatten(-2)
            for z in (k, v)
        )
        return torch.cat((q, k, v), dim=-1)
