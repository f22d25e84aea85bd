"""The native model in lm-evaluation-harness has the scores and texts of the harness's HFLM."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import evaluate as hub_metrics
import pytest
import tiny
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eigenzoo.hub_export.compress import compress_checkpoint
from eigenzoo.zoo.cli import app
from eigenzoo.zoo.compression.settings import Settings
from eigenzoo.zoo.inference.checkpoint import load
from eigenzoo.zoo.inference.perplexity import token_losses
from eigenzoo.zoo.measure import lm_eval_tasks as tasks
from eigenzoo.zoo.measure.lm_eval_model import NativeLM

PAIRS = [
    ("the cat", " sat on a mat"),
    ("birds fly over hills,", " rivers"),
    ("birds fly over hills,", " towns and a cat"),
    ("", "the birds"),
    ("<s>the cat ", "saw"),
    ("12 birds and " * 60, "a cat"),  # longer than the model can read
]
CONTEXTS = ["the cat sat", "on a mat and saw 12 birds", "birds", tiny.WORDS * 3]
ROWS = [
    {"q": "the cat sat on", "choices": ["a mat", "birds fly", "12"], "gold": 0},
    {"q": "birds fly over", "choices": ["hills", "12", "towns and rivers"], "gold": 2},
    {"q": "rivers and", "choices": ["towns", "a cat", "birds"], "gold": 1},
    {"q": "a mat", "choices": ["sat", "saw", "fly"], "gold": 1},
]
TASKS = {
    "pick": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "say": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
        "num_fewshot": 1,
        "fewshot_split": "test",
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "foreign": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "metric_list": [{"metric": "made_up", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module", params=["dense", "compressed"])
def folder(request, dense_folder, tmp_path_factory):
    """A checkpoint folder that lm-eval reads as well."""
    if request.param == "dense":
        return dense_folder
    out = tmp_path_factory.mktemp("tasks") / "low"
    settings = Settings(keep=0.5, heads_per_latent=(4, 2), kv_bits=(16,))
    compress_checkpoint(load(str(dense_folder)), out, settings, samples=8, seq_len=64)
    return out


@pytest.fixture(scope="module")
def ours(folder):
    model, tokenizer, *_ = load(str(folder))
    return NativeLM(model, tokenizer, batch_size=2)


@pytest.fixture(scope="module")
def theirs(folder):
    return HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with `TASKS` only: listing lm-eval's own tasks takes seconds."""
    monkeypatch.setattr(tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    common = {
        "doc_to_text": "{{q}}",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "data.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "test_split": "test",
    }
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name} | common | task))
    (tmp_path / "all.yaml").write_text(
        json.dumps({"group": "all", "task": ["pick"], "aggregate_metric_list": [{"metric": "acc"}]})
    )
    return tmp_path


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, x, i) for i, x in enumerate(arguments)]


def test_loglikelihoods_are_those_by_hand_and_those_of_hflm(ours, theirs):
    requests = asked("loglikelihood", *PAIRS)
    scores = ours.loglikelihood(requests)
    for (score, greedy), (want, want_greedy) in zip(
        scores, theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert score == pytest.approx(want, abs=1e-3)
        assert greedy == want_greedy
    for (before, after), (score, _) in list(zip(PAIRS, scores, strict=True))[:3]:
        ids = torch.tensor([ours.tokenizer(before + after)["input_ids"]])
        logs = ours.model(ids)[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
        assert float(logs[-len(ours.tokenizer(after)["input_ids"]) :].sum()) == pytest.approx(
            score, abs=1e-3
        )


def test_what_is_scored_was_rounded_as_the_cache_rounds(ours):
    rounded, text = NativeLM(ours.model, ours.tokenizer, bits=4), (tiny.WORDS,)
    (total,) = rounded.loglikelihood_rolling(asked("loglikelihood_rolling", text))
    (exact,) = ours.loglikelihood_rolling(asked("loglikelihood_rolling", text))
    ids = torch.tensor([ours.prefix_token_id, *ours.tok_encode(*text)])
    losses = [token_losses(ours.model, ids, len(ids), bits=bits).sum().item() for bits in (4, 16)]
    assert (-total, -exact) == pytest.approx(losses, abs=1e-3)
    assert abs(total - exact) > 0.01


def test_a_greedy_continuation_is_reported_as_greedy(ours):
    ids = ours.tokenizer("the cat sat")["input_ids"]
    best = int(ours.model(torch.tensor([ids]))[0, -1].argmax())
    pairs = [(None, ids, [best]), (None, ids, [best ^ 1])]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(pairs)] == [True, False]


def test_the_begin_token_is_added_once(ours):
    lm = NativeLM(ours.model, tiny.tokenizer(begin=True))
    assert lm.tok_encode("the cat") == lm.tok_encode("<s>the cat")
    assert lm.tok_encode("the cat") == [0, *lm.tok_encode("the cat", add_special_tokens=False)]


def test_whole_texts_are_scored_as_hflm_does(ours, theirs):
    requests = asked("loglikelihood_rolling", ("the cat sat",), (tiny.WORDS * 9,), ("a",))
    want = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(want, abs=1e-2)


def test_generated_texts_are_those_of_hflm(ours, theirs):
    blank_line = {"until": ["\n\n"], "max_gen_toks": 12}
    whole = ours.generate_until(asked("generate_until", *((x, blank_line) for x in CONTEXTS)))
    stop = {"until": [whole[0][3:5]], "max_gen_toks": 12, "do_sample": False}
    for settings in (blank_line, stop):
        requests = asked("generate_until", *((x, settings) for x in CONTEXTS))
        assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests)[0] == whole[0].split(stop["until"][0])[0]


