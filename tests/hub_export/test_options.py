"""Keywords of an exported model: embeddings, hidden states, tuples, losses, and refusals."""

import exported
import peft
import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments
from transformers.data.data_collator import DataCollatorWithFlattening

from eigenzoo.hub_export.remote.modeling_eigen import EigenModel

IDS = tiny.tokens(2, 12)


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


@pytest.fixture(scope="module", params=["rebuilt keys", "learned positions", "ALiBi"])
def model(request):
    return exported.of_kind(request.param)


def test_embeddings_are_taken_for_their_tokens(model):
    vectors = model.get_input_embeddings()(IDS)
    close(model(inputs_embeds=vectors).logits, model(IDS).logits)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    want = model.generate(IDS, **how)[:, 12:]
    for cache in (None, "static"):
        got = model.generate(inputs_embeds=vectors, cache_implementation=cache, **how)
        assert torch.equal(got, want)


def test_embeddings_get_gradients_as_prompt_tuning_needs_them(model):
    vectors = model.get_input_embeddings()(IDS).requires_grad_()
    model(inputs_embeds=vectors, labels=IDS).loss.backward()
    assert vectors.grad[:, :-1].abs().sum(2).min() > 0  # the last token predicts nothing


def test_peft_tunes_a_prompt():
    model = exported.of_kind("rebuilt keys")
    tuned = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    prompt = tuned.get_prompt(batch_size=2)
    vectors = torch.cat((prompt, model.get_input_embeddings()(IDS)), 1)
    close(
        tuned(IDS, attention_mask=torch.ones_like(IDS)).logits, model(inputs_embeds=vectors).logits
    )


def test_hidden_states_are_the_inputs_of_layers_and_of_the_head(model):
    headless = exported.exported(model.model, EigenModel)
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    close(states[0], model.model.begin(IDS)[0])
    close(model.model.head(states[-1]), model(IDS).logits)
    assert model(IDS).hidden_states is None
    for one in (model, headless):
        one.config.output_hidden_states = True
        for got, want in zip(one(IDS).hidden_states, states, strict=True):
            close(got, want)
        assert one(IDS, output_hidden_states=False).hidden_states is None
        one.config.output_hidden_states = False
    how = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    steps = model.generate(IDS, **how, output_hidden_states=True).hidden_states
    close(steps[0][-1], states[-1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt"])
def test_hidden_states_are_those_of_the_dense_model(family):
    theirs, ours = exported.dense_and_exported(family)
    want = theirs(IDS, output_hidden_states=True).hidden_states
    for got, state in zip(ours(IDS, output_hidden_states=True).hidden_states, want, strict=True):
        close(got, state)


@pytest.mark.parametrize("again", [False, True])
def test_training_takes_the_same_keywords_with_and_without_checkpoints(model, again):
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        states = model(IDS, output_hidden_states=True).hidden_states
        vectors = model.get_input_embeddings()(IDS).requires_grad_()
        mask = torch.ones(2, 1, 12, 12).tril().bool()
        how = {"attention_mask": mask, "labels": IDS, "use_cache": False}
        loss, logits = model(inputs_embeds=vectors, return_dict=False, **how)
        with torch.no_grad():  # nothing is recomputed, so a cache works
            tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    finally:
        model.eval().gradient_checkpointing_disable()
    close(logits, model(IDS).logits)
    close(loss, model(IDS, labels=IDS).loss)
    assert len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(tokens, model.generate(IDS, max_new_tokens=4, do_sample=False))


def test_tuples_are_returned_if_asked_for(model):
    want = model(IDS, labels=IDS, output_hidden_states=True)
    got = model(IDS, labels=IDS, output_hidden_states=True, return_dict=False)
    assert isinstance(got, tuple)
    assert len(got) == 4  # loss, logits, cache, hidden states
    close(got[1], want.logits)
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple)
    assert not isinstance(model(IDS, return_dict=True), tuple)
    model.config.return_dict = True
    headless = exported.exported(model.model, EigenModel)
    assert isinstance(headless(IDS, return_dict=False), tuple)


def test_losses_take_transformers_keywords(model):
    mean = model(IDS, labels=IDS).loss
    close(model(IDS, labels=IDS, num_items_in_batch=torch.tensor(11)).loss, mean * 2)
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    close(model(IDS, shift_labels=shifted).loss, mean)


REFUSED = {
    "lables": {"lables": IDS},
    "token_type_ids": {"token_type_ids": torch.ones_like(IDS)},
    "cache_position": {"cache_position": torch.arange(12)},
    "output_attentions": {"output_attentions": True},
    "output_router_logits": {"output_router_logits": True},
    "is_causal": {"is_causal": False},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 12]), "max_length_q": 12},
    "seq_idx": {"seq_idx": torch.zeros_like(IDS)},
    "output_hidden_states": {"output_hidden_states": [1, 2]},
    "inputs_embeds": {"inputs_embeds": torch.zeros(2, 12, 64)},
    "cache": {"past_key_values": ((IDS, IDS),)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_keyword_without_effect_is_an_error_that_names_it(model, name):
    with pytest.raises(ValueError, match=name):
        model(IDS, **REFUSED[name])


def test_what_asks_for_nothing_is_accepted(model):
    nothing = {"output_attentions": False, "is_causal": True, "cu_seq_lens_q": None, "other": None}
    close(model(IDS, **nothing).logits, model(IDS).logits)


@pytest.mark.parametrize("given", [{}, {"input_ids": IDS[0]}, {"inputs_embeds": IDS.float()}])
def test_tokens_of_another_form_are_refused(model, given):
    with pytest.raises(ValueError, match=r"input_ids|inputs_embeds"):
        model(**given)


def test_attentions_by_the_config_are_refused(model):
    model.set_attn_implementation("eager")  # transformers refuses it with others
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(IDS)
    model.config.output_attentions = False
    model.set_attn_implementation("sdpa")


def test_static_caches_take_the_masks_of_other_attentions(model):
    how = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    how["attention_mask"][1, :5] = 0
    want = model.generate(IDS, **how)
    model.set_attn_implementation("eager")  # its masks are floats
    assert torch.equal(model.generate(IDS, cache_implementation="static", **how), want)
    model.set_attn_implementation("sdpa")


def test_a_cache_is_refused_where_layers_are_recomputed(model):
    cache = model(IDS).to_tuple()[1]
    model.gradient_checkpointing_enable()
    model.train()
    try:
        with pytest.raises(ValueError, match="cache"):
            model(IDS[:, :1], past_key_values=cache)
    finally:
        model.eval().gradient_checkpointing_disable()


def test_the_trainer_learns_from_packed_texts(tmp_path):
    model = exported.of_kind("rebuilt keys").requires_grad_(True)
    texts = [{"input_ids": row[:n].tolist()} for row, n in zip(IDS, (5, 12), strict=True)]
    batch = DataCollatorWithFlattening()(texts)
    model.train()
    loss = model(**batch, use_cache=False).loss
    losses = [
        model(torch.tensor([text["input_ids"]]), labels=torch.tensor([text["input_ids"]])).loss * n
        for text, n in zip(texts, (4, 11), strict=True)
    ]
    close(loss, sum(losses) / 15)
    how = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": []}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **how)
    trainer = Trainer(
        model, arguments, train_dataset=texts, data_collator=DataCollatorWithFlattening()
    )
    assert trainer.train().training_loss == pytest.approx(loss.item(), abs=1e-5)
