"""lm-eval's tasks on our runners, against lm-eval's own transformers back end."""

import json
import sys

import numpy as np
import pytest
from evaluation_helpers import to_gguf

from quant.errors import BadInput, Unavailable
from quant.evaluation.answer_file import AnswerFile
from quant.evaluation.lm_eval_bridge import check_tasks, run_tasks
from quant.evaluation.lm_eval_requests import Requests, answer_until, likelihood
from quant.evaluation.runners import open_runner

PROMPT = "<|im_start|>user\nWhat is 33 + 89?<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def runner(tiny_qwq, tmp_path_factory):
    path = to_gguf(tiny_qwq, "F32", tmp_path_factory.mktemp("lm") / "m.gguf")
    with open_runner(path) as runner:
        yield runner


def test_likelihood_of_an_answer(runner):
    context = runner.tokenize(PROMPT, True).tolist()
    right, wrong = (runner.tokenize(t, True).tolist() for t in ("Tens: 30", "Ones: 30"))
    logits = next(runner.logits(np.array([context + right + [0]], np.int32), 0))
    log_p = logits - np.log(np.exp(logits.astype(float)).sum(axis=1, keepdims=True))
    by_hand = sum(log_p[len(context) - 1 + i, t] for i, t in enumerate(right))
    found, greedy = likelihood(runner, context, right)
    assert found == pytest.approx(by_hand, abs=1e-3) and greedy
    worse, greedy = likelihood(runner, context, wrong)
    assert worse < found and not greedy


def test_an_answer_ends_at_a_stop_text(runner):
    prompt = runner.tokenize(PROMPT, True).tolist()
    whole = answer_until(runner, prompt, [], {})
    assert whole.endswith("33 + 89 = 122")
    assert answer_until(runner, prompt, ["</think>", "\nOnes"], {}) == whole.partition("\nOnes")[0]
    assert answer_until(runner, prompt, [], {"max_gen_toks": 2}) != ""
    assert len(answer_until(runner, prompt, [], {"max_gen_toks": 2})) < 12


# --- with lm-eval -----------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path):
    """A choice, an answer and a document, from a file."""
    pytest.importorskip("lm_eval", reason='lm-eval is an extra: pip install -e ".[eval]"')
    docs = [
        {"question": f"What is {a} + {b}?", "choices": [f"{a + b}", f"{a + b + 1}"], "gold": 0}
        for a, b in ((3, 4), (12, 30), (33, 89), (47, 85))
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",
    }
    asked = "<|im_start|>user\n{{question}}<|im_end|>\n<|im_start|>assistant\n"
    think = "<think>\n\n</think>\n\n{{question[8:-1]}} = "
    choice = {
        "task": "choice", "output_type": "multiple_choice", "doc_to_text": asked + think,
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
    }  # fmt: skip
    answer = {
        "task": "answer", "output_type": "generate_until", "doc_to_text": asked + "<think>\n",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 80},
        "filter_list": [{"name": "last", "filter": [
            {"function": "regex", "regex_pattern": r"= (\d+)$"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    document = {
        "task": "document", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    return [{**common, **task} for task in (choice, answer, document)]


def test_tasks_agree_with_lm_evals_own_model(runner, tasks, tiny_qwq):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    ours = run_tasks(runner, tasks, None)
    theirs = lm_eval.simple_evaluate(
        HFLM(str(tiny_qwq), dtype="float32", device="cpu"), tasks=tasks, bootstrap_iters=0
    )["results"]
    assert ours["choice"]["acc"]["value"] == theirs["choice"]["acc,none"]
    assert ours["choice"]["acc"]["n"] == 4
    assert ours["answer"]["exact_match, last"]["value"] == 1.0
    assert theirs["answer"]["exact_match,last"] == 1.0
    perplexity = theirs["document"]["word_perplexity,none"]
    assert ours["document"]["word_perplexity"]["value"] == pytest.approx(perplexity, rel=1e-3)


def test_the_limit(runner, tasks):
    assert run_tasks(runner, tasks[:1], 2)["choice"]["acc"]["n"] == 2


def test_what_was_answered_before_is_not_asked_again(runner, tasks, tmp_path):
    """A run that was killed after five requests; then one that has all of them."""
    path, whole, n_asked = tmp_path / "answers.jsonl", run_tasks(runner, tasks, None), []
    for keep in (0, 5, None):
        if path.exists():
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:keep]))
        said = []
        with AnswerFile(path) as file:
            requests = Requests(file, lambda *message, said=said: said.append(message))
            assert run_tasks(runner, tasks, None, requests=requests) == whole
        n_asked.append(said.count(("advance", 1)))
        assert (
            sum(total for kind, *rest in said if kind == "begin" for total in rest[1:])
            == (n_asked[-1])
        )
    assert n_asked == [16, 11, 0]  # 4 of 2 choices each, 4 answers, 4 documents


def test_an_unknown_task(runner, tasks):
    with pytest.raises(BadInput, match="gsm8k"):
        check_tasks(["mmlu", "gsm8kk"])
    with pytest.raises(BadInput, match="cannot run"):
        run_tasks(runner, ["no-such-task"], None)


def test_what_a_model_writes_is_run_only_where_that_is_allowed(runner, tasks):
    (task,) = ({**task, "unsafe_code": True} for task in tasks[:1])
    with pytest.raises(BadInput, match="--run-code"):
        run_tasks(runner, [task], 1)
    assert run_tasks(runner, [task], 1, run_code=True)["choice"]["acc"]["n"] == 1


def test_without_lm_eval(runner, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    for run in (lambda: check_tasks(["gsm8k"]), lambda: run_tasks(runner, ["gsm8k"], None)):
        with pytest.raises(Unavailable, match="qwq-quant"):
            run()
