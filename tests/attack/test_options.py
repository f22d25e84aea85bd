"""Bad values of every option, made from the options themselves."""

import shlex
from typing import get_args

import attack
import typer
from attack import COMMANDS, Row, nothing

from eigenzoo.zoo import cli

NUMBERS = {int: ("x", "0.5", "-1", "0", "1e3", "1" + 30 * "0"), float: ("x", "nan", "inf", "-1")}
PATHS = {  # options that name what is read
    "--text": ("none.txt", "dense", "/dev/null", "a.txt/a.txt", "x" * 5000),
    "--include-path": ("none", "a.txt"),
    "--calibration": (
        *("none.txt", "dense", "hub:", "hub:org/none", "a.txt/a.txt", "x" * 5000),
        *("", "a.txt,", "mixd", "a.txt:0", "self:-1", "hub:org/set:nan", "a.txt,a.txt:9e999"),
    ),
    "--original": ("none", "a.txt", "org/none", "low", "x" * 5000),
}
TEXTS = {
    "--device": ("frob", "meta", "cuda:-1", "cuda:99", "", "cpu:x", "xla", "mps:7"),
    "--memory": ("", "x", "0", "-1", "-5GB", "nanGB", "5XB"),
    "--shard-size": ("", "x", "0", "-1", "-5GB", "nanGB", "0GB", "5XB"),
    "--heads-per-latent": ("", "x", "0", "-1", "3", "1,2,4", "1,", "²", "9" * 30),
    "--kv-bits": ("", "x", "5", "16,5", "16,,8", "²", "-8", "9" * 30),
    "--shape": ("frob", "", "opt-125m/x"),
    "--tasks": ("", ",", "a,,b"),
}
# values that mean something
GOOD = {
    "--seed": ("-1", "0"),
    "--windows": ("0",),
    "sweep --anchor-block": ("-1", "0"),  # its row says what does not fit
    "sweep --heads-per-latent": ("3", "9" * 30),
    "sweep --calibration": ("hub:org/none",),  # after the row of the dense model
    "--top-k": ("0",),
    "--sliding-window": ("0",),
    "--sinks": ("0",),
    "--patience": ("0",),
}


def values_of(option) -> tuple[str, ...]:
    """Bad values of an option, by its name or else by its type."""
    flag, described = option.opts[0], option.type_descriptor
    kind = next(iter(get_args(described.annotation)), described.annotation)
    if described.parameter_info.parser:
        return ("no-such-name", "")
    return PATHS.get(flag) or TEXTS.get(flag) or NUMBERS.get(kind, ())


def rows():
    for command, parsed in typer.main.get_command(cli.app).commands.items():
        for option in parsed.params:
            flag = option.opts[0]
            if not flag.startswith("--") or flag == "--out":
                continue
            for value in values_of(option):
                if value not in GOOD.get(flag, ()) + GOOD.get(f"{command} {flag}", ()):
                    words = f"{COMMANDS[command]} {flag} {shlex.quote(value)}"
                    name = f"{command} {flag} {value[:40]!r}"
                    yield Row(name, nothing, words)


@attack.table(rows())
def test_a_bad_value_of_an_option_is_refused_in_one_line(row, place, capsys):
    attack.assert_refused(row, place, capsys)
