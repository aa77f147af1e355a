"""qwq-quant kv-calibrate: the centre and range of every channel of K, for the int8 KV cache."""

import time
from dataclasses import replace

import click

from quant.cli import options


@click.command("kv-calibrate")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=options.Output(),
    help="File to write (safetensors), a few hundred kB.",
)
@options.calibration_options(seq_len=512, n_tokens=16384)
@options.dry_run
@options.force
@options.resume
@options.model_options
@options.debug
def command(model, output, calibration, n_tokens, seq_len, device, dry_run, force, resume, **where):
    """Measure how MODEL's keys lie in each channel, for Int8Cache(config, scales=...).

    Runs the checkpoint over a text, one decoder layer in memory at a time. Models with key biases
    (Qwen2, Qwen2.5, QwQ) need the file; it costs the cache neither bytes nor time, and a poor text
    costs accuracy, never correctness.

    \b
    Example:
      qwq-quant kv-calibrate examples/tiny-qwq -o kv-scales.safetensors
    \b
    Then, in Python:
      cache = Int8Cache(model.config, scales="kv-scales.safetensors")
      model.generate(**inputs, past_key_values=cache)
    """
    from quant.architectures import find_architecture
    from quant.calibration.needs import KV_SCALES, numbers_nbytes
    from quant.cli.calibrating import planned_run, preflight
    from quant.cli.progress import Progress
    from quant.display import printable
    from quant.journal import interrupted_job
    from quant.kv_cache.calibrate import check_scales_output, measure_kv_scales
    from quant.kv_cache.scales import encode_scales
    from quant.source import open_checkpoint, source_files
    from quant.texts import built_in_texts, read_texts

    checkpoint = open_checkpoint(model, check_config=find_architecture, **where)
    sources = source_files(checkpoint)

    def check() -> None:
        check_scales_output(output, force=force, sources=sources)

    if interrupted_job(output) is None:  # else it may have written the output itself
        check()
    run = planned_run(
        checkpoint, [KV_SCALES], output, numbers_nbytes(checkpoint),
        calibration, n_tokens, seq_len, device, saves=resume != "never",
    )  # fmt: skip
    preflight(run, dry_run)
    texts = built_in_texts() if calibration is None else read_texts(calibration)
    started = time.monotonic()

    from quant.calibration.computed import what_decides, write_computed
    from quant.calibration.device import choose_device
    from quant.calibration.streamed_model import StreamedModel
    from quant.calibration.tokens import cut_tokens
    from quant.cli.resuming import resuming

    model = StreamedModel(checkpoint, device=choose_device(device))
    tokens = cut_tokens(checkpoint, texts, n_tokens, seq_len)

    def compute(passes) -> tuple[bytes, str]:
        scales = measure_kv_scales(
            model, tokens, lambda n_done: bar.advance(n_done - bar.done), passes
        )
        return encode_scales(scales), (
            f"{len(scales.layers)} layers seen by {tokens.n_tokens} tokens of "
            f"{printable(texts.name)}"
        )

    decides = what_decides(model, tokens, command="kv-calibrate")
    with Progress("Layers", model.n_layers) as bar, resuming(resume, "layer") as how:
        how = replace(how, command=options.typed_command())
        said = write_computed(output, decides, how, model, model.n_layers, compute, check)
    click.echo(f"{printable(output)}  {said}, in {time.monotonic() - started:.1f} s.")
