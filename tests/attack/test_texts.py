import json
from functools import partial

import attack
from attack import (
    COMMANDS,
    QUICK,
    Row,
    both,
    drop_json,
    fifo,
    folder,
    link,
    nothing,
    remove,
    rows,
    set_json,
    write,
)

template = partial(write, "dense/chat_template.jinja")
tokenizer = partial(write, "dense/tokenizer.json")


def set_vocabulary(**ids: int):
    """Other ids of words."""

    def change(place):
        path = place / "dense" / "tokenizer.json"
        held = json.loads(path.read_text())
        held["model"]["vocab"] |= ids
        held["added_tokens"].append(held["added_tokens"][0] | {"id": 5000, "content": "cat"})
        path.write_text(json.dumps(held))

    return change


BAD = {
    "empty": write("a.txt", ""),
    "blank": write("a.txt", " \n\t\n"),
    "short": write("a.txt", "a cat"),
    "invalid UTF-8": write("a.txt", b"a cat\xff\xfe sat"),
    "UTF-16": write("a.txt", ("a cat sat " * 99).encode("utf-16")),
    "UTF-32": write("a.txt", ("a cat sat " * 99).encode("utf-32")),
    "binary": write("a.txt", bytes(range(256)) * 9),
    "only a BOM": write("a.txt", b"\xef\xbb\xbf"),
    "missing": remove("a.txt"),
    "folder": folder("a.txt"),
    "dangling link": link("a.txt", "nowhere"),
    "loop": link("a.txt", "a.txt"),
}
ROWS_OF_TEXT = {
    "broken row": '{"text": "a cat"}\n{"text": ',
    "no column": '{"words": "a cat"}\n' * 99,
    "number": '{"text": 3}\n' * 99,
    "null": '{"text": null}\n' * 99,
    "mixed": '{"text": "a cat"}\n{"words": "sat"}\n',
    "lists": "[1]\n" * 99,
    "messages text": '{"messages": "a cat"}\n' * 99,
    "messages without role": '{"messages": [{"content": "a cat"}]}\n' * 99,
    "messages of numbers": '{"messages": [1]}\n' * 99,
    "empty": "",
    "blank lines": "\n\n\n",
    "deep": "[" * 100_000,
}
TOKENIZERS = {
    "missing": remove("dense/tokenizer.json", "dense/tokenizer_config.json"),
    "empty": tokenizer(""),
    "no JSON": tokenizer("{"),
    "list": tokenizer("[1]"),
    "null": tokenizer("null"),
    "empty object": tokenizer("{}"),
    "binary": tokenizer(bytes(range(256))),
    "deep": tokenizer("[" * 100_000),
    "no model": drop_json("dense/tokenizer.json", "model"),
    "model list": set_json("dense/tokenizer.json", model=[1]),
    "model unknown": set_json("dense/tokenizer.json", model={"type": "frob"}),
    "vocabulary list": set_json("dense/tokenizer.json", model={"type": "BPE", "vocab": [1]}),
    "added tokens": set_json("dense/tokenizer.json", added_tokens=[1]),
    "folder": folder("dense/tokenizer.json"),
    "loop": link("dense/tokenizer.json", "tokenizer.json"),
    "config empty": write("dense/tokenizer_config.json", ""),
    "config list": write("dense/tokenizer_config.json", "[1]"),
    "config binary": write("dense/tokenizer_config.json", b"\xff\xfe"),
    "class list": set_json("dense/tokenizer_config.json", tokenizer_class=["Frob"]),
    "length list": set_json("dense/tokenizer_config.json", model_max_length=[9]),
    "begin number": set_json("dense/tokenizer_config.json", bos_token=7),
    "sentencepiece": both(
        remove("dense/tokenizer.json"),
        write("dense/tokenizer.model", b"frob"),
        set_json("dense/tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
    ),
    "beyond the embedding": set_vocabulary(cat=5000),
}
TEMPLATES = {
    "broken": template("{% for m in messages %}{{ m['content'] }}"),
    "raises": template("{{ raise_exception('no user may speak') }}"),
    "raises lines": template("{{ raise_exception('one\ntwo\x1b[2J') }}"),
    "undefined": template("{{ frob.frob.frob }}"),
    "unknown filter": template("{{ messages | frob }}"),
    "divides by zero": template("{{ 1 // 0 }}"),
    "adds text and number": template("{{ 'a' + 1 }}"),
    "calls text": template("{{ 'a'() }}"),
    "index": template("{{ messages[7].content.frob }}"),
    "leaves the sandbox": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "endless": template("{% for i in range(10**12) %}x{% endfor %}"),
    "binary": template(b"\xff\xfe\x00"),
    "empty": template("{# nothing #}"),
    "folder": folder("dense/chat_template.jinja"),
    "list": both(
        remove("dense/chat_template.jinja"),
        set_json("dense/tokenizer_config.json", chat_template=[1]),
    ),
    "number": both(
        remove("dense/chat_template.jinja"),
        set_json("dense/tokenizer_config.json", chat_template=7),
    ),
}
GENERATIONS = {
    "empty": write("dense/generation_config.json", ""),
    "list": write("dense/generation_config.json", "[1]"),
    "null": write("dense/generation_config.json", "null"),
    "binary": write("dense/generation_config.json", b"\xff\xfe"),
    "deep": write("dense/generation_config.json", "[" * 100_000),
    "end text": set_json("dense/generation_config.json", eos_token_id="end"),
    "end object": set_json("dense/generation_config.json", eos_token_id={"a": 1}),
    "ends text": set_json("dense/generation_config.json", eos_token_id=["end"]),
    "folder": folder("dense/generation_config.json"),
}
TABLES = {
    "empty": write("rows.jsonl", ""),
    "null": write("rows.jsonl", "null\n"),
    "list": write("rows.jsonl", "[1]\n"),
    "number": write("rows.jsonl", "7\n"),
    "empty object": write("rows.jsonl", "{}\n"),
    "text": write("rows.jsonl", "a cat\n"),
    "binary": write("rows.jsonl", b"\xff\xfe\n"),
    "deep": write("rows.jsonl", "[" * 100_000 + "\n"),
    "missing": remove("rows.jsonl"),
    "folder": folder("rows.jsonl"),
    "loop": link("rows.jsonl", "rows.jsonl"),
}


def change_rows(name: str, **fields):
    """Other fields in every row of a file."""

    def change(place):
        lines = (place / name).read_text().splitlines()
        rows = [json.dumps(json.loads(line) | fields) for line in lines]
        (place / name).write_text("\n".join(rows) + "\n")

    return change


FIELDS = {
    "versions": [1],
    "settings": [1],
    "calibration": "self",
    "perplexity": "good",
    "layers": 3,
    "kv_share": None,
    "seconds": [],
    "evaluation": None,
    "weights": {},
    "k_ranks": 3,
    "curves": [[]],
    "date": 7,
}
SHEETS = {f"{name}": value for name, value in FIELDS.items() if name in ("versions", "perplexity")}
SHEETS |= {"model": [1], "kv_share": "x", "tokens": [1], "text": {}, "processor": 3, "command": []}
SPOILED = {f"field {name}": change_rows("rows.jsonl", **{name: x}) for name, x in FIELDS.items()}
SHEET = {
    **{f"field {name}": change_rows("sheet.json", **{name: x}) for name, x in SHEETS.items()},
    "null": write("sheet.json", "null\n"),
    "text": write("sheet.json", "a cat\n"),
    "binary": write("sheet.json", b"\xff\xfe\n"),
    "missing": remove("sheet.json"),
    "folder": folder("sheet.json"),
}
NEW = ("missing", "empty")  # then a sweep begins
READERS = {
    "evaluate --text": "evaluate dense --text a.txt",
    "compress --calibration": f"compress dense out {QUICK}".replace("--text b.txt", ""),
    "compress --text": "compress dense out --samples 4 --seq-len 16 --text a.txt",
    "refine --text": "refine low out --original dense --text a.txt",
    "sweep --text": COMMANDS["sweep"].replace(
        "--calibration a.txt --text b.txt", "--calibration b.txt --text a.txt"
    ),
    "sweep --calibration": COMMANDS["sweep"],
}
ENOUGH = [  # two tokens to measure on; a sweep measures the dense model before it calibrates
    ("short", reader) for reader in ("compress --text", "refine --text", "sweep --calibration")
]
ROWS = [
    *(
        Row(f"{reader}: {name}", change, words)
        for reader, words in READERS.items()
        for name, change in BAD.items()
        if (name, reader) not in ENOUGH
    ),
    *(
        Row(f"jsonl: {name}", write("a.jsonl", text), "evaluate dense --windows 1 --text a.jsonl")
        for name, text in ROWS_OF_TEXT.items()
    ),
    *rows({f"tokenizer {k}": x for k, x in TOKENIZERS.items()}, ("generate", "stream")),
    *rows({f"template {k}": x for k, x in TEMPLATES.items()}, ("generate",)),
    *rows({f"generation {k}": x for k, x in GENERATIONS.items()}, ("generate", "compress")),
    *rows(TABLES | SPOILED, ("report",)),
    *(Row(f"sweep: {k}", x, "sweep dense rows.jsonl") for k, x in TABLES.items() if k not in NEW),
    *rows(SHEET, ("card",)),
    Row("no prompt", nothing, "generate dense -p '' --no-chat --no-compile"),
    Row("a pipe as text", fifo("a.txt"), "inspect a.txt"),
]


@attack.table(ROWS)
def test_bad_texts_and_rows_are_refused_in_one_line(row, place, capsys):
    attack.assert_refused(row, place, capsys)
