"""`klreg kl`: responses of real small models against sums over the vocabulary done by hand, and against each other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from small_models import END, VOCABULARY, moved, need_transformers, network, write_model, write_tokenizer
from torch import Tensor
from typer.testing import CliRunner

from klreg_verl.core import kl
from klreg_verl.replay import divergence, models, prompts
from klreg_verl.replay.command import kl_command
from klreg_verl.replay.divergence import Sampled, ratio
from klreg_verl.replay.models import Model

need_transformers()
TEMPLATE = "{% for message in messages %}{{ message.content }}.{% endfor %}{% if add_generation_prompt %},{% endif %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    reference = network(1)
    policy = moved(reference, 0.03)
    return write_model(root / "policy", policy), write_model(root / "reference", reference)


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]) -> tuple[Model, Model]:
    return models.load(folders[0]), models.load(folders[1])


@torch.no_grad()
def next_logprobs(model: Model, prefix: list[int], temperature: float = 1.0) -> Tensor:
    """(V,) float64, from one sequence without padding or cache."""
    return (model.network(torch.tensor([prefix])).logits[0, -1].double() / temperature).log_softmax(dim=-1)


# ---------------------------------------------------------------------------------------------------- samples


def test_first_tokens_are_drawn_from_the_untruncated_policy_whatever_its_generation_config_says(pair):
    # 6000 draws of one token after prompts of two lengths, which are padded together. A share of 6000 independent
    # draws with chance p has a standard deviation of sqrt(p (1 - p) / 6000).
    given = [[7, 8, 9], [10, 11]]
    sampled = divergence.sample(pair[0], given, responses=6000, temperature=1.7, max_tokens=1, seed=3)
    for number, prompt in enumerate(given):
        chances = next_logprobs(pair[0], prompt, temperature=1.7).exp()
        rows = [tokens[0] for tokens, of in zip(sampled.responses, sampled.prompt, strict=True) if of == number]
        shares = torch.bincount(torch.tensor(rows), minlength=len(VOCABULARY)) / 6000
        assert (((shares - chances) / (chances * (1 - chances) / 6000).sqrt()).abs() < 4.5).all()


def test_later_tokens_too_with_their_cache(pair):
    # second tokens given the most common first one: as above, with the number of such rows
    sampled = divergence.sample(pair[0], [[7, 8, 9], [10, 11]], responses=6000, temperature=1.0, max_tokens=2, seed=4)
    rows = [tokens for tokens, of in zip(sampled.responses, sampled.prompt, strict=True) if of == 1 and len(tokens) > 1]
    first = max(range(len(VOCABULARY)), key=[row[0] for row in rows].count)
    second = torch.tensor([row[1] for row in rows if row[0] == first])
    chances, count = next_logprobs(pair[0], [10, 11, first]).exp(), len(second)
    shares = torch.bincount(second, minlength=len(VOCABULARY)) / count
    assert count > 300
    assert (((shares - chances) / (chances * (1 - chances) / count).sqrt()).abs() < 4.5).all()


def test_a_response_ends_with_the_stop_token_or_at_the_limit_and_a_seed_repeats_it(pair):
    def draw(seed: int) -> Sampled:
        return divergence.sample(pair[0], [[7], [8, 9]], responses=200, temperature=1.5, max_tokens=6, seed=seed)

    sampled = draw(5)
    for tokens, stopped in zip(sampled.responses, sampled.stopped, strict=True):
        assert END not in tokens[:-1]
        assert stopped == (tokens[-1] == END)
        assert stopped or len(tokens) == 6
    assert 0 < sum(sampled.stopped) < 400
    assert draw(5).responses == sampled.responses != draw(6).responses


def test_temperature_zero_is_refused(pair):
    with pytest.raises(ValueError, match="temperature 0.0: the estimators need samples"):
        divergence.sample(pair[0], [[7]], responses=1, temperature=0.0, max_tokens=2, seed=1)


# ---------------------------------------------------------------------------------------------------- values


def test_exact_values_and_means_are_sums_over_the_vocabulary(pair):
    # two prefixes, one response each: [7] -> 9, and [8, 9] -> 10, 11
    sampled = Sampled(prompts=[[7], [8, 9]], responses=[[9], [10, 11]], prompt=torch.arange(2), stopped=[True, False])
    found = divergence.measure(*pair, sampled, temperature=1.3)
    total: dict[str, float] = {"reverse": 0.0, "forward": 0.0, "k2": 0.0, "k3": 0.0}
    for prefix, token in (([7], 9), ([8, 9], 10), ([8, 9, 10], 11)):
        p, q = (next_logprobs(model, prefix, 1.3) for model in pair)
        d = float(p[token] - q[token])
        total["reverse"] += float((p.exp() * (p - q)).sum())
        total["forward"] += float((q.exp() * (q - p)).sum())
        total["k2"] += float((p.exp() * 0.5 * (p - q).square()).sum())
        total["k3"] += math.exp(-d) - 1 + d
    by_name = {one.name: one for one in found.estimators}
    assert found.reverse.token.mean == pytest.approx(total["reverse"] / 3, rel=1e-4)
    assert found.reverse.response.mean == pytest.approx(total["reverse"] / 2, rel=1e-4)
    assert found.forward.token.mean == pytest.approx(total["forward"] / 3, rel=1e-4)
    assert by_name["k2"].bias.token.mean == pytest.approx((total["k2"] - total["reverse"]) / 3, rel=1e-3)
    assert by_name["k3"].sampled.token.mean == pytest.approx(total["k3"] / 3, rel=1e-4)
    assert (found.prompts, found.responses, found.tokens, found.truncated) == (2, 2, 3, 0.5)


def test_estimators_come_within_their_standard_errors_of_the_exact_value(pair):
    given = [[7], [8, 9], [10, 11, 12], [13], [14, 15], [16]] * 5
    sampled = divergence.sample(pair[0], given, responses=40, temperature=1.0, max_tokens=6, seed=2)
    found = divergence.measure(*pair, sampled, temperature=1.0)
    by_name = {one.name: one for one in found.estimators}
    assert set(by_name) == set(kl.names())
    assert found.reverse.token.mean > 0.01
    for name in ("k1", "k3", "forward", "js", "chi2", "tv"):
        one = by_name[name]
        assert abs(one.bias.token.mean) < 1e-9, name
        assert abs(one.error.token.mean) < 4 * one.error.token.error, name
        assert abs(one.error.response.mean) < 4 * one.error.response.error, name
    # k2 and abs have biases, and their errors come within standard errors of those
    for name in ("k2", "abs"):
        one = by_name[name]
        assert abs(one.bias.token.mean) > 1e-4
        assert abs(one.error.token.mean - one.bias.token.mean) < 4 * one.error.token.error, name


def test_the_spread_of_k1_is_that_of_the_log_ratio(pair):
    sampled = Sampled(prompts=[[7]], responses=[[9]], prompt=torch.arange(1), stopped=[True])
    found = divergence.measure(*pair, sampled, temperature=1.0)
    p, q = (next_logprobs(model, [7]) for model in pair)
    mean = (p.exp() * (p - q)).sum()
    assert found.estimators[0].name == "k1"
    assert found.estimators[0].spread == pytest.approx(
        float((p.exp() * (p - q - mean).square()).sum().sqrt()), rel=1e-4
    )


def test_a_model_is_at_no_distance_from_itself(pair):
    sampled = divergence.sample(pair[0], [[7], [8]], responses=4, temperature=1.0, max_tokens=4, seed=1)
    found = divergence.measure(pair[0], pair[0], sampled, temperature=1.0)
    assert (found.reverse.token.mean, found.forward.response.mean) == (0.0, 0.0)
    assert [one.sampled.token.mean for one in found.estimators] == [0.0] * len(kl.names())


def test_small_passes_give_the_same(pair, monkeypatch):
    sampled = divergence.sample(pair[0], [[7], [8, 9]], responses=5, temperature=1.0, max_tokens=5, seed=1)
    whole = divergence.measure(*pair, sampled, temperature=1.0)
    monkeypatch.setattr("klreg_verl.replay.batch.MOST_TOKENS", 20)
    monkeypatch.setattr(divergence, "_MOST_NUMBERS", 2 * len(VOCABULARY))
    parts = divergence.measure(*pair, sampled, temperature=1.0)
    assert parts.reverse.token.mean == pytest.approx(whole.reverse.token.mean, rel=1e-5)
    assert parts.estimators[4].sampled.response.mean == pytest.approx(
        whole.estimators[4].sampled.response.mean, rel=1e-4
    )


def test_the_standard_error_of_a_ratio_by_hand():
    # sums 1, 3 | 2, 6 and counts 1, 1 | 2, 2 of two prompts: mean 12 / 6 = 2; residuals (1 + 3 - 4) = 0 and
    # (2 + 6 - 8) = 0: all noise is inside the prompts. Of single responses: -1, 1, -2, 2.
    sums, counts = torch.tensor([1.0, 3.0, 2.0, 6.0]), torch.tensor([1.0, 1.0, 2.0, 2.0])
    assert ratio(sums, counts, torch.tensor([0, 0, 1, 1])) == divergence.Estimate(mean=2.0, error=0.0)
    expected = math.sqrt(4 / 3 * (1 + 1 + 4 + 4)) / 6
    assert ratio(sums, counts, torch.tensor([0, 0, 0, 0])).error == pytest.approx(expected)
    assert ratio(sums, counts, torch.tensor([5, 9, 2, 4])).error == pytest.approx(expected)
    assert ratio(sums[:1], counts[:1], torch.tensor([0])).error is None


# ---------------------------------------------------------------------------------------------------- inputs


def test_lines_are_the_users_messages_where_there_is_a_template(folders, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("ab\n\n  \ncd\n")
    plain = models.load(folders[0]).tokenizer
    assert prompts.read(file, plain) == [[5, 6], [7, 8]]
    assert prompts.read(file, plain, limit=1) == [[5, 6]]
    write_tokenizer(tmp_path / "t", template=TEMPLATE)
    with_template = models._auto("AutoTokenizer", tmp_path / "t")
    dot, comma = VOCABULARY.index("."), VOCABULARY.index(",")
    assert prompts.read(file, with_template) == [[5, 6, dot, comma], [7, 8, dot, comma]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\ufeffab\r\ncd\r\n"),
        ("p.jsonl", '{"prompt": "ab"}\n{"prompt": "cd"}\n'),
        ("p.txt", '{"prompt": "ab"}\n\n{"prompt": "cd"}'),
    ],
)
def test_json_lines_and_marks_of_editors_are_read_as_what_they_are(folders, tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert prompts.read(tmp_path / name, models.load(folders[0]).tokenizer) == [[5, 6], [7, 8]]


def test_a_prompt_may_have_a_line_separator_in_it(folders, tmp_path):
    (tmp_path / "p.txt").write_text("a\u2028b\ncd\n", encoding="utf-8")
    assert len(prompts.read(tmp_path / "p.txt", models.load(folders[0]).tokenizer)) == 2


def test_parquet_prompts_go_through_the_template(folders, tmp_path):
    file = tmp_path / "p.parquet"
    rows = [[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]]
    pq.write_table(pa.table({"prompt": rows}), file)
    write_tokenizer(tmp_path / "t", template=TEMPLATE)
    dot, comma = VOCABULARY.index("."), VOCABULARY.index(",")
    assert prompts.read(file, models._auto("AutoTokenizer", tmp_path / "t")) == [[5, dot, 6, dot, comma]]
    with pytest.raises(ValueError, match="has no chat template"):
        prompts.read(file, models.load(folders[0]).tokenizer)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"\n  \n", "p.txt", "has no prompt"),
        (b"", "p.txt", "has no prompt"),
        (b"\xff\xfe\x00", "p.txt", "neither parquet nor UTF-8 text"),
        (b"abc", "p.parquet", "cannot be read as parquet"),
        (None, "p.txt", "There is no file"),
        (b'prompt,answer\n"a, b",2\n', "p.csv", "looks like a table with a header"),
        (b"id;question\n1;ab\n", "p.txt", "looks like a table with a header"),
        (b'["ab", "cd"]\n', "p.json", r'p\.json:1 has no "prompt"'),
        (b'["ab",\n "cd"]\n', "p.txt", "looks like a JSON list"),
        (b'{"prompt": "ab"}\n{"text": "c"}\n', "p.jsonl", r'p\.jsonl:2 has no "prompt"'),
    ],
)
def test_prompt_files_that_are_none(pair, tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.read(tmp_path / name, pair[0].tokenizer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "no column 'prompt'; found: text"),
        ({"prompt": ["a"]}, "row 0 is no list of messages"),
        ({"prompt": [[{"role": "user", "content": ""}]]}, "row 0 is no list of messages"),
    ],
)
def test_parquet_of_another_kind_is_refused(pair, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=message):
        prompts.read(tmp_path / "p.parquet", pair[0].tokenizer)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["config.json"], r"holds no configuration \(config.json\)"),
        (["model.safetensors"], "holds no weights"),
        (["tokenizer.json", "tokenizer_config.json"], "holds no tokenizer"),
    ],
)
def test_an_incomplete_model_folder_says_what_it_lacks(folders, tmp_path, removed, message):
    folder = Path(shutil.copytree(folders[0], tmp_path / "m"))
    for name in removed:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_weights_cut_short_are_an_error_that_names_the_folder(folders, tmp_path):
    folder = Path(shutil.copytree(folders[0], tmp_path / "m"))
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{folder}: the model cannot be loaded"):
        models.load(folder)


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path):
    with pytest.raises(ValueError, match="There is no folder Qwen/Qwen2.5-0.5B"):
        models.load(Path("Qwen/Qwen2.5-0.5B"))


def test_vocabularies_that_differ_are_refused(pair, tmp_path):
    larger = write_model(tmp_path / "larger", network(1, vocab_size=40))
    with pytest.raises(ValueError, match="vocabularies differ in size .*: 33, .*: 40"):
        models.check_same_vocabulary(pair[0], models.load(larger))
    renamed = write_model(tmp_path / "renamed", network(1))
    write_tokenizer(renamed, vocabulary=(*VOCABULARY[:-1], ";"))
    with pytest.raises(ValueError, match="differ in 2 tokens, ',' among them"):
        models.check_same_vocabulary(pair[0], models.load(renamed))


# ---------------------------------------------------------------------------------------------------- command


@pytest.fixture
def run_kl(folders, tmp_path: Path) -> Any:
    file = tmp_path / "prompts.txt"
    file.write_text("ab\nc\nxyz\n")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(kl_command)

    def run(*options: str) -> str:
        given = [*map(str, folders), "--prompts", str(file), "--max-tokens", "4", "--responses", "3", *options]
        result = CliRunner().invoke(app, given, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_the_command_prints_every_estimator_beside_the_exact_value(run_kl):
    text = run_kl()
    assert "3 prompts, 9 responses of the policy" in text
    assert "forward     on the policy's own prefixes: not the forward KL of whole responses" in text
    first_words = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert [word for word in first_words if word in kl.names()] == ["forward", *kl.names(), "forward"]


def test_the_commands_json_says_what_was_asked_and_repeats_with_its_seed(run_kl):
    found = json.loads(run_kl("--json", "--seed", "4", "--temperature", "0.8"))
    assert (found["seed"], found["temperature"], found["max_tokens"]) == (4, 0.8, 4)
    assert [one["name"] for one in found["estimators"]] == list(kl.names())
    assert found["estimators"][0]["estimates"] == "reverse"
    assert found["reverse"]["token"]["mean"] >= 0
    assert json.loads(run_kl("--json", "--seed", "4", "--temperature", "0.8")) == found


def test_a_users_own_estimator_is_judged_with_the_others(run_kl, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Twice:\n    def value(self, d): return 2 * d\n"
        "    def coefficient(self, d): return 2 * torch.ones_like(d)\ntwice = Twice()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = json.loads(run_kl("--json", "--estimator", "mine:twice"))
    mine, k1 = found["estimators"][-1], found["estimators"][0]
    assert mine["sampled"]["token"]["mean"] == pytest.approx(2 * k1["sampled"]["token"]["mean"])
    # its mean is twice the reverse KL: the bias is one reverse KL
    assert mine["bias"]["token"]["mean"] == pytest.approx(found["reverse"]["token"]["mean"], rel=1e-6)
