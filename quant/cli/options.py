"""Options that several commands share, each defined once."""

import math
import re
import sys
from difflib import get_close_matches
from pathlib import Path

import click

from quant.display import parse_size, printable


class Size(click.ParamType):
    """Bytes: 5GB, 500M, 4GiB."""

    name = "size"

    def convert(self, value, param, ctx):
        try:
            size = parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if size < 1:
            self.fail("a size above 0 is needed", param, ctx)
        return size


class BitsPerWeight(click.ParamType):
    """A number of bits above 0: 4.5."""

    name = "bits"

    def convert(self, value, param, ctx):
        try:
            bits = float(value)
        except ValueError:
            bits = math.nan
        if not 0 < bits < math.inf:
            self.fail(f"{printable(value)} is no number of bits; write for example 4.5", param, ctx)
        return bits


class Name(click.ParamType):
    """One of a list of names, in any case; a wrong one is answered with the nearest."""

    def __init__(self, names: tuple[str, ...], kind: str):
        self.names, self.name = names, kind

    def get_metavar(self, param, ctx=None):
        return self.name.upper()

    def convert(self, value, param, ctx):
        name = value.upper()
        if name not in self.names:
            usual = f"{name}_M"  # what llama-quantize takes Q4_K for
            near = [usual] if usual in self.names else get_close_matches(name, self.names, 1)
            guess = f" Did you mean {near[0]}?" if near else ""
            message = f"{printable(value)} is no {self.name}.{guess}"
            self.fail(f"{message} There are: {' '.join(self.names)}.", param, ctx)
        return name


class Output(click.ParamType):
    """A path to write; one that ends in a slash means a folder, which must be there."""

    name = "path"

    def convert(self, value, param, ctx):
        path = Path(value)
        if str(value).endswith("/") and not path.is_dir():
            self.fail(f"there is no folder {printable(value)}", param, ctx)
        return path


class PatternFormat(click.ParamType):
    """PATTERN=FORMAT: a regular expression and a format's name."""

    name = "pattern=format"

    def __init__(self, names: tuple[str, ...]):
        self._format = Name(names, "format")

    def convert(self, value, param, ctx):
        pattern, equals, name = value.rpartition("=")
        if not equals or not pattern:
            self.fail(f"{printable(value)} is not written as PATTERN=FORMAT.", param, ctx)
        try:
            re.compile(pattern)
        except re.error as error:
            self.fail(f"{printable(pattern)} is no regular expression: {error}.", param, ctx)
        return pattern, self._format.convert(name, param, ctx)


def typed_command() -> tuple[str, ...]:
    """The command as it was typed, for the manifest; the access token is left out."""
    typed, hide_next = [], False
    for word in sys.argv[1:]:
        if hide_next:
            typed.append("***")
        else:
            typed.append("--token=***" if word.startswith("--token=") else word)
        hide_next = word == "--token" and not hide_next
    return tuple(typed)


def model_options(command):
    """How MODEL is found: --revision --token --cache-dir --offline."""
    for option in reversed(
        (
            click.option("--revision", help="Branch, tag or commit of a hub repository."),
            click.option("--token", envvar="HF_TOKEN", help="Access token; never printed."),
            click.option(
                "--cache-dir",
                type=click.Path(file_okay=False, path_type=Path),
                help="The hub's cache, if not the usual one.",
            ),
            click.option("--offline", is_flag=True, help="Use only what is in the cache."),
        )
    ):
        command = option(command)
    return command


output_format = click.option(
    "--format",
    "output_format",
    type=click.Choice(["human", "json"]),
    default="human",
    show_default=True,
    help="json prints one JSON document on stdout.",
)

dry_run = click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")

force = click.option("--force", is_flag=True, help="Replace an output that exists.")

# The names of quant.journal.MODES; a test holds them against each other.
resume = click.option(
    "--resume",
    type=click.Choice(["auto", "required", "never"]),
    default="auto",
    show_default=True,
    help="Go on with an interrupted run of the same job: if there is one, or else fail, or never: "
    "remove what it left, and keep nothing for another.",
)

debug = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")


def calibration_options(seq_len: int, n_tokens: int):
    """How a model is run to see its activations: --calibration --tokens --seq-len --device."""

    def add(command):
        for option in reversed(
            (
                click.option(
                    "--calibration",
                    type=click.Path(path_type=Path),
                    help="Text to run the model on: a plain file, or JSON lines with a text each. "
                    "[default: a built-in text: languages, code, reasoning]",
                ),
                click.option(
                    "--tokens",
                    "n_tokens",
                    type=click.IntRange(min=2),
                    default=n_tokens,
                    show_default=True,
                    help="How many tokens of it, in whole sequences, spread evenly over the text.",
                ),
                click.option(
                    "--seq-len",
                    type=click.IntRange(min=2),
                    default=seq_len,
                    show_default=True,
                    help="Tokens in a sequence.",
                ),
                click.option(
                    "--device",
                    default="auto",
                    show_default=True,
                    help="cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.",
                ),
            )
        ):
            command = option(command)
        return command

    return add


class BudgetType(click.ParamType):
    """10%, 1.5GB, 0 or all."""

    name = "budget"

    def convert(self, value, param, ctx):
        from quant.budget import Budget

        text = value.strip().lower()
        if text == "all":
            return Budget("all")
        try:
            if text.endswith("%"):
                share = float(text[:-1]) / 100
                if not 0 <= share < float("inf"):
                    raise ValueError(f"{printable(value)} is no share")
                return Budget("share", share)
            return Budget("bytes", parse_size(text))
        except ValueError:
            self.fail(
                f"{printable(value)} is no budget; write for example 10%, 1.5GB, 0 or all",
                param,
                ctx,
            )


# The names of quant.sensitivity.METRICS, written out so that --help need not import numpy; a test
# holds them against each other.
METRICS = ("weight", "activation", "block", "gradient", "kld")


def format_4bit_options(command):
    """How weights are stored in 4 bits: --quant-type --no-double-quant --search-scales."""
    for option in reversed(
        (
            click.option(
                "--quant-type",
                type=click.Choice(["nf4", "fp4"]),
                default="nf4",
                show_default=True,
                help="The sixteen levels: quantiles of a Gaussian, or of a tiny float.",
            ),
            click.option(
                "--double-quant/--no-double-quant",
                default=True,
                help="Store the scales in 8 bits too: 4.13 bits per weight, not 4.5. [default: on]",
            ),
            click.option(
                "--search-scales/--no-search-scales",
                default=True,
                help="Search each block's scale for the least error, same format and size; without "
                "it, the bytes are bitsandbytes' own. [default: on]",
            ),
        )
    ):
        command = option(command)
    return command
