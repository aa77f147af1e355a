"""qwq-quant gptq: Int4 and Int8 checkpoints for vLLM and transformers."""

import time
from pathlib import Path

import click

from quant.cli import options


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
    type=click.FloatRange(min=0, max=1),
    default=0.01,
    show_default=True,
    help="What is added to the inputs' mean square, as a share of it: less trust in the text.",
)
@options.calibration_options(seq_len=512, n_tokens=131072)
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
    model, output, bits, group_size, symmetric, static_groups, damp, calibration, n_tokens,
    seq_len, device, base_model, check, dry_run, force, output_format, **where,
):  # fmt: skip
    """Write MODEL as GPTQ integers, calibrated on a text.

    Weights are rounded one column at a time, and the columns that follow make good each one's
    error on the inputs that the calibration text gives. Layer by layer: one is in memory at a time,
    and each sees what the quantized ones before it put out. The folder is in AutoGPTQ's format,
    which vLLM loads, and transformers with optimum and GPTQModel.

    \b
    Examples:
      qwq-quant gptq examples/tiny-qwq -o tiny-qwq-Int4 --group-size 64
      qwq-quant gptq examples/tiny-qwq -o tiny-qwq-Int8 --bits 8
    """
    from quant.architectures import find_architecture
    from quant.cli.gptq_table import print_plan, print_written
    from quant.formats.gptq import Gptq
    from quant.gptq_model import plan_gptq
    from quant.source import open_checkpoint

    checkpoint = open_checkpoint(model, check_config=find_architecture, **where)
    format = Gptq(int(bits), group_size, symmetric)
    plan = plan_gptq(checkpoint, format, damp, static_groups)
    if dry_run:
        print_plan(plan, output_format)
        return

    from quant.calibration.device import choose_device
    from quant.calibration.tokens import cut_tokens
    from quant.cli.plan_table import print_note
    from quant.cli.progress import Progress
    from quant.model_folder import check_room
    from quant.texts import built_in_texts, held_out_texts, read_texts
    from quant.write_gptq import N_MODELS, check_gptq, check_tokens, write_gptq

    check_room(output, plan.nbytes, force)
    device = choose_device(device)
    texts = built_in_texts() if calibration is None else read_texts(calibration)
    tokens = cut_tokens(checkpoint, texts, n_tokens, seq_len)
    check_tokens(plan, tokens)
    held_out = cut_tokens(checkpoint, held_out_texts(), 8192, min(seq_len, 256)) if check else None
    for note in plan.notes:
        print_note(note, err=True)
    started = time.monotonic()
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
