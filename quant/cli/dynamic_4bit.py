"""qwq-quant dynamic-4bit: a bitsandbytes folder whose sensitive layers stay 16-bit."""

import time
from dataclasses import replace
from pathlib import Path

import click

from quant.cli import options
from quant.cli.mending import lora_option, mend, mending_options

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
    type=options.BitsPerWeight(),
    help="Instead of --budget: bits per weight of the decoder's linear layers. Plain 4-bit has "
    "4.13 in large models.",
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
@click.option(
    "--gptq",
    is_flag=True,
    help="Error feedback: the weights after one that was rounded make good its error on the "
    "calibration text. Same format and size, closer outputs; slow without a GPU. --tokens must be "
    "at least the widest layer's inputs, better four times as many: 110000 for a 32B model.",
)
@options.calibration_options(seq_len=256, n_tokens=8192)
@mending_options
@lora_option
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
    search_scales, gptq, calibration, n_tokens, seq_len, device, recipe, fix, base_model, check,
    dry_run, force, output_format, **where,
):  # fmt: skip
    """Write MODEL in 4 bits (bitsandbytes), its sensitive layers in 16.

    Measures what 4 bits do to each layer, keeps those in 16 bits whose damage is worth most within
    the budget, and writes a folder that transformers, PEFT and vLLM load: weights, the list of
    exceptions in the one form that all of them read alike, figures, a model card. One decoder layer
    is in memory at a time. --dry-run measures too, and prints the table.

    \b
    Examples:
      qwq-quant dynamic-4bit examples/tiny-qwq -o tiny-qwq-4bit
      qwq-quant dynamic-4bit examples/tiny-qwq -o tiny-qwq-4bit --gptq
      qwq-quant dynamic-4bit examples/tiny-qwq -o plain --budget 0
      qwq-quant dynamic-4bit examples/tiny-qwq -o small --target-bpw 4.8 --dry-run
    """
    from quant.architectures import find_architecture
    from quant.cli.calibrating import planned_run
    from quant.cli.measuring import prepared_check, run_measurement
    from quant.cli.plan_4bit import print_plan, print_written
    from quant.cli.plan_table import print_note
    from quant.dynamic_4bit import plan_4bit, plan_plain
    from quant.errors import UsageError
    from quant.folder_needs import folder_estimate, folder_nbytes, works_of_4bit
    from quant.formats.nf4 import Bnb4bit
    from quant.sensitivity import read_sensitivity
    from quant.source import open_checkpoint
    from quant.write_4bit import check_output, write_4bit

    budget = _budget(budget, target_bpw)
    gptq = gptq and budget.unit != "all"  # a 16-bit copy has no errors
    mended = mend(open_checkpoint(model, check_config=find_architecture, **where), recipe, fix)
    checkpoint = mended.source
    started = time.monotonic()
    format = Bnb4bit(quant_type, double_quant, search_scales=search_scales)
    plain, measured, run_check = plan_plain(checkpoint, format, budget), None, None
    metrics = {metric, *FOR_THE_FIGURES} if sensitivity is None and budget.needs_choice else ()
    run = planned_run(
        checkpoint, works_of_4bit(plain, metrics, gptq, check), output, folder_nbytes(plain),
        calibration, n_tokens, seq_len, device,
    )  # fmt: skip
    run.needs().require()
    if not dry_run:
        check_output(plain, output, force)
        if check:
            run_check = prepared_check(checkpoint, device)
    feedback = _feedback(plain, calibration, n_tokens, seq_len, device) if gptq else {}
    if sensitivity is not None:
        if calibration is not None and not gptq:
            raise UsageError(
                "--calibration would not be used: --sensitivity says what was measured.",
                "",
                "Leave one of them out.",
            )
        measured = read_sensitivity(sensitivity)
    elif metrics:
        measured = run_measurement(
            checkpoint, format, metrics, calibration, n_tokens, seq_len, device
        )
    plan = plan_4bit(checkpoint, format, budget, measured, metric)
    plan = replace(plan, notes=(*mended.notes, *plan.notes), feedback=gptq)
    if dry_run:
        needs = run.needs()
        print_plan(plan, output_format, needs, folder_estimate(run, plan))
        raise click.exceptions.Exit(needs.exit_code)
    for note in plan.notes:
        print_note(note, err=True)
    with _progress(plan) as bar:
        written = write_4bit(
            plan,
            output,
            **feedback,
            force=force,
            base_model=base_model or (checkpoint.name if checkpoint.revision else None),
            command=options.typed_command(),
            progress=bar.advance,
            check=run_check,
        )
    print_written(plan, written, time.monotonic() - started, output_format)


def _feedback(plain, calibration: Path | None, n_tokens: int, seq_len: int, device: str) -> dict:
    """What error feedback needs: tokens, and a device to run the model on."""
    from quant.calibration.device import choose_device
    from quant.cli.calibrating import calibration_tokens
    from quant.write_with_feedback import check_tokens

    tokens = calibration_tokens(plain.checkpoint, calibration, n_tokens, seq_len)
    check_tokens(plain, tokens)
    return {"tokens": tokens, "device": choose_device(device)}


def _progress(plan):
    """A bar of what write_4bit counts."""
    from quant.cli.progress import Progress

    if plan.feedback:
        return Progress("Quantizing, layers", plan.groups[-1].layer + 1)
    return Progress("Writing, weights", plan.n_weights)


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
