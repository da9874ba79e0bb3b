"""The tiny model: one token a letter, a vocabulary that fits, uniform supervision, the same seed the same weights."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.cache import options_from
from data_prep.check import check_model
from data_prep.rewards import compute_score
from data_prep.tiny_model import (
    ALPHABET,
    IGNORED,
    TinyModelOptions,
    answer_loss,
    build,
    build_model,
    build_tokenizer,
    cache,
    draw,
    draw_batch,
    is_right,
    learning_rate_factor,
    read_layout,
    render_answers,
    render_prompts,
)

TINY = TinyModelOptions(hidden_size=32, heads=2, layers=1, steps=20, batch_size=32, measured_prompts=12)


def quiet(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build(TINY, path, quiet)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def layout(tokenizer):
    return read_layout(tokenizer)


def places(text: str) -> np.ndarray:
    return np.array([[ALPHABET.index(letter) for letter in text]])


def test_auto_tokenizer_gives_a_qwen2_tokenizer_with_end_and_padding_apart(tokenizer):
    assert type(tokenizer).__name__ in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_model_and_tokenizer_have_the_same_vocabulary(folder, tokenizer):
    # 256 bytes + end, padding and three roles
    assert len(tokenizer) == 261
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["model_type"], config["dtype"]) == (261, "qwen2", "float32")
    assert check_model(folder) == {"model_vocabulary": 261, "tokenizer_vocabulary": 261}


def test_the_generation_config_names_end_and_padding(folder, tokenizer):
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    assert generation["pad_token_id"] == tokenizer.pad_token_id


@pytest.mark.parametrize("text", ["abba", "user", "theassistant", "it's", "\n", "\n\n", "zzzz", " a b"])
def test_every_ascii_character_is_one_token_and_decodes_back(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_any_text_decodes_back(tokenizer):
    text = "R\u00e9sum\u00e9 \u4f60\u597d \U0001f600\t<x>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_chat_template_adds_three_tokens_to_the_letters(tokenizer):
    messages = [{"role": "user", "content": "aabbcc"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<|user|>aabbcc<|im_end|><|assistant|>"
    assert len(ids) == 6 + 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "aabbcc"


def test_an_answer_continues_the_prompt_as_the_template_renders_it(tokenizer):
    prompt = [{"role": "user", "content": "aabb"}]
    both = [*prompt, {"role": "assistant", "content": "abba"}]
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(both, tokenize=False) == start + "abba" + tokenizer.eos_token


def test_a_role_that_the_template_does_not_know_is_refused(tokenizer):
    with pytest.raises(Exception, match="knows the roles system, user and assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_training_prompts_are_what_the_chat_template_gives(tokenizer, layout):
    messages = [{"role": "user", "content": "zaybyaz"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert render_prompts(places("zaybyaz"), layout).tolist() == [expected]


def test_a_share_of_the_demonstrations_repeats_the_letters_in_another_order(tokenizer, layout):
    flawed = dataclasses.replace(TINY, flawed=0.25, batch_size=4000)
    ids, labels = draw_batch(np.random.default_rng(0), layout, flawed)
    right = 0
    for sequence, label in zip(ids, labels, strict=True):
        answer = tokenizer.decode(label[label != IGNORED], skip_special_tokens=True)
        prompt = tokenizer.decode(sequence[sequence != layout.pad]).removeprefix("<|user|>").partition("<|im_end|>")[0]
        assert sorted(answer) == sorted(prompt)
        right += compute_score("palindrome", answer, prompt)["score"] == 1.0
    # of 4000, 3000 are unflawed (sd 27) and some of the flawed are right by chance: 1 in 3 at length 4, fewer beyond
    assert 2900 < right < 3350


def test_a_batch_supervises_the_answer_and_its_end_only(tokenizer, layout):
    ids, labels = draw_batch(np.random.default_rng(0), layout, dataclasses.replace(TINY, flawed=0.0))
    assert ids.shape == labels.shape == (32, 3 + 2 * TINY.max_length + 1)
    for sequence, label in zip(ids, labels, strict=True):
        answer = tokenizer.decode(label[label != IGNORED], skip_special_tokens=True)
        text = tokenizer.decode(sequence[sequence != layout.pad])
        prompt = text.removeprefix("<|user|>").partition("<|im_end|>")[0]
        assert text == f"<|user|>{prompt}<|im_end|><|assistant|>{answer}<|im_end|>"
        assert label[label != IGNORED][-1] == layout.after
        assert compute_score("palindrome", answer, prompt)["score"] == 1.0


def test_answers_are_uniform_over_the_right_ones_and_tell_nothing_of_the_shuffle():
    # Length 4, two different letters: 2 right answers, 6 prompts. Chi-squared of 12 cells, 11 degrees of freedom:
    # the 0.999 quantile is 31.3.
    letters, answers = draw(np.random.default_rng(0), 400_000, 4)
    two = np.array([len(set(row)) == 2 for row in answers])
    pairs = Counter(
        (tuple(prompt == min(prompt)), tuple(answer == min(answer)))
        for prompt, answer in zip(letters[two][:60_000], answers[two][:60_000], strict=True)
    )
    expected = sum(pairs.values()) / 12
    assert len(pairs) == 12
    assert sum((count - expected) ** 2 / expected for count in pairs.values()) < 31.3


def test_an_untrained_model_is_about_uniform_over_its_vocabulary(layout):
    # loss = log(261) = 5.56 nats, up to the small random weights
    torch.manual_seed(0)
    model = build_model(TINY, build_tokenizer())
    loss = answer_loss(model, *draw_batch(np.random.default_rng(0), layout, TINY))
    assert loss.item() == pytest.approx(np.log(261), abs=0.1)


def test_is_right_asks_for_the_letters_the_mirror_and_the_end(layout):
    letters = np.repeat(places("aabb"), 5, axis=0)
    answers = np.concatenate(
        [render_answers(places(text), layout) for text in ("abba", "baab", "abab", "acca", "abba")]
    )
    answers[4, -1] = layout.letters[0]  # does not end
    assert is_right(answers, letters, layout).tolist() == [True, True, False, False, False]


def test_the_learning_rate_warms_up_for_a_tenth_and_falls_as_a_cosine():
    # 20 steps: warm-up over 2, then cos from 1 to 0 over 18, half way at step 2 + 9
    assert [learning_rate_factor(step, 20) for step in (0, 1, 2, 11, 20)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert learning_rate_factor(0, 1) == 1.0


def test_twenty_steps_of_training_lower_the_loss(folder, layout):
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert trained.dtype == torch.float32
    batch = draw_batch(np.random.default_rng(9), layout, TINY)
    torch.manual_seed(0)
    untrained = build_model(TINY, build_tokenizer())
    # log(26) = 3.26 nats is what knowing that answers are letters gives; 20 tiny steps get part of the way from 5.56
    assert answer_loss(trained, *batch).item() < answer_loss(untrained, *batch).item() - 0.5


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(folder, tmp_path):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        (tmp_path / "again").mkdir()
        build(TINY, tmp_path / "again", quiet)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), state)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_another_seed_gives_other_weights(folder, tmp_path):
    build(TinyModelOptions(**(vars(TINY) | {"seed": 2})), tmp_path, quiet)
    assert (folder / "model.safetensors").read_bytes() != (tmp_path / "model.safetensors").read_bytes()


def test_cached_model_is_complete_and_readable_by_others(tmp_path):
    told: list[str] = []
    options = TinyModelOptions(**(vars(TINY) | {"steps": 2}))
    folder = cache(options, tmp_path, lambda done, total, text: told.append(f"{done}/{total} {text}"))
    assert check_model(folder)["model_vocabulary"] == 261
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    assert told[-1].startswith("2/2 right answers: ")
    assert cache(options, tmp_path, lambda done, total, text: pytest.fail("built again")) == folder


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"step": 3}, "unknown key 'step'. Did you mean 'steps'?"),
        ({"heads": 3}, "hidden_size: 128 cannot be split into 3 heads .* Use a multiple of 6"),
        ({"steps": 0}, "steps: 0 must be greater than 0"),
        ({"min_length": 9}, "max_length: 8 is below min_length=9"),
    ],
)
def test_bad_options_are_refused_with_their_place(options, text):
    with pytest.raises(ValueError, match=text):
        options_from(TinyModelOptions, options, "model.options")
