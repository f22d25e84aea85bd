"""GGUF files of every layout give the model they were made from, or an error that says why not."""

import shutil
import struct
import tracemalloc
from functools import cache

import ggufs
import numpy as np
import pytest
import tiny
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize, quantize
from ropes import rope_parameters

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import inspect, load
from eigenzoo.zoo.inference.gguf_file import PIECE, Stored, open_gguf

TEXT = tiny.tokens(1, 300)
GEMMA_1B = {"query_pre_attn_scalar": 16, "sliding_window_pattern": 2}
GEMMA_4B = {
    **{"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "num_hidden_layers": 7},
    **{"rope": "linear", "final_logit_softcapping": 3.0},
}
GEMMA_27B = {"query_pre_attn_scalar": 8, "sliding_window_pattern": 6, "num_hidden_layers": 62}


@cache
def model(family="llama", rope="default", **changes):
    """Transformers' model with heads of 16 numbers, and its logits of 300 tokens."""
    width = {"head_dim": 16} if family == "llama" else {}
    rotation = rope_parameters(rope)
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": 10_000.0 if rope == "linear" else 100.0}
        rotation = {"full_attention": rotation, "sliding_attention": local}
    parameters = {"rope_parameters": rotation, "max_position_embeddings": 512}
    theirs = tiny.hf(family, **parameters, **width, **changes)
    return theirs, theirs(TEXT).logits


@pytest.fixture
def path(tmp_path):
    """A GGUF file of a Llama with default rotation."""
    return ggufs.write(tmp_path / "tiny.gguf", model()[0])


def check(path, logits):
    torch.testing.assert_close(load(str(path)).model(TEXT), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn", "longrope-scaled"])
def test_rotation_is_read_as_it_was_written(tmp_path, rope):
    theirs, logits = model(rope=rope)
    check(ggufs.write(tmp_path / "tiny.gguf", theirs), logits)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"num_key_value_heads": 8}),
        ("qwen2", {}),
        ("qwen2", {"rope": "yarn"}),
        ("qwen3", {}),
        ("qwen3", {"attention_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("mixtral", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("gemma3_text", GEMMA_1B),
        ("gemma3_text", GEMMA_4B),
        ("gemma3_text", GEMMA_27B),
    ],
)
def test_variants_give_the_logits_of_transformers(tmp_path, family, changes):
    theirs, logits = model(family, **changes)
    check(ggufs.write(tmp_path / "tiny.gguf", theirs), logits)


@pytest.mark.parametrize(
    ("attn", "other"),
    [
        ({}, {}),
        ({"kv_n_heads": 2, "alibi_bias_max": 4}, {"no_bias": False}),
        ({"clip_qkv": 0.5}, {}),
        ({"qk_ln": True}, {"no_bias": False}),
        ({"alibi": False}, {}),
    ],
)
def test_variants_of_mpt_give_the_logits_of_llm_foundry(tmp_path, attn, other):
    theirs = tiny.FoundryMPT(attn, **other)
    checkpoint = load(str(ggufs.write_mpt(tmp_path / "tiny.gguf", theirs)))
    x = TEXT[:, :200]
    torch.testing.assert_close(checkpoint.model(x), theirs(x).logits, atol=1e-4, rtol=0)
    words = tiny.tokenizer()
    assert checkpoint.tokenizer(tiny.WORDS)["input_ids"] == words(tiny.WORDS)["input_ids"]
    assert checkpoint.tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"attention__key_length": 8}, "mpt.attention.key_length = 8, which is not supported"),
        ({"rope__freq_base": 1e4}, "mpt.rope.freq_base = 10000"),
        ({"attention__layer_norm_epsilon": None}, "lacks mpt.attention.layer_norm_epsilon"),
    ],
)
def test_what_an_mpt_asks_for_in_vain_is_named(tmp_path, extra, named):
    path = ggufs.write_mpt(tmp_path / "tiny.gguf", tiny.FoundryMPT(), **extra)
    with pytest.raises(ValueError, match=named):
        load(str(path))


