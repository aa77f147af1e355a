"""qwq-quant gptq: Int4 and Int8 checkpoints for vLLM and transformers."""

import time
from dataclasses import replace
from pathlib import Path

import click

from quant.cli import options
from quant.cli.mending import lora_option

MEASURED_TOKENS = 8192
"""Of the calibration text, at most, for measuring where a budget is worth most: dynamic-4bit's."""


class GroupSize(click.ParamType):
    """A number of weights, or -1 for whole rows."""

    name = "group size"

    def convert(self, value, param, ctx):
        try:
            size = int(value)
        except ValueError:
            size = 0
        if size < 1 and size != -1:
            self.fail("a number of weights is needed, or -1 for whole rows", param, ctx)
        return size


@click.command("gptq")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write.",
)
@click.option(
    "--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Bits a weight."
)
@click.option(
    "--group-size",
    type=GroupSize(),
    default=128,
    show_default=True,
    help="Weights that share a scale; -1 for whole rows. vLLM takes 32, 64, 128 and -1.",
)
@click.option(
    "--sym/--asym",
    "symmetric",
    default=True,
    help="Levels on either side of zero alike, or from the least weight to the largest: closer, "
    "but vLLM does not take it. [default: sym]",
)
@click.option(
    "--static-groups/--no-static-groups",
    default=True,
    help="Choose all scales first, then round the weights with the largest inputs first; without "
    "it, from left to right, scales on the way. [default: static]",
)
@click.option(
    "--damp",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="What is added to the inputs' mean square, as a share of it: less trust in the text.",
)
@click.option(
    "--budget",
    type=options.BudgetType(),
    help="Mixed precision: what more bits for some layers, 8 or 16, may cost: a share of the size "
    "without it (10%), bytes (1.5GB), 0 for none, all for a 16-bit copy. The layers are measured "
    "first, on at most 8192 tokens. [default: 0]",
)
@options.calibration_options(seq_len=512, n_tokens=131072)
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
    model, output, bits, group_size, symmetric, static_groups, damp, budget, calibration,
    n_tokens, seq_len, device, base_model, check, dry_run, force, output_format, **where,
):  # fmt: skip
    """Write MODEL as GPTQ integers, calibrated on a text.

    Weights are rounded one column at a time, and the columns that follow make good each one's
    error on the inputs that the calibration text gives. Layer by layer: one is in memory at a time,
    and each sees what the quantized ones before it put out. The folder is in AutoGPTQ's format,
    which vLLM loads, and transformers with optimum and GPTQModel. With --budget the layers that 4
    bits harm most get 8 or 16, which vLLM and GPTQModel load; --dry-run measures too, and prints
    the table.

    \b
    Examples:
      qwq-quant gptq examples/tiny-qwq -o tiny-qwq-Int4 --group-size 64
      qwq-quant gptq examples/tiny-qwq -o tiny-qwq-Int8 --bits 8
      qwq-quant gptq examples/tiny-qwq -o tiny-qwq-mixed --budget 10%
    """
    from quant.architectures import find_architecture
    from quant.budget import NOTHING
    from quant.cli.calibrating import calibration_tokens, planned_run
    from quant.cli.gptq_table import print_plan, print_written
    from quant.folder_needs import folder_estimate, folder_nbytes, works_of_gptq
    from quant.formats.gptq import Gptq
    from quant.gptq_model import plan_gptq
    from quant.lora import merge_notes
    from quant.source import open_checkpoint

    checkpoint = open_checkpoint(model, check_config=find_architecture, **where)
    format = Gptq(int(bits), group_size, symmetric)
    plan = plan_gptq(checkpoint, format, damp, static_groups, budget or NOTHING)
    plan = replace(plan, notes=(*merge_notes(checkpoint.tensors), *plan.notes))
    run = planned_run(
        checkpoint, works_of_gptq(plan, check, min(n_tokens, MEASURED_TOKENS)), output,
        folder_nbytes(plan), calibration, n_tokens, seq_len, device,
    )  # fmt: skip
    run.needs().require()
    if dry_run:
        if plan.budget.needs_choice:
            plan = _spent(plan, calibration, n_tokens, seq_len, device)
        needs = run.needs()
        print_plan(plan, output_format, needs, folder_estimate(run, plan))
        raise click.exceptions.Exit(needs.exit_code)

    from quant.calibration.device import choose_device
    from quant.cli.calibrating import held_out_tokens
    from quant.cli.plan_table import print_note
    from quant.cli.progress import Progress
    from quant.model_folder import check_room
    from quant.write_gptq import N_MODELS, check_gptq, write_gptq
    from quant.write_with_feedback import check_tokens

    check_room(output, plan.nbytes, force)
    device = choose_device(device)
    tokens = calibration_tokens(checkpoint, calibration, n_tokens, seq_len)
    check_tokens(plan, tokens)
    held_out = held_out_tokens(checkpoint) if check else None
    started = time.monotonic()
    if plan.budget.needs_choice:
        plan = _spent(plan, calibration, n_tokens, seq_len, device)
    for note in plan.notes:
        print_note(note, err=True)
    n_layers = plan.groups[-1].layer + 1

    def run_check(plan, folder):
        with Progress("Checking, layers", N_MODELS * n_layers) as bar:
            return check_gptq(plan, folder, held_out, device, bar.advance)

    with Progress("Quantizing, layers", n_layers) as bar:
        written = write_gptq(
            plan,
            tokens,
            output,
            device=device,
            force=force,
            base_model=base_model or (checkpoint.name if checkpoint.revision else None),
            command=options.typed_command(),
            progress=bar.advance,
            check=run_check if check else None,
        )
    print_written(plan, written, time.monotonic() - started, output_format)


def _spent(plan, calibration: Path | None, n_tokens: int, seq_len: int, device: str):
    """The plan with its budget spent on what is measured now."""
    from quant.calibration.device import choose_device
    from quant.calibration.streamed_model import StreamedModel
    from quant.cli.calibrating import calibration_tokens
    from quant.cli.progress import Progress
    from quant.gptq_model import spend_budget
    from quant.measuring.levels import measure_levels, n_steps

    n_tokens = min(n_tokens, MEASURED_TOKENS)
    tokens = calibration_tokens(plan.checkpoint, calibration, n_tokens, seq_len)
    model = StreamedModel(plan.checkpoint, device=choose_device(device))
    with Progress("Measuring, layers", n_steps(plan, model)) as bar:
        return spend_budget(plan, measure_levels(plan, model, tokens.ids, bar.advance))
