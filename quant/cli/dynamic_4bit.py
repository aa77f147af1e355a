"""qwq-quant dynamic-4bit: a bitsandbytes folder whose sensitive layers stay 16-bit."""

import time
from dataclasses import replace
from pathlib import Path

import click

from quant.cli import options
from quant.cli.mending import mend, mending_options

FOR_THE_FIGURES = {"weight", "activation"}
"""Measured besides the metric that chooses; they cost next to nothing."""


@click.command("dynamic-4bit")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write.",
)
@click.option(
    "--budget",
    type=options.BudgetType(),
    help="What keeping layers in 16 bits may cost: a share of plain 4-bit's size (10%), bytes "
    "(1.5GB), 0 for plain 4-bit, all for a 16-bit copy. [default: 10%]",
)
@click.option(
    "--target-bpw",
    type=click.FloatRange(min=0, min_open=True),
    help="Instead of --budget: bits per weight of the decoder's linear layers. Plain 4-bit has "
    "4.13.",
)
@click.option(
    "--metric",
    type=click.Choice(options.METRICS),
    default="gradient",
    show_default=True,
    help="What damage is measured by; see `qwq-quant measure --help`.",
)
@click.option(
    "--sensitivity",
    type=click.Path(path_type=Path),
    help="What `qwq-quant measure` wrote; without it, MODEL is measured now.",
)
@options.format_4bit_options
@options.calibration_options(seq_len=256, n_tokens=8192)
@mending_options
@click.option("--base-model", help="org/name of MODEL on the hub, for the model card.")
@click.option(
    "--check/--no-check",
    default=True,
    help="Measure at the end, on a built-in text, what was lost. [default: check]",
)
@options.dry_run
@options.force
@options.output_format
@options.model_options
@options.debug
def command(
    model, output, budget, target_bpw, metric, sensitivity, quant_type, double_quant,
    search_scales, calibration, n_tokens, seq_len, device, recipe, fix, base_model, check, dry_run,
    force, output_format, **where,
):  # fmt: skip
    """Write MODEL in 4 bits (bitsandbytes), its sensitive layers in 16.

    Measures what 4 bits do to each layer, keeps those in 16 bits whose damage is worth most within
    the budget, and writes a folder that transformers, PEFT and vLLM load: weights, the list of
    exceptions in the one form that all of them read alike, figures, a model card. One decoder layer
    is in memory at a time. --dry-run measures too, and prints the table.

    \b
    Examples:
      qwq-quant dynamic-4bit examples/tiny-qwq -o tiny-qwq-4bit
      qwq-quant dynamic-4bit examples/tiny-qwq -o plain --budget 0
      qwq-quant dynamic-4bit examples/tiny-qwq -o small --target-bpw 4.8 --dry-run
    """
    from quant.architectures import find_architecture
    from quant.cli.measuring import prepared_check, run_measurement
    from quant.cli.plan_4bit import print_plan, print_written
    from quant.cli.plan_table import print_note
    from quant.cli.progress import Progress
    from quant.dynamic_4bit import plan_4bit, plan_plain
    from quant.formats.nf4 import Bnb4bit
    from quant.sensitivity import read_sensitivity
    from quant.source import open_checkpoint
    from quant.write_4bit import check_output, write_4bit

    budget = _budget(budget, target_bpw)
    mended = mend(open_checkpoint(model, check_config=find_architecture, **where), recipe, fix)
    checkpoint = mended.source
    started = time.monotonic()
    format = Bnb4bit(quant_type, double_quant, search_scales=search_scales)
    plain, measured, run_check = plan_plain(checkpoint, format, budget), None, None
    if not dry_run:
        check_output(plain, output, force)
        if check:
            run_check = prepared_check(checkpoint, n_tokens, seq_len, device)
    if sensitivity is not None:
        measured = read_sensitivity(sensitivity)
    elif budget.needs_choice:
        metrics = {metric, *FOR_THE_FIGURES}
        measured = run_measurement(
            checkpoint, format, metrics, calibration, n_tokens, seq_len, device
        )
    plan = plan_4bit(checkpoint, format, budget, measured, metric)
    plan = replace(plan, notes=(*mended.notes, *plan.notes))
    if dry_run:
        print_plan(plan, output_format)
        return
    for note in plan.notes:
        print_note(note, err=True)
    with Progress("Writing, weights", plan.n_weights) as bar:
        written = write_4bit(
            plan,
            output,
            force=force,
            base_model=base_model or (checkpoint.name if checkpoint.revision else None),
            command=options.typed_command(),
            progress=bar.advance,
            check=run_check,
        )
    print_written(plan, written, time.monotonic() - started, output_format)


def _budget(budget, target_bpw: float | None):
    """The one that was given. Raises UsageError for both."""
    from quant.dynamic_4bit import DEFAULT_BUDGET, Budget
    from quant.errors import UsageError

    if budget is not None and target_bpw is not None:
        raise UsageError(
            "--budget and --target-bpw say the same thing in two ways.", "", "Give one of them."
        )
    if target_bpw is not None:
        return Budget("bits_per_weight", target_bpw)
    return budget or DEFAULT_BUDGET
