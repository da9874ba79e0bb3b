"""A small Qwen2 model supervised on palindromes: a starting policy that a CPU makes in less than a minute.

It reads scrambled letters and writes a palindrome of them. A share of its demonstrations is flawed: the letters in a
random order. So the finished model knows how, and yet is right in less than half of its sampled answers: RL has
something to gain, and gains it within tens of steps, since what it must learn is one habit to drop.

Each unflawed answer is *one* of the right answers, drawn uniformly (reasoning-gym's own palindrome is such a draw: its
half is made of independent letters, so every order of the half is equally likely). The policy that starts RL therefore
spreads its probability over several answers to a prompt, and a loss of diversity can be seen.

Tokenizer: byte-level BPE without merges, so each letter is one token, in the prompt as in the answer, and a newline
too. A message is rendered `<|user|>letters<|im_end|>`, the answer follows `<|assistant|>`. The model's vocabulary
is exactly the tokenizer's: verl masks ids beyond it in vLLM but not in the trainer, and the two would disagree from
the first step.

It can be given skills beside palindromes (skills.py), which a run then does not train and may lose: demonstrations of
each join every batch.

The letters are drawn as reasoning-gym draws them, for all lengths asked for; the test items of palindrome.py are
not kept out of this supervision, since a study compares policies that all start from it.

    python -m data_prep.tiny_model --out FOLDER
"""

import functools
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

from data_prep import skills
from data_prep.cache import Progress, cached_folder, print_progress, run_builder
from data_prep.tiny_options import Device, TinyModelOptions, planned
from klreg_verl.experiment.strict import FieldError

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
PAD, EOS, ROLES = "<|endoftext|>", "<|im_end|>", ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{ raise_exception('this model knows the roles system, user and assistant, not ' + message.role) }}"
    "{%- endif -%}"
    "{{ '<|' + message.role + '|>' + message.content + '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
