from eigenzoo.zoo.utils.escape import code_block, code_span, markdown, printable, prose

HOSTILE = "a\x1b[31m\n\r\x9b\u202e\u200b\ud800[b](http://c)<i>|`*"


def test_what_a_terminal_obeys_is_written_as_python_writes_it():
    assert printable(HOSTILE) == r"a\x1b[31m\n\r\x9b\u202e\u200b\ud800[b](http://c)<i>|`*"
    assert printable("naïve 猫 5 % (ok)") == "naïve 猫 5 % (ok)"
    assert printable(3) == "3"


def test_prose_keeps_lines_and_the_marks_of_scripts():
    assert prose("a\tb\n\x1b]0;title\x07\r") == "a\tb\n\\x1b]0;title\\x07\\r"
    family = "\N{MAN}\N{ZERO WIDTH JOINER}\N{GIRL}\N{RIGHT-TO-LEFT MARK}"
    assert prose(family) == family


def test_markdown_gets_no_links_html_cells_or_lines():
    shown = markdown("[b](http://c)\n<i>|*")
    assert shown == r"\[b\](http://c)\\n\<i>\|\*"
    assert code_span("a`b\n") == r"`a'b\n`"
    assert code_block(["a", "```", "b\nc"]) == "````bash\na\n```\nb\\nc\n````"
