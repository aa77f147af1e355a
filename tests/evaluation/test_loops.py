"""Loops: a model made to loop is reported, a good one is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import to_gguf
from safetensors.numpy import save_file

from quant.errors import BadInput, BadRecipe, InputMissing
from quant.evaluation.loops import (
    Prompt,
    answer_prompts,
    examine,
    loop_period,
    prompt_sets,
    read_prompts,
    repeated_share,
    sum_up,
)
from quant.evaluation.questions import Question, ask, final_text, grade, read_questions
from quant.evaluation.runners import open_runner
from quant.recipe import find_profile

LIMIT = 150


# --- texts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([], None),
        ([7] * 63, None),  # too short to be called a loop
        ([7] * 64, 1),
        (list(range(100)), None),
        (list(range(50)) + [1, 2, 3] * 30, 3),
        ([1, 2, 3] * 30 + [4], None),  # it went on
        (list(range(30)) * 4, 30),
        (list(range(30)) * 3 + list(range(29)), None),
        ([*range(100, 170), *list(range(30)) * 3], None),  # three copies
        ([9] * 500 + list(range(40)) * 4, 40),
        ([1, 1, 2] * 40, 3),  # not 1
    ],
)
def test_the_end_of_a_loop_is_found(tokens, period):
    assert loop_period(tokens) == period


def test_a_sequence_without_pattern_is_no_loop():
    assert loop_period(np.random.default_rng(0).integers(0, 3, 4000).tolist()) is None


def test_the_repeated_share():
    assert repeated_share([]) == repeated_share([1, 2, 3]) == repeated_share(range(100)) == 0
    assert repeated_share([5] * 100) == pytest.approx(1 - 1 / 93)
    assert repeated_share([*range(50), *range(50)]) == pytest.approx(43 / 93)


# --- prompts ----------------------------------------------------------------------------------


def test_shipped_prompts_can_be_read():
    assert {"flappy-bird", "short"} <= set(prompt_sets())
    for name in prompt_sets():
        prompts = read_prompts(name)
        assert prompts and len({p.name for p in prompts}) == len(prompts)
    assert "pygame" in read_prompts("flappy-bird")[0].text


@pytest.mark.parametrize(
    "text",
    ["", "prompts = 3", "[[prompts]]\nname = 'a'", "[[prompts]]\nname = 'a'\ntext = 1",
     "[[prompts]]\nname = 'a'\ntext = 'b'\nseed = 1", "prompts = []", "[prompts", "prompts = [1]"],
)  # fmt: skip
def test_a_bad_set_of_prompts(tmp_path, text):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(BadRecipe):
        read_prompts(str(tmp_path / "p.toml"))


def test_a_set_of_prompts_that_is_not_there():
    with pytest.raises(BadRecipe, match="flappy-bird"):
        read_prompts("flapy-bird")
    with pytest.raises(InputMissing):
        read_prompts("./none.toml")


# --- models -----------------------------------------------------------------------------------


def biased(folder: Path, output: Path, text: str, strength: float) -> Path:
    """A copy of the example model that always wants to say `text`.

    The biases of the last layer's values go through its attention unchanged, whatever is read, and
    so are added to the residual stream everywhere: here, along the token's row of the output.
    """
    shutil.copytree(folder, output)
    w = _as_float32(output)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    token = tokenizer["model"]["vocab"][text]
    last = "model.layers.5.self_attn."
    # Two key/value heads serve two query heads each: b = (b0, b1) enters as (b0, b0, b1, b1).
    spread = np.kron(np.eye(2), np.vstack([np.eye(64), np.eye(64)]))  # (256, 128)
    reach = w[f"{last}o_proj.weight"] @ spread  # (hidden, 128)
    row = w["lm_head.weight"][token] * w["model.norm.weight"]
    wanted = strength * row / np.linalg.norm(row)
    w[f"{last}v_proj.bias"] += np.linalg.lstsq(reach, wanted, rcond=None)[0].astype(np.float32)
    save_file(w, output / "model.safetensors", {"format": "pt"})
    return output


def _as_float32(folder: Path) -> dict[str, np.ndarray]:
    """Its weights; numpy knows no bfloat16."""
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = load_torch(folder / "model.safetensors")
    return {name: tensor.to(torch.float32).numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def looping(tiny_qwq, tmp_path_factory):
    folder = tmp_path_factory.mktemp("looping")
    return to_gguf(biased(tiny_qwq, folder / "m", "Ġthe", 400.0), "F32", folder / "m.gguf")


@pytest.fixture(scope="module")
def good(tiny_qwq, tmp_path_factory):
    return to_gguf(tiny_qwq, "Q8_0", tmp_path_factory.mktemp("good") / "m.gguf")


def answers_of(path: Path, profile: str = "qwen-official") -> list:
    settings = find_profile(profile).settings()
    with open_runner(path) as runner:
        return list(answer_prompts(runner, read_prompts("short"), settings, [1, 2], LIMIT))


def test_a_good_model_stops(good):
    answers = answers_of(good)
    report = sum_up(answers, "qwen-official", LIMIT)
    assert report.endless == report.looping == 0 and report.repeated < 0.05
    assert report.n_answers == 10 and report.n_thoughts == 10
    assert 5 < report.thought_median <= report.thought_longest < LIMIT
    assert set(report.by_seed) == {1, 2}
    for seed, of in report.by_seed.items():
        thoughts = [a.thought for a in answers if a.seed == seed]
        assert of["thought_median"] == np.median(thoughts) and len(thoughts) == 5
        assert of["endless"] == of["looping"] == 0 and of["repeated"] < 0.05
    by_name = {a.prompt: final_text(a.text) for a in answers}
    assert by_name["sum"] == "47 + 85 = 132"


def test_a_model_made_to_loop_is_reported(looping):
    report = sum_up(answers_of(looping), "qwen-official", LIMIT)
    assert report.endless == report.looping == 1 and report.repeated > 0.9
    assert report.n_thoughts == 0 and report.thought_median is None


def test_the_same_seed_gives_the_same_answers(good):
    hot = {"temp": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    prompts = [Prompt("a", "What is 3 + 4?")]
    with open_runner(good) as runner:
        first, other, again = (
            next(answer_prompts(runner, prompts, hot, [seed], 20)) for seed in (1, 2, 1)
        )
    assert first == again and first.text != other.text


def test_both_engines_ask_alike(tiny_qwq, good):
    asked = "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    with open_runner(tiny_qwq) as a, open_runner(good) as b:
        assert a.prompts(["What is 3 + 4?"] * 2) == b.prompts(["What is 3 + 4?"] * 2) == 2 * [asked]


def test_a_model_without_a_chat_template_is_given_the_text(tiny_qwq, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_qwq, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with (
        open_runner(folder) as a,
        open_runner(to_gguf(folder, "Q8_0", tmp_path / "m.gguf")) as b,
    ):
        assert a.prompts(["Hello"]) == b.prompts(["Hello"]) == ["Hello"]


def test_thoughts_are_measured_from_where_they_open(good):
    with open_runner(good) as runner:

        def thought(asked: str, answer: str) -> int | None:
            tokens = runner.tokenize(answer, special=True).tolist()
            return examine(runner, "", 0, asked, tokens, True).thought

        n = len(runner.tokenize("one two\n", special=True))
        assert thought("user\n<think>\n", "one two\n</think>\nyes") == n
        assert thought("user\n", "<think>one two\n</think>\nyes") == n + 1
        assert thought("user\n", "one two\n</think>\nyes") is None  # nothing opened it
        assert thought("user\n<think>\n", "one two three") is None  # nothing closes it


# --- questions --------------------------------------------------------------------------------


def test_questions(good, looping, tiny_qwq):
    questions = read_questions(tiny_qwq / "questions.jsonl")
    assert len(questions) == 300
    with open_runner(good) as runner:
        answers = list(ask(runner, questions[:40]))
        assert list(ask(runner, questions[:40], first=38)) == answers[38:]
    report = grade(questions[:40], answers)
    wrong = grade([Question(q.question, "no") for q in questions[:3]], answers[:3])
    assert report.n_questions == 40 and report.n_right >= 36
    assert report.exact_match.value == report.n_right / 40 and wrong.n_right == 0
    with open_runner(looping) as runner:
        lost = grade(questions[:1], list(ask(runner, questions[:1])))
    assert (lost.n_right, lost.n_endless) == (0, 1)


def test_questions_ship_with_the_example(tiny_qwq, texts):
    assert (tiny_qwq / "questions.jsonl").read_bytes() == (texts / "questions.jsonl").read_bytes()


@pytest.mark.parametrize("raw", [b"", b"{", b'{"question": "a"}\n', b"[]\n", b"\xff\n"])
def test_bad_questions(tmp_path, raw):
    (tmp_path / "q.jsonl").write_bytes(raw)
    with pytest.raises(BadInput):
        read_questions(tmp_path / "q.jsonl")


def test_what_stands_behind_the_thought():
    assert final_text("a\n</think>\n\n 3 + 4 = 7\n") == "3 + 4 = 7"
    assert final_text(" 7 ") == "7"