def test_every_number_of_experts_is_asked_for(tmp_path):
    theirs = tiny.hf("qwen3_moe")
    path = ggufs.write(tmp_path / "tiny.gguf", theirs, expert_used_count=None)
    with pytest.raises(ValueError, match=r"lacks qwen3moe.expert_used_count"):
        load(str(path))


@pytest.mark.parametrize("low_freq_factor", [1.0, 0.7])  # the second fits no published llama3
def test_factors_of_a_rotation_are_kept_whatever_they_are(tmp_path, low_freq_factor):
    theirs, _ = model()
    rope = rope_parameters("llama3") | {"low_freq_factor": low_freq_factor}
    found = load(str(ggufs.write(tmp_path / "tiny.gguf", theirs, rope))).model
    plain = rope["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
    want = plain / ggufs.llama3_factors(rope, theirs.config)
    torch.testing.assert_close(found.inv_freq[0], want, atol=0, rtol=1e-5)
    kind = "llama3" if low_freq_factor == 1.0 else "longrope"
    assert found.config.rope_parameters["rope_type"] == kind


def test_a_compressed_gguf_keeps_its_rotation(tmp_path):
    checkpoint = load(str(ggufs.write(tmp_path / "tiny.gguf", model(rope="llama3")[0])))
    compress_checkpoint(
        checkpoint, tmp_path / "out", Settings(keep=0.5, kv_bits=(16,)), samples=4, seq_len=32
    )
    out = load(str(tmp_path / "out")).model
    assert out.config.rope_parameters["rope_type"] == "llama3"
    assert torch.equal(out.inv_freq, checkpoint.model.inv_freq)


def test_inspect_reads_a_gguf(path):
    info = inspect(str(path))
    assert (info["family"], info["head_dim"], info["dtype"]) == ("llama", 16, "float32")


@pytest.mark.parametrize(
    "given", ["folder", "tiny-00001-of-00003.gguf", "tiny-00002-of-00003.gguf"]
)
def test_a_split_gguf_is_read_whole_from_any_part(tmp_path, given):
    theirs, logits = model()
    ggufs.write(tmp_path / "tiny.gguf", theirs, parts=3)
    source = tmp_path if given == "folder" else tmp_path / given
    check(source, logits)
    assert load(str(source)).name == "tiny"


def read_blocks(path, blocks, kind, **dtype):
    """What is read of a file whose only tensor is these blocks."""
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("x", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_gguf(path).tensors["x"].read(**dtype)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("shape", [(64,), (1030, 64), (2, 3, 64)])  # 1030: more than one piece
def test_quantized_numbers_are_read_in_their_places(tmp_path, kind, shape):
    x, kind = torch.randn(shape), GGMLQuantizationType[kind]
    read = read_blocks(tmp_path / "x.gguf", quantize(x.numpy(), kind), kind)
    step = {"F": 0.001, "B": 0.004}.get(kind.name[0]) or 2.0 ** (2 - int(kind.name[1]))
    torch.testing.assert_close(read, x, atol=step, rtol=step / 2)


HALF, QUARTER = (np.float16(x).tobytes() for x in (0.5, 0.25))
SIXES = bytes([3] * 4 + [2] * 4 + [0x23] * 4)  # eight scales of 3 and eight minima of 2
K_BLOCKS = {  # scales 0.5 * 3, minima 0.25 * 2, equal codes but the first; and what they mean
    "Q2_K": (b"\x23" * 16 + b"\xa9" + b"\xaa" * 63 + HALF + QUARTER, 1.0, 2.5),
    "Q3_K": (b"\xfe" + b"\xff" * 31 + b"\xaa" * 64 + b"\x33" * 8 + b"\xaa" * 4 + HALF, -3.0, 3.0),
    "Q4_K": (HALF + QUARTER + SIXES + b"\x71" + b"\x77" * 127, 1.0, 10.0),
    "Q5_K": (HALF + QUARTER + SIXES + b"\xfe" + b"\xff" * 31 + b"\x77" * 128, 10.0, 34.0),
    "Q6_K": (b"\x71" + b"\x77" * 127 + b"\xaa" * 64 + b"\x03" * 16 + HALF, 1.5, 10.5),
}


@pytest.mark.parametrize("kind", K_BLOCKS)
def test_k_quants_mean_what_ggml_says(tmp_path, kind):
    block, first, others = K_BLOCKS[kind]
    blocks = np.frombuffer(block * 6, np.uint8).reshape(3, -1)  # two blocks in a row
    want = torch.full((3, 512), others)
    want[:, ::256] = first
    assert torch.equal(read_blocks(tmp_path / "x.gguf", blocks, GGMLQuantizationType[kind]), want)


def test_reading_takes_a_fraction_of_a_tensor_beside_it(tmp_path):
    kind = GGMLQuantizationType.Q8_0
    blocks = np.zeros((16 * PIECE, 256 // 32 * 34), np.uint8)
    tracemalloc.start()  # of numpy, not of torch
    x = read_blocks(tmp_path / "x.gguf", blocks, kind, dtype=torch.bfloat16)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    open_gguf(tmp_path / "x.gguf").tensors["x"].read(torch.bfloat16)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < x.nbytes / 2


KINDS = ["TQ1_0", "TQ2_0", "MXFP4", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"]


@pytest.mark.parametrize("kind", [*K_BLOCKS, *KINDS, "IQ3_S", "IQ4_NL", "IQ4_XS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_type_that_gguf_knows_is_read_and_cast(tmp_path, kind, dtype):
    kind = GGMLQuantizationType[kind]
    bytes_of_rows = (1030, 2 * GGML_QUANT_SIZES[kind][1])  # two pieces
    # bytes of which no two are NaN or infinity in fp16
    blocks = np.random.default_rng(0).integers(0, 0x70, bytes_of_rows, np.uint8)
    read = read_blocks(tmp_path / "x.gguf", blocks, kind, dtype=dtype)
    assert torch.equal(read, torch.from_numpy(dequantize(blocks, kind)).to(dtype))


def test_files_beside_a_gguf_belong_to_other_models(path):
    alone = load(str(path)).tokenizer
    other = tiny.tokenizer(begin=True)
    other.add_tokens(["cat sat"])
    other.add_special_tokens({"eos_token": "on"})
    other.save_pretrained(path.parent)
    tiny.hf("opt", eos_token_id=7).save_pretrained(path.parent)
    checkpoint = load(str(path))
    generation, words = checkpoint.generation, checkpoint.tokenizer
    assert words("the cat sat on")["input_ids"] == alone("the cat sat on")["input_ids"]
    assert words.eos_token == alone.eos_token == "</s>"
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)


def test_missing_parts_are_named(tmp_path):
    first = ggufs.write(tmp_path / "tiny.gguf", model()[0], parts=3)
    (tmp_path / "tiny-00002-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match=r"1 are missing, first tiny-00002-of-00003.gguf"):
        load(str(first))
    first.rename(tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match=r"alone.gguf says that it is part 0 of 3"):
        load(str(tmp_path / "alone.gguf"))


def test_parts_of_another_split_are_refused(tmp_path):
    first = ggufs.write(tmp_path / "tiny.gguf", model()[0], parts=3)
    shutil.copy(tmp_path / "tiny-00003-of-00003.gguf", tmp_path / "tiny-00002-of-00003.gguf")
    with pytest.raises(ValueError, match=r"tiny-00002-of-00003.gguf says that it is part 2 of 3"):
        load(str(first))


def test_several_models_in_a_folder_are_named(tmp_path):
    for name in ("a", "b"):
        ggufs.write(tmp_path / f"{name}.gguf", model()[0])
    with pytest.raises(ValueError, match=r"holds several models, a.gguf, b.gguf"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"drop": ("blk.1.attn_q.weight", "output_norm.weight")}, "lacks 2 weights"),
        ({"drop": ("token_embd.weight",)}, "lacks 1 weights, first embed"),
        ({"more": {"blk.0.attn_q_norm.weight": torch.ones(16)}}, "self_attn.q_norm.weight"),
        ({"more": {"blk.0.ffn_up.0.weight": torch.ones(96, 64)}}, r"ffn_up.0.weight .*no such"),
        ({"more": {"blk.0.attn_q.bias": torch.ones(128)}}, r"attn_q.bias|q_proj.bias"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre = 'deepseek-llm'"),
        ({"attention__key_length": 16, "rope__dimension_count": 8}, "dimension_count is 8"),
        ({"attention__key_length": 16, "attention__value_length": 8}, "value_length is 8"),
        ({"attention__sliding_window": 100}, "llama.attention.sliding_window = 100"),
        ({"expert_count": 8}, "lacks llama.expert_used_count"),
        ({"expert_gating_func": 2}, "llama.expert_gating_func = 2"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30"),
        ({"logit_scale": 0.5}, "llama.logit_scale = 0.5"),
        ({"attention__scale": 0.3}, "llama.attention.scale"),
        ({"a_new_field": True}, "llama.a_new_field = True"),
        ({"attention__layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms"),
        ({"block_count": None}, "lacks llama.block_count"),
        ({"block_count": 10_000_000}, "block_count|num_hidden_layers"),
        ({"embedding_length": 0}, "llama.embedding_length is 0: expected a positive"),
        ({"vocab_size": 999}, r"shape \(320, 64\).* expects \(999, 64\)"),
        ({"rope__scaling__type": 3}, "rope.scaling.type = 3"),
        ({"rope__scaling__alpha": 2.0}, "llama.rope.scaling.alpha = 2"),
        ({"rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"more": {"rope_factors_long.weight": torch.ones(8)}}, "rope_factors_"),
        ({"more": {"rope_freqs.weight": torch.ones(5)}}, "expected 8 positive numbers"),
        (
            {"more": {"rope_freqs.weight": torch.ones(8)}, "rope__scaling__factor": 2.0},
            "scales its rotation twice",
        ),
    ],
)
def test_what_a_file_lacks_or_asks_for_in_vain_is_named(tmp_path, changes, named):
    path = ggufs.write(tmp_path / "tiny.gguf", model()[0], **changes)
    with pytest.raises(ValueError, match=named):
        load(str(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention__sliding_window": 512},  # of the whole context
        {"expert_count": 0},
        {"attention__causal": True},
        {"attention__scale": 0.25},
        {"rope__scaling__finetuned": True},
        {"rope__scaling__factor": 1.0},
        {"vocab_size": None},
    ],
)
def test_what_changes_nothing_is_accepted(tmp_path, changes):
    theirs, logits = model()
    check(ggufs.write(tmp_path / "tiny.gguf", theirs, **changes), logits)


def test_other_architectures_are_named(tmp_path):
    writer = GGUFWriter(tmp_path / "x.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(
        ValueError,
        match="architecture 'gemma': expected a model of gemma3 or llama or mpt or qwen2 or qwen3",
    ):
        load(str(tmp_path / "x.gguf"))


def cut(data: bytes) -> bytes:
    return data[:-1000]


def cut_header(data: bytes) -> bytes:
    return data[:3000]


def empty(data: bytes) -> bytes:
    return b""


def other(data: bytes) -> bytes:
    return b"PK" + data


def endless(data: bytes) -> bytes:
    """The list of tokens claims to have 2**60 entries."""
    at = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    return data[:at] + struct.pack("<Q", 2**60) + data[at + 8 :]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut, "damaged .*ends before the end of"),
        (cut_header, "damaged"),
        (empty, "is empty"),
        (other, "expected GGUF of version"),
        (endless, "damaged"),
    ],
)
def test_a_damaged_file_is_named(path, damage, named):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"tiny\.gguf.*{named}"):
        load(str(path))


def test_a_tokenizer_that_is_unknown_is_named(path):
    data = path.read_bytes().replace(b"gpt2", b"gpt9")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path} has no tokenizer"):
        load(str(path))


def test_an_unknown_type_of_tensor_is_named(path):
    with pytest.raises(ValueError, match="ggml type 999 is unknown"):
        Stored(path, (1, 32), 999, 0).read()