def test_the_batch_size_changes_nothing(ours):
    alone = NativeLM(ours.model, ours.tokenizer, batch_size=1)
    pairs = asked("loglikelihood", *PAIRS)
    scores = [[score for score, _ in lm.loglikelihood(pairs)] for lm in (alone, ours)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    texts = asked("generate_until", *((x, {"max_gen_toks": 9}) for x in CONTEXTS))
    assert alone.generate_until(texts) == ours.generate_until(texts)


def test_drawn_texts_differ_and_end_tokens_end_them(ours):
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 50, "max_gen_toks": 9}
    texts = ours.generate_until(asked("generate_until", *[("the cat", drawn)] * 3))
    assert len(set(texts)) == 3
    ids = ours.tokenizer("the cat")["input_ids"]
    best = int(ours.model(torch.tensor([ids]))[0, -1].argmax())
    ended = NativeLM(ours.model, ours.tokenizer, stop=[best])
    assert ended.generate_until(asked("generate_until", ("the cat", {"max_gen_toks": 9}))) == [""]


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 256}, "256 positions")],
)
def test_what_cannot_be_generated_is_refused(ours, settings, named):
    with pytest.raises(ValueError, match=named):
        ours.generate_until(asked("generate_until", ("the cat", settings)))


def test_tasks_give_the_results_of_hflm(ours, theirs, place):
    names = ["pick", "say", "read"]
    chosen = tasks.load_tasks(names, place)
    rows = tasks.run_tasks(ours.model, ours.tokenizer, chosen, batch_size=2)
    want = evaluate(theirs, tasks.load_tasks(names, place))["results"]
    assert list(rows) == names
    assert [rows[name]["shots"] for name in names] == [0, 1, 0]
    for name, metric in (("pick", "acc"), ("pick", "acc_norm"), ("say", "exact_match")):
        assert rows[name][f"{metric},none"] == want[name][f"{metric},none"]
    assert rows["read"]["word_perplexity,none"] == pytest.approx(
        want["read"]["word_perplexity,none"], rel=1e-3
    )


def test_chat_template_examples_and_settings_give_the_results_of_hflm(ours, theirs, place):
    names, changes = ["pick", "say"], (place, False, 2, {"max_gen_toks": 4, "until": ["zzz"]})
    rows = tasks.run_tasks(
        *(ours.model, ours.tokenizer, tasks.load_tasks(names, *changes)), apply_chat_template=True
    )
    want = evaluate(
        *(theirs, tasks.load_tasks(names, *changes)),
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    assert [rows[name]["shots"] for name in names] == [2, 2]
    for name, metric in (("pick", "acc"), ("pick", "acc_norm"), ("say", "exact_match")):
        assert rows[name][f"{metric},none"] == want["results"][name][f"{metric},none"]
    (said,) = (x for x in want["samples"]["say"] if x["doc_id"] == 0)
    prompt, settings = said["arguments"][0]
    assert settings["max_gen_toks"] == 4
    assert prompt.count("<user>") == 3
    assert ours.generate_until(asked("generate_until", (prompt, settings))) == said["resps"][0]


def test_a_chat_is_as_hflm_has_it(ours, theirs):
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "the cat"}]
    plain, strict = ours.tokenizer.chat_template, "{{ raise_exception('no system') }}"
    try:
        for begins in (True, False):
            for start in ("", "{% if messages[0].role == 'system' %}" + strict + "{% endif %}"):
                for lm in (ours, theirs):
                    lm.tokenizer.chat_template = start + tiny.CHAT
                want = theirs.apply_chat_template([*chat], begins)
                assert ours.apply_chat_template(chat, begins) == want
    finally:
        for lm in (ours, theirs):
            lm.tokenizer.chat_template = plain


