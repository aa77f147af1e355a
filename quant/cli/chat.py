"""qwq-quant chat: try a model in the terminal, or two side by side."""

from contextlib import ExitStack

import click

from quant.cli import options


@click.command("chat")
@click.argument("model")
@click.option("--compare", metavar="OTHER", help="A second model that is asked the same.")
@click.option(
    "--profile", metavar="PROFILE|FILE", help="Sampling settings. [default: the recipe's first]"
)
@click.option("--recipe", metavar="NAME|FILE", help="[default: by the model's name]")
@click.option(
    "--context",
    type=int,
    help="Tokens that conversation and answer may have; a thought takes thousands. "
    "[default: 32768, or the model's own if less]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**63 - 1),
    default=1,
    show_default=True,
    help="The same seed and questions give the same answers.",
)
@options.model_options
@options.debug
def command(model, compare, profile, recipe, context, seed, **where):
    """Talk with MODEL, a folder or a .gguf file, with its recipe's settings.

    Folders run in transformers (16-bit or bitsandbytes), .gguf files in llama.cpp; both are
    sampled alike. Thoughts are dim, and forgotten when the next question is asked. An answer that
    goes round in circles is stopped. :help lists the commands; Ctrl-C stops an answer, Ctrl-D
    leaves. With --compare both models are in memory, with MODEL's settings and the same seed, and
    both are told MODEL's answers as what was said before.

    \b
    Examples:
      qwq-quant chat examples/tiny-qwq
      echo 'What is 47 + 85?' | qwq-quant chat examples/tiny-qwq
      qwq-quant chat QwQ-32B-Q4_K_M.gguf --profile unsloth --context 16384
      qwq-quant chat Qwen/QwQ-32B --compare QwQ-32B-4bit
    """
    from quant.chat.session import Session
    from quant.chat.terminal import Terminal
    from quant.chat.voice import find_model, load

    first = find_model(model, where, recipe, profile, context)
    found = [first]
    if compare is not None:
        found.append(find_model(compare, where, recipe, profile, context))
    _introduce(found)
    with ExitStack() as loaded:
        voices = [load(each) for each in found]
        for voice in voices:
            loaded.enter_context(voice.runner)
        Terminal(Session(voices, first.run.profile, seed), _note).run()


def _introduce(found: list) -> None:
    """What is talked with, and how."""
    from quant.display import printable

    run = found[0].run
    chosen = run.patient.chosen
    recipe = f"recipe {chosen.recipe.name} ({chosen.why})" if chosen else "no recipe fits the model"
    _note(printable(f"{recipe}, profile {run.profile_name}", 600))
    for each in found:
        _note(f"{printable(each.name)}: context {each.run.context} tokens. Loading ...")


def _note(text: str) -> None:
    from quant.cli.plan_table import print_note

    print_note(" ".join(text.splitlines()), err=True)
