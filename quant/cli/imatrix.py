"""qwq-quant imatrix: which input columns of every weight matter, as llama.cpp's imatrix file."""

import time

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
@options.model_options
@options.debug
def command(
    model, output, calibration, n_tokens, seq_len, device, dry_run, force, revision, token,
    cache_dir, offline, lora,
):  # fmt: skip
    """Compute the importance matrix of MODEL, for to-gguf --imatrix and llama-quantize.

    Runs the checkpoint over a text, one decoder layer in memory at a time, and needs no 16-bit GGUF
    file first. The file is what llama-imatrix writes.

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
    check_output_file(
        output, force=force, sources=source_files(checkpoint), starts_with=b"GGUF", kind="GGUF file"
    )
    run = planned_run(
        checkpoint, [IMPORTANCE], output, numbers_nbytes(checkpoint),
        calibration, n_tokens, seq_len, device,
    )  # fmt: skip
    preflight(run, dry_run)
    for note in merge_notes(checkpoint.tensors):
        print_note(note, err=True)
    texts = built_in_texts() if calibration is None else read_texts(calibration)
    started = time.monotonic()

    from quant.calibration.device import choose_device
    from quant.calibration.streamed_model import StreamedModel
    from quant.calibration.tokens import cut_tokens
    from quant.imatrix import measure_importance
    from quant.importance import write_importance

    streamed = StreamedModel(checkpoint, device=choose_device(device))
    tokens = cut_tokens(checkpoint, texts, n_tokens, seq_len)
    with Progress("Layers", streamed.n_layers) as bar:
        squares, counts = measure_importance(streamed, tokens, lambda _: bar.advance())
    n_chunks = len(tokens.ids)
    write_importance(output, squares, counts, seq_len, n_chunks, [texts.name])
    click.echo(
        f"{printable(output)}  {len(squares)} weights seen by {tokens.n_tokens} tokens of "
        f"{printable(texts.name)}, in {time.monotonic() - started:.1f} s."
    )
