"""qwq-quant imatrix: which input columns of every weight matter, as llama.cpp's imatrix file."""

import time
from dataclasses import replace

import click

from quant.cli import options
from quant.cli.mending import lora_option


@click.command("imatrix")
@click.argument("model")
@click.option("-o", "--output", required=True, type=options.Output(), help="File to write (GGUF).")
@options.calibration_options(seq_len=512, n_tokens=65536)
@lora_option
@options.dry_run
@options.force
@options.resume
@options.model_options
@options.debug
def command(
    model, output, calibration, n_tokens, seq_len, device, dry_run, force, resume, revision, token,
    cache_dir, offline, lora,
):  # fmt: skip
    """Compute the importance matrix of MODEL, for to-gguf --imatrix and llama-quantize.

    Runs the checkpoint over a text, one decoder layer in memory at a time, and needs no 16-bit GGUF
    file first. The file is of llama-imatrix's format, without routers: they are never quantized.
    After an interruption, the same command goes on.

    \b
    Example:
      qwq-quant imatrix examples/tiny-qwq -o imatrix.gguf --tokens 8192
      qwq-quant to-gguf examples/tiny-qwq -o tiny.gguf --type IQ2_M \\
          --imatrix imatrix.gguf
    """
    from quant.architectures import find_architecture
    from quant.calibration.needs import IMPORTANCE, numbers_nbytes
    from quant.cli.calibrating import planned_run, preflight
    from quant.cli.plan_table import print_note
    from quant.cli.progress import Progress
    from quant.display import printable
    from quant.journal import interrupted_job
    from quant.lora import merge_notes
    from quant.output_file import check_output_file
    from quant.source import open_checkpoint, source_files
    from quant.texts import built_in_texts, read_texts

    checkpoint = open_checkpoint(
        model,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        lora=lora,
        check_config=find_architecture,
    )
    sources = source_files(checkpoint)

    def check() -> None:
        check_output_file(
            output, force=force, sources=sources, starts_with=b"GGUF", kind="GGUF file"
        )

    if interrupted_job(output) is None:  # else it may have written the output itself
        check()
    run = planned_run(
        checkpoint, [IMPORTANCE], output, numbers_nbytes(checkpoint),
        calibration, n_tokens, seq_len, device, saves=resume != "never",
    )  # fmt: skip
    preflight(run, dry_run)
    for note in merge_notes(checkpoint.tensors):
        print_note(note, err=True)
    texts = built_in_texts() if calibration is None else read_texts(calibration)
    started = time.monotonic()

    from quant.calibration.computed import what_decides, write_computed
    from quant.calibration.device import choose_device
    from quant.calibration.streamed_model import StreamedModel
    from quant.calibration.tokens import cut_tokens
    from quant.cli.resuming import resuming
    from quant.imatrix import measure_importance
    from quant.importance import encode_importance

    model = StreamedModel(checkpoint, device=choose_device(device))
    tokens = cut_tokens(checkpoint, texts, n_tokens, seq_len)

    def compute(passes) -> tuple[bytes, str]:
        squares, counts = measure_importance(
            model, tokens, lambda n_done: bar.advance(n_done - bar.done), passes
        )
        data = encode_importance(output, squares, counts, seq_len, len(tokens.ids), [texts.name])
        return data, (
            f"{len(squares)} weights seen by {tokens.n_tokens} tokens of {printable(texts.name)}"
        )

    decides = what_decides(model, tokens, command="imatrix")
    with Progress("Layers", model.n_layers) as bar, resuming(resume, "layer") as how:
        how = replace(how, command=options.typed_command())
        said = write_computed(output, decides, how, model, model.n_layers, compute, check)
    click.echo(f"{printable(output)}  {said}, in {time.monotonic() - started:.1f} s.")
