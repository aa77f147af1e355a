"""What dynamic-4bit and gptq take: measuring, writing the folder, checking it."""

from collections.abc import Collection
from dataclasses import replace

from quant.calibration.needs import FEEDBACK, GRADIENT, LayerwiseRun, Work, of_check, of_metrics
from quant.checkpoint import Checkpoint
from quant.dynamic_4bit import Plan4bit
from quant.estimates import (
    Estimate,
    core_speed,
    encoding_seconds,
    reading_seconds,
    storing_seconds,
    writing_seconds,
)
from quant.gptq_model import GptqPlan
from quant.source import source_files

N_CHECKED, CHECKED_TOKENS = 3, 8192
"""Models that are run to check a folder, and tokens of the held-out text."""

SEARCHED_A_SECOND, PLAIN_A_SECOND = 1.5e8, 8e8
"""Weights to NF4 on a core of the machine of benchmarks/nf4.csv."""

GRID_A_SECOND = 5e7
"""Weights to GPTQ's grids, on such a core."""

LARGEST_SMALL_FILE = 100_000_000
"""A tokenizer, at most; it goes along."""


def works_of_4bit(plan: Plan4bit, metrics: Collection[str], feedback: bool, check: bool):
    """What dynamic-4bit runs the model for. metrics: what is measured first, if anything."""
    works = of_metrics(metrics, plan.checkpoint) if metrics else []
    works += [FEEDBACK] if feedback else []
    return works + ([of_check(N_CHECKED, CHECKED_TOKENS)] if check else [])


def works_of_gptq(plan: GptqPlan, check: bool, measured_tokens: int) -> list[Work]:
    """What gptq runs the model for: each number of bits that a budget may buy is measured."""
    measured = replace(GRADIENT, n_tokens=measured_tokens, rounded_a_second=GRID_A_SECOND)
    works = [measured] * (len(plan.ladder) - 1) if plan.budget.needs_choice else []
    works += [FEEDBACK] if plan.quantized else []
    return works + ([of_check(N_CHECKED, CHECKED_TOKENS)] if check else [])


def folder_nbytes(plan: Plan4bit | GptqPlan) -> int:
    """Bytes of the folder, at most: its weights when the budget is spent, and small files."""
    return plan.levels.most_nbytes(plan.budget) + _small_files(plan.checkpoint)


def _small_files(checkpoint: Checkpoint) -> int:
    sizes = [path.stat().st_size for path in checkpoint.folder.iterdir() if path.is_file()]
    return sum(size for size in sizes if size <= LARGEST_SMALL_FILE)


def folder_estimate(run: LayerwiseRun, plan: Plan4bit | GptqPlan) -> Estimate:
    """How long all of it takes: the run of the model, and writing the folder."""
    files, speed = source_files(plan.checkpoint), core_speed()
    busy = reading_seconds(files, sum(path.stat().st_size for path in files))
    busy += storing_seconds(run.nbytes, speed)
    if isinstance(plan, Plan4bit) and not plan.feedback:
        rate = SEARCHED_A_SECOND if plan.format.search_scales else PLAIN_A_SECOND
        n = sum(group_nbytes for _, group_nbytes in plan.group_sizes) // 2
        busy += encoding_seconds([(n, rate)], speed)
    return run.estimate(max(busy, writing_seconds(run.output.absolute().parent, run.nbytes)))
