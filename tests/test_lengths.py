"""Prompt lengths: the quick bound never misses a long prompt, and names of tokenizers lead where they say."""

import pytest

from data_prep.lengths import RenderError, named_tokenizer, num_tokens, too_long


@pytest.fixture(scope="module")
def tokenizer():
    return named_tokenizer("tiny")


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_prompt_has_the_texts_tokens_and_the_templates(tokenizer):
    # one token a letter, and three of the template
    assert num_tokens(tokenizer, user("abcde")) == 8


def test_the_bound_finds_what_counting_every_prompt_finds(tokenizer):
    texts = ["a" * size for size in range(40)] + [
        "\u00e9" * size for size in range(40)
    ]  # e acute is two bytes, two tokens
    prompts = [user(text) for text in texts]
    for limit in (1, 11, 25, 42, 100):
        counted = {place: num_tokens(tokenizer, prompt) for place, prompt in enumerate(prompts)}
        assert too_long(tokenizer, prompts, limit) == {at: size for at, size in counted.items() if size > limit}


def test_what_surely_fits_is_not_encoded(tokenizer):
    class Counting:
        calls = 0

        def apply_chat_template(self, messages, **settings):
            self.calls += 1
            return tokenizer.apply_chat_template(messages, **settings)

    counting = Counting()
    # the template's 3 tokens and one x, and 16 spare: 20; so of a limit of 60, 40 characters surely fit
    assert too_long(counting, [user("a" * size) for size in (10, 40, 41, 57, 58)], 60) == {4: 61}
    assert counting.calls == 1 + 3  # the template once, then 41, 57 and 58 characters


def test_no_prompts_are_none_too_long(tokenizer):
    assert too_long(tokenizer, [], 5) == {}


def test_a_role_that_the_template_refuses_is_told(tokenizer):
    with pytest.raises(RenderError, match="knows the roles system, user and assistant, not tool"):
        num_tokens(tokenizer, [{"role": "tool", "content": "x"}])


def test_a_folder_that_is_not_there_or_has_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gone is not a folder. Name a model folder, a Hugging Face id, or `tiny`"):
        named_tokenizer(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        named_tokenizer(str(tmp_path))


def test_a_model_folder_gives_its_own_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert num_tokens(named_tokenizer(str(tmp_path)), user("abc")) == 6
