"""qwq-quant runtime: what to type to run a model with the settings that keep it from looping."""

import json
from pathlib import Path

import click

from quant.cli import options

ENGINES = ("llama.cpp", "ollama", "vllm", "transformers")


@click.command("runtime")
@click.argument("model")
@click.option("--engine", required=True, type=click.Choice(ENGINES), help="What runs the model.")
@click.option(
    "--profile", metavar="PROFILE|FILE", help="Sampling settings. [default: the recipe's first]"
)
@click.option("--context", type=int, help="Tokens. [default: 32768, or the model's own if less]")
@click.option("--recipe", metavar="NAME|FILE", help="[default: by the model's name]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write the files to."
)
@options.force
@options.output_format
@options.model_options
@options.debug
def command(model, engine, profile, context, recipe, output, force, output_format, **where):
    """Say what to type to run MODEL, and print or write the files to go with it.

    llama.cpp: a command with samplers, penalties and a reasoning budget. Ollama: a Modelfile, and
    the params and template files that it reads from the hub. vLLM: a command. transformers: a
    program. What an engine cannot express is said in a note.

    \b
    Examples:
      qwq-quant runtime examples/tiny-qwq --engine llama.cpp
      qwq-quant runtime QwQ-32B-Q4_K_M.gguf --engine ollama --profile unsloth -o .
      qwq-quant runtime Qwen/QwQ-32B --engine vllm --context 131072
    """
    from quant.doctor.opening import open_to_run
    from quant.errors import UsageError
    from quant.runtime import ENGINES
    from quant.runtime.run import settle

    folder = Path() if output is None else output
    run = settle(
        open_to_run(model, **where), model, recipe, profile, context, where["revision"], folder
    )
    launch = ENGINES[engine](run)
    if output is not None and not launch.files:
        raise UsageError(
            f"There are no files for {engine}: its command says all.", "", "Leave -o out."
        )
    if output is not None:
        _write(launch.files, output, force)
    if output_format == "json":
        click.echo(json.dumps(_as_json(run, launch, engine), indent=1, ensure_ascii=True))
    else:
        _print(run, launch, output)


def _write(files: dict[str, str], folder: Path, force: bool) -> None:
    from quant.display import printable
    from quant.durable import translated_errors, write_whole
    from quant.errors import CannotCreate

    with translated_errors(folder):
        folder.mkdir(exist_ok=True)
    there = [name for name in files if (folder / name).exists()]
    if there and not force:
        raise CannotCreate(
            f"{printable(folder / there[0])} exists already.", "", "Replace it with --force."
        )
    for name, text in files.items():
        write_whole(folder / name, text.encode())


def _as_json(run, launch, engine: str) -> dict:
    return {
        "engine": engine,
        "recipe": run.patient.recipe and run.patient.recipe.name,
        "profile": run.profile_name,
        "context": run.context,
        "commands": list(launch.commands),
        "files": launch.files,
        "notes": list(launch.notes),
    }


def _print(run, launch, output: Path | None) -> None:
    from quant.cli.plan_table import print_note
    from quant.display import printable

    chosen = run.patient.chosen
    recipe = f"recipe {chosen.recipe.name} ({chosen.why})" if chosen else "no recipe fits the model"
    click.echo(f"# {printable(recipe)}, profile {printable(run.profile_name)}", err=True)
    for command in launch.commands:
        click.echo(command)
    for name, text in launch.files.items():
        if output is None:
            click.echo(f"\n--- {name} ---\n{text.rstrip()}")
        else:
            click.echo(f"# wrote {printable(output / name)}", err=True)
    for note in launch.notes:
        print_note(printable(note, 600), err=True)
