"""qwq-quant to-gguf: a checkpoint or a GGUF file to a GGUF file."""

import json
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import click

from quant.cli import options
from quant.cli.mending import lora_option, mend, mending_options

# The names of quant.mixtures.MIXTURES and quant.formats.FORMATS, written out so that --help need
# not import numpy; a test holds them against each other.
TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S",
    "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS",
    "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0", "IQ1_M",
    "IQ1_S",
)  # fmt: skip
FORMATS = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL",
    "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0",
    "IQ1_M", "IQ1_S",
)  # fmt: skip
NAN_POLICIES = ("refuse", "keep-16bit", "zero")


@click.command("to-gguf")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=options.Output(),
    help="File to write, or a folder: then the file is named after model and type.",
)
@click.option(
    "-t",
    "--type",
    "type_name",
    type=options.Name(TYPES, "type"),
    help=f"Type of the weights: {' '.join(TYPES)}. [default: Q8_0; for a .gguf MODEL: as they are]",
)
@click.option(
    "--target-bpw",
    type=options.BitsPerWeight(),
    help="Instead of a type: at most so many bits per weight over all tensors, for example 4.5, "
    "each tensor in the format that its measured error makes best. Errors are measured when the "
    "plan is made: --dry-run reads weights, too, then.",
)
@click.option(
    "--target-size",
    type=options.Size(),
    help="The same for the size of the whole file, for example 20GB.",
)
@click.option("--output-type", type=options.Name(FORMATS, "format"), help="Of the output layer.")
@click.option(
    "--embedding-type", type=options.Name(FORMATS, "format"), help="Of the token embedding."
)
@click.option(
    "--tensor-type",
    "tensor_types",
    metavar="PATTERN=FORMAT",
    type=options.PatternFormat(FORMATS),
    multiple=True,
    help="Format of the tensors whose GGUF name the regular expression is found in, for example "
    "'ffn_down=Q6_K' or 'blk\\.[0-3]\\.=Q8_0'. The first match wins. Repeatable.",
)
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    help="Importance matrix of llama.cpp (GGUF or .dat): errors where inputs are large count more.",
)
@click.option(
    "--refine",
    is_flag=True,
    help="Search longer for lower errors. Same formats; the bytes are no longer llama.cpp's.",
)
@click.option("--pure", is_flag=True, help="The type's format for all, without its exceptions.")
@click.option("--name", help="general.name of the model. [default: the folder's name]")
@click.option(
    "--override",
    "overrides",
    metavar="KEY=TYPE:VALUE",
    multiple=True,
    help="Set a metadata key, for example qwen2.context_length=u32:65536 or "
    "general.tags=arr[str]:'[\"a\"]'. Types: u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 bool str "
    "arr[...]. Repeatable.",
)
@click.option("--force-override", is_flag=True, help="Set unknown keys and other types too.")
@click.option(
    "--rope-scaling",
    type=click.Choice(["none", "linear", "yarn"]),
    help="Scale positions for longer contexts.",
)
@click.option("--rope-factor", type=float, help="How many times longer.")
@click.option("--rope-original-context", type=int, help="The context length in training.")
@click.option("--rope-theta", type=float, help="Base of the rotary frequencies.")
@click.option("--rms-eps", type=float, help="Epsilon of the RMS norms.")
@click.option("--context-length", type=int, help="Longest context the file promises.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    help="Jinja file that replaces the default chat template.",
)
@click.option(
    "--sampling",
    metavar="PROFILE|FILE|none",
    help="Sampling settings to store: a profile that `qwq-quant recipes` lists, a TOML file, or "
    "none. [default: generation_config.json's, completed by the recipe's first; for a .gguf "
    "MODEL: as they are]",
)
@mending_options
@lora_option
@click.option("--pre-tokenizer", help="tokenizer.ggml.pre, where its rules are not recognised.")
@click.option("--split-max-size", type=options.Size(), help="Largest file, for example 4GB.")
@click.option(
    "--nan-policy",
    type=click.Choice(NAN_POLICIES),
    default="refuse",
    show_default=True,
    help="What to do with NaN or infinite weights.",
)
@options.dry_run
@options.force
@options.resume
@options.output_format
@options.model_options
@options.debug
def command(
    model, output, output_format, dry_run, force, resume, nan_policy, split_max_size, revision,
    token, cache_dir, offline, target_bpw, target_size, output_type, embedding_type, tensor_types,
    pure, recipe, fix, lora, **wishes,
):  # fmt: skip
    """Write MODEL as a GGUF file, for llama.cpp, Ollama and LM Studio.

    One pass straight from safetensors, a few megabytes of weights in memory at a time. A .gguf
    MODEL is copied with changed metadata, split, or merged (name the first file of a split one).
    The file appears whole and verified, or not at all; qwq-quant.json beside it says what was
    written from what.

    \b
    Examples:
      qwq-quant to-gguf examples/tiny-qwq -o tiny-qwq-Q8_0.gguf --type Q8_0
      qwq-quant to-gguf Qwen/QwQ-32B -o . --split-max-size 20GB --dry-run
      qwq-quant to-gguf Qwen/QwQ-32B -o . --target-size 20GB --imatrix qwq.gguf
      qwq-quant to-gguf examples/tiny-qwq -o long.gguf --rope-scaling yarn \\
          --rope-factor 4 --rope-original-context 2048
    """
    from quant.architectures import find_architecture
    from quant.checkpoint import Checkpoint
    from quant.mixtures import Choices
    from quant.source import open_source
    from quant.to_gguf import Wishes

    if target_bpw is not None and target_size is not None:
        raise click.UsageError("--target-bpw and --target-size exclude each other.")
    source = open_source(
        model,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        lora=lora,
        check_config=find_architecture,
    )
    mended = mend(source, recipe, fix)
    speaks = recipe is not None or isinstance(source, Checkpoint)  # a .gguf's own settings stay
    choices = Choices(output_type, embedding_type, tensor_types, pure)
    target = _target(target_bpw, target_size)
    wishes |= {"target": target, "max_file_nbytes": split_max_size, "choices": choices}
    started = time.monotonic()
    wishes = Wishes(recipe=mended.chosen if speaks else None, **wishes)
    if dry_run:
        job = _plan(mended, wishes)
        return _print_plan(job, output, output_format, time.monotonic() - started)

    from quant.cli.resuming import resuming
    from quant.measured_errors import MeasuredErrors

    with resuming(resume, "tensor") as how:
        how = replace(how, command=options.typed_command())
        kept = MeasuredErrors(output, how, model) if target else None
        job = _plan(mended, wishes, kept)
        if kept and kept.went_on:  # so there was a run to go on with, whether or not it wrote
            how = replace(how, mode="auto")
        _write(job, output, force, nan_policy, output_format, how, kept)
    return 0


