import math
import struct

import attack
import torch
from attack import (
    both,
    folder,
    link,
    overwrite,
    pickled,
    remove,
    rows,
    sharded,
    truncate,
    weights,
    write,
)

FILE = "dense/model.safetensors"
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
INDEX = "dense/model.safetensors.index.json"


def cast(dtype: torch.dtype, *names: str):
    """Weights of another dtype: all, or some."""
    return weights(
        lambda x: {k: v.to(dtype) if k in names or not names else v for k, v in x.items()}
    )


def fill(name: str, value: float, folder: str = "dense"):
    """One number of a weight is another."""
    return weights(lambda x: x[name].view(-1)[:1].fill_(value) and None, folder)


def lacking(name: str):
    """Weights without one."""
    return weights(lambda x: {k: v for k, v in x.items() if k != name})


def header(text: str) -> bytes:
    """A safetensors file with this header and no data."""
    return struct.pack("<Q", len(text)) + text.encode()


# what every command that reads weights refuses, layer by layer as well
BROKEN = {
    "empty": write(FILE, b""),
    "seven bytes": truncate(FILE, 7),
    "half": truncate(FILE, 0.5),
    "short by one": truncate(FILE, 0.9999),
    "zeros": write(FILE, bytes(1000)),
    "text": write(FILE, "version https://git-lfs.github.com/spec/v1\n"),
    "huge header": overwrite(FILE, 0, struct.pack("<Q", 2**62)),
    "broken header": overwrite(FILE, 8 / 60_000, b"\xff\xff"),
    "header list": write(FILE, header("[1]")),
    "no tensors": write(FILE, header("{}")),
    "offsets": write(FILE, header('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}')),
    "unknown dtype": write(
        FILE, header('{"a": {"dtype": "F7", "shape": [0], "data_offsets": [0, 0]}}')
    ),
    "missing": remove(FILE),
    "folder": folder(FILE),
    "dangling link": link(FILE, "nowhere"),
    "loop": link(FILE, "model.safetensors"),
    "int8": cast(torch.int8),
    "int8 embedding": cast(torch.int8, EMBED),
    "int8 queries": cast(torch.int8, QUERY),
    "int64": cast(torch.int64),
    "uint8 norm": cast(torch.uint8, NORM),
    "bool": cast(torch.bool),
    "complex": cast(torch.complex64),
    "complex queries": cast(torch.complex64, QUERY),
    "float8": cast(torch.float8_e4m3fn),
    "float8 queries": cast(torch.float8_e5m2, QUERY),
    "lacks embedding": lacking(EMBED),
    "lacks head": lacking("lm_head.weight"),
    "one more": weights(lambda x: x.update(frob=torch.zeros(2))),
    "layer beyond": weights(lambda x: x.update({QUERY.replace("0", "7"): x[QUERY].clone()})),
    "shape": weights(lambda x: x.update({EMBED: torch.zeros(320, 31)})),
    "flat": weights(lambda x: x.update({EMBED: torch.zeros(320 * 32)})),
    "scalar": weights(lambda x: x.update({NORM: torch.zeros(())})),
    "NaN embedding": fill(EMBED, math.nan),
    "infinite norm": fill(NORM, -math.inf),
}
# found where a layer is read
LAYER = {
    "lacks queries": lacking(QUERY),
    "NaN queries": fill(QUERY, math.nan),
    "shape of queries": weights(lambda x: x.update({QUERY: torch.zeros(32, 31)})),
}
INDICES = {
    "list": sharded([1]),
    "null": sharded(None),
    "map list": sharded({"weight_map": ["model.safetensors"]}),
    "map null": sharded({"weight_map": None}),
    "no map": sharded({"metadata": {}}),
    "empty map": sharded({"weight_map": {}}),
    "number": sharded({"weight_map": {EMBED: 3}}),
    "list of names": sharded({"weight_map": {EMBED: ["model.safetensors"]}}),
    "missing shard": sharded({"weight_map": {EMBED: "model-00001-of-00002.safetensors"}}),
    "empty name": sharded({"weight_map": {EMBED: ""}}),
    "folder": sharded({"weight_map": {EMBED: "."}}),
    "above": sharded({"weight_map": {EMBED: "../low/model.safetensors"}}),
    "absolute": sharded({"weight_map": {EMBED: "/etc/passwd"}}),
    "zero byte": sharded({"weight_map": {EMBED: "a\0b"}}),
    "long name": sharded({"weight_map": {EMBED: "x" * 5000}}),
    "no JSON": write(INDEX, "{"),
    "empty": write(INDEX, ""),
    "binary": write(INDEX, b"\xff\xfe\x00"),
    "deep": write(INDEX, "[" * 100_000),
    "a folder itself": folder(INDEX),
}
PICKLED = {
    "list": pickled([torch.zeros(2)]),
    "tensor": pickled(torch.zeros(2)),
    "text": pickled("weights"),
    "numbers": pickled({EMBED: 3}),
    "nested": pickled({"state_dict": {EMBED: torch.zeros(2)}}),
    "named by numbers": pickled({1: torch.zeros(2)}),
    "code": pickled({EMBED: torch.nn.Linear(2, 2)}),
    "nothing": pickled({}),
    "empty file": both(remove(FILE), write("dense/pytorch_model.bin", b"")),
    "no pickle": both(remove(FILE), write("dense/pytorch_model.bin", b"PK\3\4frob")),
    "a pickle that runs": both(
        remove(FILE), write("dense/pytorch_model.bin", b"cos\nsystem\n(S'touch ran'\ntR.")
    ),
}
GGUFS = {
    "empty": write("dense.gguf", b""),
    "no magic": write("dense.gguf", b"frob" * 9),
    "only magic": write("dense.gguf", b"GGUF"),
    "old": write("dense.gguf", b"GGUF" + struct.pack("<IQQ", 1, 0, 0)),
    "counts": write("dense.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)),
    "nothing in it": write("dense.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 0)),
}
ROWS = [
    *rows(BROKEN, ("generate", "stream", "refine")),
    *rows(LAYER, ("evaluate", "compress", "sweep")),
    *rows({f"index, {k}": x for k, x in INDICES.items()}, ("compress", "stream")),
    *rows({f".bin, {k}": x for k, x in PICKLED.items()}, ("evaluate", "stream")),
    *(
        attack.Row(f"gguf: {name}", change, command.replace("dense", "dense.gguf"))
        for name, change in GGUFS.items()
        for command in ("inspect dense", "evaluate dense", attack.COMMANDS["stream"])
    ),
]


@attack.table(ROWS)
def test_bad_weights_are_refused_in_one_line(row, place, capsys):
    attack.assert_refused(row, place, capsys)
    assert not (place / "ran").exists()
