"""lm-eval's tasks on our runners: MMLU, C-Eval, GSM8K and whatever else it has.

    likelihood tasks   ln p of an answer's tokens after a question's (multiple choice)
    generation tasks   an answer drawn up to a stop text (GSM8K)

lm-eval downloads the tasks' data from the hub. Tasks that run the model's programs (HumanEval) are
refused unless they are allowed: that is code which nobody has read.
# ref: lm-evaluation-harness, lm_eval/api/model.py; docs/model_guide.md
"""

import os
from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np

from quant.display import printable
from quant.errors import BadInput, Unavailable
from quant.evaluation.lm_eval_requests import Requests
from quant.evaluation.runners import Runner


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise Unavailable without lm-eval, BadInput for a task it does not know."""
    known = set(_lm_eval().tasks.TaskManager().all_tasks)
    for task in tasks:
        if task not in known:
            near = get_close_matches(task, known, 1)
            raise BadInput(
                f'lm-eval knows no task "{printable(task)}".',
                f"Did you mean {near[0]}?" if near else "",
                "Print the names it knows: lm-eval ls tasks",
            )


def _lm_eval():
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise Unavailable(
            "lm-eval is not installed, so its tasks cannot be run.",
            f"{printable(error)}.",
            'pip install "qwq-quant[eval]"',
        ) from error
    return lm_eval


def run_tasks(
    runner: Runner,
    tasks: Sequence[str | dict],
    limit: int | None,
    run_code: bool = False,
    requests: Requests | None = None,
) -> dict[str, dict[str, dict]]:
    """Task -> figure -> {"value", "error", "n"}. tasks: lm-eval's names, or its configurations.

    limit: questions of each. run_code: programs that the model writes may run, unconfined.
    requests: what was answered before. Raises Unavailable without lm-eval or its data, BadInput for
    an unknown task, or for one that runs programs where they may not.
    """
    lm_eval = _lm_eval()
    from quant.evaluation.lm_eval_model import RunnerModel

    # A folder computes otherwise once it has begun to answer: figures must not hang on the order.
    runner.begin(np.array(runner.eos[:1] or [0], np.int32), 1)
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric itself asks for
    try:
        found = lm_eval.simple_evaluate(
            RunnerModel(runner, requests or Requests()), tasks=list(tasks), limit=limit,
            bootstrap_iters=0, log_samples=False, confirm_run_unsafe_code=run_code,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:
        raise Unavailable(
            "The data of a task cannot be had.",
            f"{type(error).__name__}: {printable(error)}.",
            "Run once with a network; what it downloads is kept.",
        ) from error
    except (ValueError, KeyError) as error:
        runs_code = "unsafe" in str(error)
        raise BadInput(
            "lm-eval cannot run these tasks.",
            f"{type(error).__name__}: {printable(error)}.",
            "They run programs that the model writes. If that may be: --run-code"
            if runs_code
            else "Print the names it knows: lm-eval ls tasks",
        ) from error
    counts = found["n-samples"]
    return {
        task: _figures(figures, counts.get(task, {}).get("effective"))
        for task, figures in found["results"].items()
    }


def _figures(figures: dict, n: int | None) -> dict[str, dict]:
    """lm-eval's {"acc,none": 0.3, "acc_stderr,none": 0.01} as {"acc": {...}}."""
    answer = {}
    for key, value in figures.items():
        name, _, variant = key.partition(",")
        if not isinstance(value, float | int) or name.endswith("_stderr") or not variant:
            continue
        error = figures.get(f"{name}_stderr,{variant}")
        shown = name if variant == "none" else f"{name}, {variant}"
        answer[shown] = {
            "value": float(value),
            "error": error if isinstance(error, float) else None,
            "n": n,
        }
    return answer