IGNORED = -100
"""Label of a position that is not supervised, as torch's cross_entropy has it."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Token ids of a rendered conversation: before the letters, between letters and answer, after the answer."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: int
    pad: int
    letters: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SkillMeasurement:
    """How a model answers items of a skill that no demonstration had."""

    sampled: float
    """Share of right answers, sampled at temperature 1."""
    greedy: float
    """Share of right answers, most likely token each time."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How a model answers new prompts."""

    sampled: float
    """Share of right answers, sampled at temperature 1."""
    greedy: float
    """Share of right answers, most likely token each time."""
    distinct: float
    """Mean number of different right answers among 8 samples of a prompt."""


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE without merges: 256 bytes, then the five special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    names = [*sorted(ByteLevel.alphabet()), PAD, EOS, *ROLES]
    return Qwen2Tokenizer(
        vocab={name: index for index, name in enumerate(names)},
        merges=[],
        unk_token=PAD,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def build_model(options: TinyModelOptions, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """Random weights in float32, the vocabulary exactly the tokenizer's."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def build(options: TinyModelOptions, folder: Path, progress: Progress = print_progress) -> None:
    """Trains the model and writes it with tokenizer, generation config and card.json into an existing folder.

    Raises:
        FieldError: this machine lacks the options' device.
    """
    _check_device(options.device)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: three times as fast
    tokenizer = build_tokenizer()
    layout = read_layout(tokenizer)
    with _deterministic(options):
        model = build_model(options, tokenizer).to(options.device)
        cpu_start = time.process_time()
        train(model, layout, options, progress, tokenizer)
        cpu_seconds = time.process_time() - cpu_start
        measured = measure(model, layout, options)
        skilled = {name: measure_skill(model, name, layout, options, tokenizer) for name in options.skills}
    with _without_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps(_card(model, measured, skilled, options), indent=2) + "\n")
    progress(
        options.steps,
        options.steps,
        f"right answers: {measured.sampled:.2f} sampled, {measured.greedy:.2f} greedy; "
        f"{measured.distinct:.1f} different ones in 8 samples; "
        + "".join(
            f"{name}: {found.sampled:.2f} sampled, {found.greedy:.2f} greedy; " for name, found in skilled.items()
        )
        + f"{cpu_seconds:.0f} CPU seconds",
    )


def _check_device(device: Device) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise FieldError("device", "torch finds no CUDA device here. Build the model where there is one, or use cpu.")


def cache(options: TinyModelOptions, data_root: Path, progress: Progress = print_progress) -> Path:
    """The model folder of these options under `data_root`, trained if it is not there."""
    return cached_folder(planned(options, data_root), lambda out: build(options, out, progress))


def read_layout(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The token ids around letters and answer, read from the tokenizer's own rendering of a prompt.

    Training thus sees exactly what verl will feed.
    """
    messages = [{"role": "user", "content": ALPHABET[0]}]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    prompt = tokenizer.encode(text, add_special_tokens=False)
    letters = tokenizer.encode(ALPHABET, add_special_tokens=False)
    place = prompt.index(letters[0])
    return Layout(
        before=tuple(prompt[:place]),
        between=tuple(prompt[place + 1 :]),
        after=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        letters=tuple(letters),
    )


def draw(rng: np.random.Generator, num: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Scrambled letters and one right answer each, both (num, length), as places in the alphabet.

    As in reasoning-gym: independent letters for the half and the middle, mirrored; then a uniform permutation.
    """
    half = rng.integers(len(ALPHABET), size=(num, length // 2))
    middle = rng.integers(len(ALPHABET), size=(num, length % 2))
    answers = np.concatenate([half, middle, half[:, ::-1]], axis=1)
    return rng.permuted(answers, axis=1), answers


def draw_batch(rng: np.random.Generator, layout: Layout, options: TinyModelOptions) -> tuple[Tensor, Tensor]:
    """Input ids and labels, both (B, T), padded on the right; the answer and its end are supervised, nothing else."""
    width = len(layout.before) + len(layout.between) + 2 * options.max_length + 1
    ids = np.full((options.batch_size, width), layout.pad)
    labels = np.full_like(ids, IGNORED)
    lengths = rng.integers(options.min_length, options.max_length + 1, size=options.batch_size)
    flawed = rng.random(options.batch_size) < options.flawed
    for length in np.unique(lengths):
        (rows,) = np.nonzero(lengths == length)
        prompts, answers = draw(rng, len(rows), length)
        answers[flawed[rows]] = rng.permuted(answers[flawed[rows]], axis=1)
        conversation = np.concatenate([render_prompts(prompts, layout), render_answers(answers, layout)], axis=1)
        ids[rows, : conversation.shape[1]] = conversation
        labels[rows, conversation.shape[1] - length - 1 : conversation.shape[1]] = conversation[:, -length - 1 :]
    return torch.from_numpy(ids), torch.from_numpy(labels)


def render_prompts(letters: np.ndarray, layout: Layout) -> np.ndarray:
    """Token ids of the prompts, (num, length) -> (num, length + what the chat template adds)."""
    before, between = (np.tile(part, (len(letters), 1)) for part in (layout.before, layout.between))
    return np.concatenate([before, np.asarray(layout.letters)[letters], between], axis=1)


def render_answers(letters: np.ndarray, layout: Layout) -> np.ndarray:
    """Token ids of the answers with their end, (num, length) -> (num, length + 1)."""
    return np.concatenate([np.asarray(layout.letters)[letters], np.full((len(letters), 1), layout.after)], axis=1)


def draw_skills(
    layout: Layout, options: TinyModelOptions, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Tensor, Tensor]]:
    """Input ids and labels of each step's skill demonstrations, (steps, rows, T) both; one pair per skill."""
    size = options.steps * options.skill_rows
    drawn = (skills.demonstrations(skills.SKILLS[name], size, options.seed) for name in options.skills)
    rendered = (render_items(items, layout, tokenizer) for items in drawn)
    shape = (options.steps, options.skill_rows, -1)
    return [(ids.reshape(shape), labels.reshape(shape)) for ids, labels in rendered]


def render_items(
    items: Sequence[skills.Item], layout: Layout, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Input ids and labels, both (num, T), padded on the right; the answer and its end are supervised."""
    rows = []
    for item in items:
        prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in (item.prompt, item.answer))
        question = [*layout.before, *prompt, *layout.between]
        rows.append((question + answer + [layout.after], [IGNORED] * len(question) + answer + [layout.after]))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [layout.pad] * (width - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])


def train(
    model: Qwen2ForCausalLM,
    layout: Layout,
    options: TinyModelOptions,
    progress: Progress,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Cross-entropy of the answers [nats per token], AdamW, gradient norm at most 1."""
    rng = np.random.default_rng(options.seed)
    beside = draw_skills(layout, options, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options.steps))
    model.train()
    with ThreadPoolExecutor(max_workers=2) as threads:
        for step in range(1, options.steps + 1):
            demonstrations = [(ids[step - 1], labels[step - 1]) for ids, labels in beside]
            halves = zip(*(part.chunk(2) for part in draw_batch(rng, layout, options)), strict=True)
            loss = set_gradients(model, [*halves, *demonstrations], threads)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % math.ceil(options.steps / 10) == 0:
                progress(step, options.steps, f"loss {loss:.3f} nats per answer token")
    model.eval()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Share of the peak rate at `step` = 0, 1, ...: a linear warm-up over the first tenth, then a cosine to 0."""
    warmup = max(num_steps // 10, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(num_steps - warmup, 1))


def set_gradients(model: Qwen2ForCausalLM, parts: Sequence[tuple[Tensor, Tensor]], threads: Executor) -> float:
    """Sets each parameter's `grad` to the gradient of the mean of -log p over all parts' supervised tokens.

    Each part is a task of its own, and their gradients are summed in the parts' order: how many threads work on them
    changes no bit. Padding all parts to the longest would also cost more than a pass for each.

    Args:
        parts: ids and labels of each, (B, T) both.

    Returns:
        That mean [nats].
    """
    parts = [(ids.to(model.device), labels.to(model.device)) for ids, labels in parts]
    total = sum(int(supervised(labels).sum()) for _, labels in parts)
    found = list(threads.map(lambda part: _share_of_loss(model, *part, total), parts))
    for parameter, gradients in zip(model.parameters(), zip(*(grads for _, grads in found), strict=True), strict=True):
        parameter.grad = functools.reduce(torch.add, gradients)
    return sum(loss for loss, _ in found)


def _share_of_loss(
    model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor, total: int
) -> tuple[float, tuple[Tensor, ...]]:
    """What these rows add to the mean over `total` tokens, and its gradient by each parameter."""
    loss = answer_loss(model, ids, labels) * (int(supervised(labels).sum()) / total)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def answer_loss(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean over the supervised tokens of -log p [nats]; logits are made for those tokens only. ids, labels: (B, T)."""
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[supervised(labels)]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[:, 1:][supervised(labels)])


def supervised(labels: Tensor) -> Tensor:
    """Which next tokens are supervised, (B, T) -> (B, T - 1) bool."""
    return labels[:, 1:] != IGNORED


def measure(model: Qwen2ForCausalLM, layout: Layout, options: TinyModelOptions, num_samples: int = 8) -> Measurement:
    """Answers new prompts, equally many of each length, and counts what is right."""
    rng = np.random.default_rng(options.seed + 1)
    lengths = range(options.min_length, options.max_length + 1)
    share = math.ceil(options.measured_prompts / len(lengths))
    sampled, greedy, distinct = [], [], []
    for length in lengths:
        letters, _ = draw(rng, share, length)
        answers = generate(model, np.repeat(letters, num_samples, axis=0), layout, greedy=False)
        right = is_right(answers, np.repeat(letters, num_samples, axis=0), layout)
        sampled.append(right.mean())
        distinct.append(_num_distinct(answers, right, num_samples).mean())
        greedy.append(is_right(generate(model, letters, layout, greedy=True), letters, layout).mean())
    return Measurement(
        sampled=float(np.mean(sampled)), greedy=float(np.mean(greedy)), distinct=float(np.mean(distinct))
    )


def measure_skill(
    model: Qwen2ForCausalLM, name: str, layout: Layout, options: TinyModelOptions, tokenizer: PreTrainedTokenizerBase
) -> SkillMeasurement:
    """Answers test items of a skill, once sampled and once greedily."""
    skill = skills.SKILLS[name]
    groups = defaultdict(list)
    for item in skills.held_out(skill, options.measured_prompts, options.seed):
        groups[len(item.prompt)].append(item)
    right = {False: 0, True: 0}
    for items in groups.values():
        encoded = [tokenizer.encode(item.prompt, add_special_tokens=False) for item in items]
        ids = torch.tensor([[*layout.before, *prompt, *layout.between] for prompt in encoded])
        for greedy in right:
            answers = continued(model, ids, skill.answer_length + 1, greedy=greedy)
            texts = [tokenizer.decode(answer).partition(EOS)[0] for answer in answers]
            right[greedy] += sum(text == item.answer for text, item in zip(texts, items, strict=True))
    return SkillMeasurement(
        sampled=right[False] / options.measured_prompts, greedy=right[True] / options.measured_prompts
    )


def generate(model: Qwen2ForCausalLM, letters: np.ndarray, layout: Layout, *, greedy: bool) -> np.ndarray:
    """Answers of length + 1 tokens, most likely or sampled at temperature 1, (num, length) -> (num, length + 1)."""
    ids = torch.from_numpy(render_prompts(letters, layout))
    return continued(model, ids, letters.shape[1] + 1, greedy=greedy).numpy()


@torch.no_grad()
def continued(model: Qwen2ForCausalLM, ids: Tensor, num_tokens: int, *, greedy: bool) -> Tensor:
    """The next tokens, most likely or sampled at temperature 1, (num, T) -> (num, num_tokens) on the CPU."""
    step, past, found = ids.to(model.device), None, []
    for _ in range(num_tokens):
        output = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        logits, past = output.logits[:, -1], output.past_key_values
        step = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1)
        found.append(step)
    return torch.cat(found, dim=1).cpu()


def is_right(answers: np.ndarray, letters: np.ndarray, layout: Layout) -> np.ndarray:
    """Whether an answer is a palindrome of exactly the prompt's letters and ends there, (num,) bool."""
    text = answers[:, :-1]
    same_letters = np.sort(text, axis=1) == np.sort(np.asarray(layout.letters)[letters], axis=1)
    return (answers[:, -1] == layout.after) & (text == text[:, ::-1]).all(axis=1) & same_letters.all(axis=1)


def _num_distinct(answers: np.ndarray, right: np.ndarray, num_samples: int) -> np.ndarray:
    """Different right answers of each prompt, whose samples are neighbouring rows."""
    groups = zip(answers.reshape(-1, num_samples, answers.shape[1]), right.reshape(-1, num_samples), strict=True)
    return np.array([len({row.tobytes() for row in group[ok]}) for group, ok in groups])


@contextmanager
def _deterministic(options: TinyModelOptions) -> Iterator[None]:
    """Seeds torch and holds each operation to one thread; gives both back afterwards.

    The number of threads in an operation decides its rounding, so a fixed one gives the same weights on any number of
    cores. Two cores are used by working on two parts of a batch at once (set_gradients), which waits once a step for a
    core that another process holds, not once an operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps transformers' own progress bars off the terminal, where the caller shows one of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _card(
    model: Qwen2ForCausalLM,
    measured: Measurement,
    skilled: dict[str, SkillMeasurement],
    options: TinyModelOptions,
) -> dict[str, Any]:
    return {
        "what": "tiny Qwen2 supervised on reasoning-gym's palindromes, prompt: the bare letters",
        "parameters": model.num_parameters(),
        "options": asdict(options),
        "measured": asdict(measured),
        "skills": {name: asdict(found) for name, found in skilled.items()},
        "made_with": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "licence": "Apache-2.0",
    }


def main() -> None:
    """The command line."""
    print(run_builder(TinyModelOptions, "A tiny starting model for palindromes, trained on this CPU.", build))


if __name__ == "__main__":
    main()