def test_a_task_that_has_no_examples_by_its_own_settings_gets_none(place, caplog):
    task = json.loads((place / "pick.yaml").read_text())
    (place / "pick.yaml").write_text(json.dumps(task | {"num_fewshot": 0}))
    with caplog.at_level("INFO", "eigenzoo"):
        chosen = tasks.load_tasks(["pick", "say"], place, num_fewshot=3)
    assert [x.get_config("num_fewshot") for x in chosen["tasks"].values()] == [0, 3]
    assert "pick stays without examples" in caplog.text


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("temperature=0.8,max_gen_toks=64", {"temperature": 0.8, "max_gen_toks": 64}),
        ("do_sample=true,until=['a','b']", {"do_sample": True, "until": ["a", "b"]}),
        ('{"top_k": 3}', {"top_k": 3}),
    ],
)
def test_gen_kwargs_are_read_as_lm_eval_reads_them(text, given):
    assert tasks.parse_gen_kwargs(text) == given


@pytest.mark.parametrize("text", ["", "fast", "{'top_k': 3}", "[3]", "3"])
def test_gen_kwargs_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="gen kwargs is "):
        tasks.parse_gen_kwargs(text)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"temperature": float("nan"), "do_sample": True}, "expected a finite temperature"),
        ({"max_gen_toks": "many"}, "cannot generate with"),
        ({"max_gen_toks": 0}, "1 or more"),
        ({"until": [3]}, "expected strings"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_model_is_read(place, settings, named):
    with pytest.raises(ValueError, match=named):
        tasks.load_tasks(["say"], place, gen_kwargs=settings)


def test_settings_without_a_use_are_refused(ours, place, monkeypatch):
    with pytest.raises(ValueError, match="none of pick generates text"):
        tasks.load_tasks(["pick"], place, gen_kwargs={"max_gen_toks": 4})
    chosen = tasks.load_tasks(["pick"], place)
    with pytest.raises(ValueError, match="no chat template: leave --apply-chat-template out"):
        tasks.run_tasks(ours.model, tiny.tokenizer(), chosen, apply_chat_template=True)


def test_a_limit_and_a_second_run_of_the_same_tasks(ours, place):
    chosen = tasks.load_tasks(["all"], place)
    short, once, twice = (
        tasks.run_tasks(ours.model, ours.tokenizer, chosen, limit) for limit in (2, None, None)
    )
    assert (short["pick"]["sample_len"], once["pick"]["sample_len"]) == (2, len(ROWS))
    assert once == twice
    assert once["all"]["acc,none"] == once["pick"]["acc,none"]


def test_metrics_from_the_hub_are_refused_unless_trusted(place, monkeypatch):
    fetched = []
    script = SimpleNamespace(compute=lambda **_: 0.0)
    monkeypatch.setattr(hub_metrics, "load", lambda name: fetched.append(name) or script)
    with pytest.raises(ValueError, match="made_up is a script on the Hub"):
        tasks.load_tasks(["foreign"], place)
    assert fetched == []
    tasks.load_tasks(["foreign"], place, trust_remote_code=True)
    assert fetched == ["made_up"]


def test_tasks_that_run_code_of_the_model_are_refused(ours, place):
    task = json.loads((place / "say.yaml").read_text())
    (place / "say.yaml").write_text(json.dumps(task | {"unsafe_code": True}))
    with pytest.raises(ValueError, match="unsafe"):
        tasks.run_tasks(ours.model, ours.tokenizer, tasks.load_tasks(["say"], place))


def test_unknown_tasks_and_missing_data_are_refused(place):
    with pytest.raises(ValueError, match="'nope' is unknown"):
        tasks.load_tasks(["pick", "nope"], place)
    with pytest.raises(ValueError, match="is no folder"):
        tasks.load_tasks(["pick"], place / "pick.yaml")
    (place / "data.jsonl").unlink()
    with pytest.raises(ValueError, match="the data of pick cannot be read"):
        tasks.load_tasks(["pick"], place)


def test_the_command_prints_one_json_object_or_a_table(folder, place, capsys, monkeypatch):
    bits = []
    monkeypatch.setattr(tasks, "NativeLM", lambda *args: bits.append(args[-1]) or NativeLM(*args))
    words = ["evaluate", str(folder), "--tasks", "pick,say", "--include-path", str(place)]
    words += ["--kv-bits", "8"]
    more = ["--limit", "3", "--batch-size", "2", "--num-fewshot", "1", "--apply-chat-template"]
    more += ["--gen-kwargs", "max_gen_toks=3"]
    app([*words, *more, "--json"], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["task_settings"] == {
        "num_fewshot": 1,
        "apply_chat_template": True,
        "gen_kwargs": {"max_gen_toks": 3},
        "limit": 3,
    }
    assert printed["tasks"]["pick"]["shots"] == 1
    assert list(printed["tasks"]) == ["pick", "say"]
    assert printed["tasks"]["pick"]["sample_len"] == 3
    assert "perplexity" not in printed
    app(words[:-2], standalone_mode=False)
    assert "acc_norm,none" in capsys.readouterr().out
    assert bits == [8, None]


def test_without_lm_eval_the_error_names_the_extra_to_install(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, said = run("evaluate", folder, "--tasks", "pick")
    assert (code, "pip install 'eigenzoo[eval]'" in said) == (2, True)
