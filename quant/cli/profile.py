"""qwq-quant profile: how fast a model generates here, and how much memory it takes."""

import time
from pathlib import Path

import click

from quant.cli import options


class Numbers(click.ParamType):
    """Whole numbers above 0, with commas between: 512,1024."""

    name = "n,n,..."

    def __init__(self, least: int):
        self.least = least

    def convert(self, value, param, ctx):
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < self.least or max(numbers) > 10**7:
            from quant.display import printable

            self.fail(
                f"{printable(value)} is no list of numbers from {self.least} on; write for example "
                "512,1024",
                param,
                ctx,
            )
        return numbers


@click.command("profile")
@click.argument("model")
@click.argument("quantized", nargs=-1)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the figure and the CSV; it is made if it is not there.",
)
@click.option(
    "--lengths",
    type=Numbers(least=2),
    help="Tokens to generate. [default: 512,1024,2048,4096,8192 on CUDA; 32,128 on a CPU]",
)
@click.option(
    "--batches",
    type=Numbers(least=1),
    help="Sequences at once. [default: 1,4,16,32,64,100 on CUDA; 1,4 on a CPU]",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="How often each is run.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Run nothing and write nothing: print weights and cache by arithmetic.",
)
@options.force
@options.output_format
@options.model_options
@options.debug
def command(
    model, quantized, output, lengths, batches, repeats, device, dry_run, force, output_format,
    **where,
):  # fmt: skip
    """Measure tokens per second and peak memory of MODEL on this machine.

    MODEL runs in bf16, with transformers' KV cache and with the int8 one; QUANTIZED are folders of
    it in 4 or 8 bits (bitsandbytes). Each is run for several lengths one sequence at a time, for
    several batch sizes at 1,024 tokens (or the nearest length below), and encodes a prompt of 2,048
    (or the nearest). Each case has a process of its own. What does not fit is planned: weights and
    cache by arithmetic.

    \b
    Examples:
      qwq-quant profile examples/tiny-qwq -o profile
      qwq-quant profile Qwen/QwQ-32B qwq-4bit -o profile --batches 1,4
      qwq-quant profile Qwen/QwQ-32B -o profile --device cuda --dry-run
    """
    from quant.cli.progress import Progress
    from quant.display import printable
    from quant.profiling.cases import BATCHES, LENGTHS, make_cases

    kind, machine = _machine(device, dry_run)
    cases = make_cases(lengths or LENGTHS[kind], batches or BATCHES[kind])

    from quant.profiling.profile import plan_profile, profile
    from quant.profiling.report import as_json, check_places, write_report
    from quant.report.files import report_needs

    variants = _variants(model, quantized, where)
    started = time.monotonic()
    files = []
    if dry_run:
        found = plan_profile(variants, cases, machine)
    else:
        check_places(output, force=force)
        report_needs(output).require()
        with Progress("Profiling, runs", len(variants) * len(cases) * repeats) as bar:
            found = profile(variants, cases, machine, repeats, bar.advance)
        files = write_report(found, _short(model), output, force=force)
    if output_format == "json":
        import json

        click.echo(json.dumps(as_json(found), indent=1))
    else:
        from quant.cli.profile_table import print_profile

        print_profile(found)
        if files:
            shown = printable(files[0])
            click.echo(f"\n{shown}, in {time.monotonic() - started:.1f} s.")
    return 65 if found.failed else 0


def _machine(device: str, dry_run: bool):
    """ "cpu" or "cuda", and the Machine. A dry run may be of a GPU that is not there."""
    from quant.calibration.device import choose_device
    from quant.errors import UsageError
    from quant.profiling.profile import Machine, describe_machine

    there = dry_run and device != "auto"
    chosen = device if there else choose_device(device)
    kind = chosen.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        from quant.display import printable

        raise UsageError(
            f"The device {printable(device)} cannot be profiled.",
            "Its memory is counted on CPUs and CUDA devices only.",
            "Use --device cpu or --device cuda.",
        )
    return kind, Machine(chosen, "Nothing was run", 0) if dry_run else describe_machine(chosen)


def _variants(model: str, quantized: tuple[str, ...], where: dict) -> list:
    """MODEL with each cache, then QUANTIZED. Names that are alike are told apart by a number."""
    from quant.display import printable
    from quant.errors import UsageError
    from quant.hub import resolve
    from quant.profiling.profile import Variant
    from quant.source import open_checkpoint

    checkpoint = open_checkpoint(model, **where)
    variants = [
        Variant("bf16", checkpoint.folder),
        Variant("bf16, int8 KV cache", checkpoint.folder, is_int8=True),
    ]
    for typed in quantized:
        folder = resolve(typed, **where).path
        if not folder.is_dir():
            raise UsageError(
                f"{printable(typed)} is no folder.",
                "Models are run in transformers here, GGUF files in llama.cpp.",
                "llama-bench measures those: llama-bench -m FILE.gguf -p 2048 -n 2048",
            )
        taken = sum(variant.name.partition(" (")[0] == _short(typed) for variant in variants)
        name = f"{_short(typed)} ({taken + 1})" if taken else _short(typed)
        variants.append(Variant(name, folder))
    return variants


def _short(name: str) -> str:
    """The last part of a path."""
    return name.rstrip("/").rpartition("/")[2] or name
