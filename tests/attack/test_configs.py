from functools import partial

import attack
from attack import both, drop_json, folder, link, remove, rows, set_json, write

config = partial(set_json, "dense/config.json")
JSON = "dense/config.json"

# what no command reads as a config
BROKEN = {
    "empty": write(JSON, ""),
    "no JSON": write(JSON, "{not json"),
    "list": write(JSON, "[1]"),
    "list of pairs": write(JSON, '[["model_type", "llama"]]'),
    "null": write(JSON, "null"),
    "number": write(JSON, "7"),
    "text": write(JSON, '"llama"'),
    "empty object": write(JSON, "{}"),
    "binary": write(JSON, bytes(range(256))),
    "invalid UTF-8": write(JSON, b'{"model_type": "\xff\xfe"}'),
    "UTF-16": write(JSON, '{"model_type": "llama"}'.encode("utf-16")),
    "deep": write(JSON, '{"model_type": ' + "[" * 100_000),
    "NaN": write(JSON, '{"model_type": NaN}'),
    "missing": remove(JSON),
    "folder": folder(JSON),
    "dangling link": link(JSON, "nowhere"),
    "loop": link(JSON, "config.json"),
    "type list": config(model_type=["llama"]),
    "type object": config(model_type={"llama": 1}),
    "type null": config(model_type=None),
    "type number": config(model_type=3),
    "type unknown": config(model_type="gpt7"),
    "type escapes": config(model_type="\x1b[2J\x07\u202egpt7"),
    "type lines": config(model_type="two\nlines"),
    "type long": config(model_type="x" * 100_000),
    "negative layers": config(num_hidden_layers=-2),
    "no layers": config(num_hidden_layers=0),
    "text layers": config(num_hidden_layers="two"),
    "list layers": config(num_hidden_layers=[2]),
    "fraction layers": config(num_hidden_layers=2.5),
    "null layers": config(num_hidden_layers=None),
    "negative vocabulary": config(vocab_size=-320),
    "negative width": config(hidden_size=-32),
    "no width": config(hidden_size=0),
    "huge width": config(hidden_size=10**30),
    "negative heads": config(num_attention_heads=-4),
    "no heads": config(num_attention_heads=0),
    "negative kv heads": config(num_key_value_heads=-2),
    "no kv heads": config(num_key_value_heads=0),
    "three kv heads": config(num_key_value_heads=3),
    "negative head size": config(head_dim=-8),
    "no head size": config(head_dim=0),
    "odd head size": config(head_dim=7),
    "negative MLP": config(intermediate_size=-32),
    "negative length": config(max_position_embeddings=-128),
    "no length": config(max_position_embeddings=0),
    "text length": config(max_position_embeddings="long"),
    "text norm": config(rms_norm_eps="small"),
    "list norm": config(rms_norm_eps=[1e-5]),
    "unknown activation": config(hidden_act="frob"),
    "list activation": config(hidden_act=["silu"]),
    "rope list": config(rope_parameters=[1]),
    "rope unknown": config(rope_parameters={"rope_type": "frob", "rope_theta": 1e4}),
    "rope text": config(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
    "rope negative": config(rope_parameters={"rope_type": "default", "rope_theta": -1}),
    "rope lacking": config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    "dtype unknown": config(dtype="float7"),
    "dtype function": config(dtype="sum"),
    "dtype list": config(dtype=["float32"]),
    "tie text": config(tie_word_embeddings="perhaps"),
    "bias text": config(attention_bias="perhaps"),
    "quantized": config(quantization_config={"quant_method": "frob"}),
    "quantized list": config(quantization_config=[1]),
}
# what only those notice that build the model
UNFIT = {
    "million layers": config(num_hidden_layers=10_000_000),
    "more layers": config(num_hidden_layers=3),
    "fewer layers": config(num_hidden_layers=1),
    "larger vocabulary": config(vocab_size=400),
    "smaller vocabulary": config(vocab_size=10),
    "wider": config(hidden_size=64),
    "wider MLP": config(intermediate_size=64),
    "more kv heads": config(num_key_value_heads=4),
    "biases": config(attention_bias=True),
    "tied": both(config(tie_word_embeddings=True), remove("dense/model.safetensors")),
    "huge vocabulary": config(vocab_size=10**15),
}
LOW = {
    "no family": drop_json("low/config.json", "family"),
    "family list": set_json("low/config.json", family=["llama"]),
    "no ranks": drop_json("low/config.json", "k_ranks"),
    "short ranks": set_json("low/config.json", k_ranks=[8]),
    "text ranks": set_json("low/config.json", k_ranks="ab"),
    "list of text ranks": set_json("low/config.json", k_ranks=["8", "8"]),
    "negative ranks": set_json("low/config.json", v_ranks=[-8, -8]),
    "fraction ranks": set_json("low/config.json", v_ranks=[7.5, 7.5]),
    "number ranks": set_json("low/config.json", v_ranks=8),
    "null ranks": set_json("low/config.json", v_ranks=None),
    "unknown bits": set_json("low/config.json", k_bits=[3, 3]),
    "text bits": set_json("low/config.json", k_bits=["16", "16"]),
    "no heads a latent": set_json("low/config.json", k_heads_per_latent=0),
    "text heads a latent": set_json("low/config.json", k_heads_per_latent="all"),
    "newer format": set_json("low/config.json", format_version=99),
    "text format": set_json("low/config.json", format_version="new"),
    "list format": set_json("low/config.json", format_version=[1]),
    "negative block": set_json("low/config.json", anchor=-16),
    "text block": set_json("low/config.json", anchor="x"),
}
WAITS: dict[str, str] = {}
ROWS = [
    *rows(BROKEN, ("generate", "compress", "refine"), WAITS),
    *rows(UNFIT, ("generate", "stream", "sweep"), WAITS),
    *rows(LOW, ("inspect low", "generate low", "push"), WAITS),
    *rows({"null": BROKEN["null"], "deep": BROKEN["deep"]}, ("evaluate", "bench", "force"), WAITS),
]


@attack.table(ROWS)
def test_a_bad_config_is_refused_in_one_line(row, place, capsys):
    attack.assert_refused(row, place, capsys)
