"""qwq-quant doctor: known defects of a model, with evidence."""

import json

import click

from quant.cli import options


@click.command("doctor")
@click.argument("model")
@click.option(
    "--recipe", metavar="NAME|FILE", help="What to expect. [default: by the model's name]"
)
@click.option(
    "--deep",
    is_flag=True,
    help="Also read every weight (NaN, rows of zeros), and compare token ids of the real llama.cpp "
    "with those of transformers.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings, too.")
@options.output_format
@options.model_options
@options.debug
def command(model, recipe, deep, strict, output_format, **where):
    """Find known defects of MODEL, with evidence, and say how each is mended.

    Pad and end tokens, chat template, rotary settings, sampling settings, shards and types; in a
    .gguf file, what llama.cpp would silently ignore or apply twice. The chat template is rendered
    in a process with limits on time, memory and files. Quantized folders are examined too; a model
    on the hub is downloaded first. Nothing is changed: see qwq-quant fix.

    An error makes answers wrong or endless, a warning hurts in some common use, a note is worth
    knowing. Exit code: 0, or 1 for an error, or with --strict for a warning.

    \b
    Examples:
      qwq-quant doctor examples/tiny-qwq
      qwq-quant doctor Qwen/QwQ-32B --strict --format json
      qwq-quant doctor model.gguf --recipe qwq-32b --deep
    """
    from quant.doctor.checks import examine
    from quant.doctor.opening import open_to_examine
    from quant.recipe import choose_recipe

    source = open_to_examine(model, **where)
    report = examine(source, choose_recipe(source, recipe), deep)
    if output_format == "json":
        click.echo(json.dumps(report.as_json(), indent=1))
    else:
        from quant.cli.findings import print_report

        print_report(report)
    return 1 if report.of("error", *(["warning"] if strict else [])) else 0