def _target(bits_per_weight: float | None, file_nbytes: int | None):
    """What the two options say; None if neither was given."""
    from quant.target_size import Target

    if bits_per_weight is None and file_nbytes is None:
        return None
    return Target(bits_per_weight, file_nbytes)


def _plan(mended, wishes, kept=None):
    """The job; a target size takes measuring, whose progress is shown, and its results kept."""
    from quant.cli.progress import Progress
    from quant.to_gguf import plan_gguf, target_encoders

    with Progress("Measuring tensors", total=1) as bar:
        if wishes.target is not None:
            _say_if_compiling(bar, target_encoders(wishes))

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.advance(done - bar.done)

        job = plan_gguf(mended.source, wishes, show, kept)
    return replace(job, notes=(*mended.notes, *job.notes))


def _print_plan(job, output: Path, output_format: str, planning: float) -> int:
    """Print the plan; the exit code says whether it fits."""
    from quant.cli.plan_table import print_plan
    from quant.gguf_needs import gguf_estimate, gguf_needs
    from quant.write_gguf import describe_json, output_path

    path = output_path(job, output)
    needs, estimate = gguf_needs(job, path), gguf_estimate(job, path, planning)
    if output_format == "json":
        click.echo(describe_json(job, needs, estimate))
    else:
        print_plan(job, needs, estimate)
    return needs.exit_code


def _write(
    job, output: Path, force: bool, nan_policy: str, output_format: str, resume, kept
) -> None:
    from quant.cli.plan_table import print_note
    from quant.cli.progress import BytesProgress
    from quant.display import printable
    from quant.gguf_needs import encoder_of, gguf_needs
    from quant.write_gguf import output_path, result_summary, write_gguf

    path = output_path(job, output)
    gguf_needs(job, path).require()
    for note in job.notes:
        print_note(note, err=True)
    started = time.monotonic()
    nbytes, n_weights = job.plan.nbytes, job.plan.n_weights
    with BytesProgress("Writing", nbytes) as bar:
        _say_if_compiling(bar, map(encoder_of, job.plan.assignments))
        result = write_gguf(
            job,
            path,
            force=force,
            nan_policy=nan_policy,
            command=options.typed_command(),
            resume=resume,
            progress=lambda n: bar.advance(n * nbytes // n_weights),
            verifying=lambda: bar.message("Reading it back"),
            recorded=lambda: kept and kept.forget(),
        )
    for change in result.changes:
        print_note(f"{printable(change.name)}: {change.why}.", err=True)
    _print_over_target(job, result)
    if output_format == "json":
        click.echo(json.dumps(result_summary(job, result), indent=1))
    else:
        _print_result(job, result, time.monotonic() - started)


def _say_if_compiling(bar, encoders) -> None:
    """The first run of an encoder compiles it, and nothing moves meanwhile.

    encoders: (format, has importance), or None for a tensor that is written as it is.
    """
    from quant.encoder_speeds import kernels_to_compile

    if kernels_to_compile(encoder for encoder in encoders if encoder):
        bar.begin("Compiling encoders for this processor, the first time only")


def _print_over_target(job, result) -> None:
    """What to do about tensors that took more than a target size gave them."""
    from quant.cli.plan_table import print_note
    from quant.display import human_bytes

    planned = {a.name: a.format.name for a in job.plan.assignments}
    wider = [change for change in result.changes if planned[change.name] != change.format]
    if not wider or all(a.error is None for a in job.plan.assignments):
        return
    over = human_bytes(result.tensor_nbytes - job.plan.nbytes)
    print_note(f"That is {over} over the target. With these, the other tensors make room:", True)
    for change in wider:
        option = f"--tensor-type=^{re.escape(change.name)}$={change.format}"
        click.echo(f"          {shlex.quote(option)}", err=True)


def _print_result(job, result, seconds: float) -> None:
    from quant.display import human_bytes, printable

    for file in result.files:
        click.echo(f"{printable(file.path)}  {human_bytes(file.nbytes)}  sha256 {file.sha256[:16]}")
    plan, bits = job.plan, result.bits_per_weight(job)
    click.echo(
        f"{len(plan.assignments)} tensors, {plan.n_weights / 1e6:.1f} million weights, "
        f"{bits:.2f} bits per weight; written and verified in {seconds:.1f} s."
    )
