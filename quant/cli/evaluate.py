"""qwq-quant evaluate: how much each of many candidates lost, on one scale."""

import os
import shlex
import time
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from quant.cli import options


@click.command("evaluate")
@click.argument("model")
@click.argument("candidates", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the report; it is made if it is not there.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text to measure on: a plain file, or JSON lines with category and text. "
    "[default: a built-in text: code, English, reasoning]",
)
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(min=1),
    help="How many tokens of it. [default: all]",
)
@click.option(
    "--context",
    "n_ctx",
    type=click.IntRange(min=8),
    default=512,
    show_default=True,
    help="Tokens in a window; the second half of each is scored.",
)
@click.option("--loops", is_flag=True, help="Draw answers and look whether they end.")
@click.option(
    "--prompts",
    default="short",
    show_default=True,
    metavar="SET|FILE",
    help="What is asked with --loops: short, flappy-bird, or a TOML file.",
)
@click.option(
    "--sampling",
    "profiles",
    multiple=True,
    metavar="PROFILE|FILE",
    help="How answers are drawn; give it twice to see two side by side. [default: qwen-official]",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True,
              help="How many answers to each prompt, with seeds 1, 2, ...")  # fmt: skip
@click.option(
    "--loop-tokens",
    type=click.IntRange(min=64),
    default=1024,
    show_default=True,
    help="An answer of so many tokens is endless.",
)
@click.option(
    "--questions",
    type=click.Path(path_type=Path),
    help='JSON lines of {"question", "answer"}, answered greedily, right to the letter or wrong.',
)
@click.option("--tasks", help="Tasks of lm-eval, for example gsm8k,mmlu. It downloads their data.")
@click.option(
    "--task-limit", type=click.IntRange(min=1), help="Questions of each task. [default: all]"
)
@click.option(
    "--run-code",
    is_flag=True,
    help="Let tasks such as humaneval run the programs that a model writes, unconfined.",
)
@click.option(
    "--base-file",
    type=click.Path(path_type=Path),
    help="Keep MODEL's distributions in this file: what llama-perplexity takes as "
    "--kl-divergence-base, and this command as MODEL.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="For folders: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.",
)
@options.dry_run
@options.force
@options.resume
@options.output_format
@options.model_options
@options.debug
def command(
    model, candidates, output, text, n_tokens, n_ctx, loops, prompts, profiles, seeds,
    loop_tokens, questions, tasks, task_limit, run_code, base_file, device, dry_run, force, resume,
    output_format, **where,
):  # fmt: skip
    """Measure how much each of CANDIDATES lost against MODEL, whatever their formats.

    Folders (16-bit, bitsandbytes, GPTQ) run in transformers, .gguf files in llama.cpp, folders that
    do not fit in memory layer by layer. Perplexity, KL divergence and top-token agreement have
    llama.cpp's definitions. MODEL may also be a file of its --kl-divergence-base. A candidate that
    cannot be measured is named and left out, and the exit code is 65 then. What is measured is kept
    in a hidden folder in the report's until the report is there, or, if a candidate was left out,
    until that is mended: the same command goes on.

    \b
    Examples:
      qwq-quant evaluate examples/tiny-qwq tiny-*.gguf -o report --context 256
      qwq-quant evaluate Qwen/QwQ-32B qwq-4bit QwQ-Q4_K_M.gguf -o report \\
          --loops --prompts flappy-bird --loop-tokens 16384 \\
          --sampling qwen-official --sampling unsloth
    """
    _refuse_options_without_use(loops, tasks)

    from quant.cli.resuming import resuming
    from quant.display import printable
    from quant.evaluation.evaluate import PAGE, evaluate
    from quant.evaluation.measuring import Loops, Wishes
    from quant.evaluation.report import check_places, write_report
    from quant.texts import held_out_texts, read_texts

    _check_device(device)
    if tasks:
        from quant.evaluation.lm_eval_bridge import check_tasks

        check_tasks(tasks.split(","))
    wishes = Wishes(
        texts=held_out_texts() if text is None else read_texts(text),
        n_ctx=n_ctx,
        n_tokens=n_tokens,
        loops=_loops(Loops, prompts, profiles, seeds, loop_tokens) if loops else None,
        questions=_questions(questions),
        tasks=tuple(tasks.split(",")) if tasks else (),
        task_limit=task_limit,
        run_code=run_code,
        device=device,
    )
    started = time.monotonic()
    reference, found, missing = _find(model, candidates, where)
    _preflight(reference, found, wishes, output, base_file is not None, dry_run, output_format)

    def check(again: bool) -> None:
        check_places(output, force=force or again)
        _check_base_file(base_file, force or again)

    with _Bars() as bars, resuming(resume, "window or answer") as going_on:
        evaluation = evaluate(
            reference,
            found,
            wishes,
            output,
            bars,
            missing,
            base_file,
            resume=replace(going_on, command=options.typed_command()),
            check=check,
            publish=lambda evaluation: write_report(evaluation, output, force=True),
        )
    if output_format == "json":
        import json

        click.echo(json.dumps(evaluation.as_json(), indent=1))
    else:
        from quant.cli.evaluation_table import print_evaluation

        print_evaluation(evaluation)
        click.echo(f"\n{printable(output / PAGE)}, in {time.monotonic() - started:.1f} s.")
    if evaluation.failed:
        _tell_what_is_kept(output)
    return 65 if evaluation.failed else 0


def _preflight(
    reference, found, wishes, output: Path, keeps_base: bool, dry_run: bool, output_format: str
) -> None:
    """Refuse what cannot fit. A dry run ends here: what it takes is printed."""
    from quant.calibration.device import choose_device
    from quant.evaluation.needs import EvaluationRun

    device = choose_device(wishes.device)
    run = EvaluationRun(reference, found, wishes, output, device, keeps_base)
    needs = run.needs()
    if not dry_run:
        return needs.require()
    estimate = run.estimate()
    if output_format == "json":
        import json

        click.echo(json.dumps({"needs": {**needs.as_json(), **estimate.as_json()}}, indent=1))
    else:
        from quant.cli.plan_table import print_needs, print_note

        click.echo(f"{1 + len(found)} models read about {run.n_tokens} tokens, one by one.")
        print_needs(needs, estimate)
        if wishes.tasks:
            print_note("How long lm-eval's tasks take is not known beforehand.")
    raise click.exceptions.Exit(needs.exit_code)


def _refuse_options_without_use(loops: bool, tasks: str | None) -> None:
    """Raise UsageError for options that only count with another one that was not given."""
    context = click.get_current_context()
    of_others = {
        "--loops": () if loops else ("prompts", "profiles", "seeds", "loop_tokens"),
        "--tasks": () if tasks else ("task_limit", "run_code"),
    }
    for other, names in of_others.items():
        for option in context.command.params:
            typed = context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
            if option.name in names and typed:
                raise click.UsageError(f"{option.opts[0]} is of no use without {other}.")


def _check_base_file(path: Path | None, force: bool) -> None:
    """Refuse before hours of work what could not be written after them."""
    from quant.display import printable
    from quant.errors import CannotCreate
    from quant.evaluation.base_file import MAGIC
    from quant.output_file import check_output_file

    if path is None:
        return
    check_output_file(
        path, force=force, sources=(), starts_with=MAGIC, kind="file of distributions"
    )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        shown = printable(path.parent)
        raise CannotCreate(
            f"{printable(path)} cannot be written.",
            f"There is no folder {shown}." if not path.parent.is_dir() else f"{shown} is not ours.",
            "Choose another place with --base-file.",
        )


def _tell_what_is_kept(output: Path) -> None:
    """After a run that left a candidate out."""
    from quant.cli.plan_table import print_note
    from quant.display import human_bytes, printable
    from quant.durable import journal_path
    from quant.evaluation.evaluate import PAGE, WORK, kept_nbytes

    if nbytes := kept_nbytes(output):
        print_note(
            f"What was measured is kept, {human_bytes(nbytes)}: mend what was left out and run the "
            "same command with --force, which measures only that. Or remove it:",
            err=True,
        )
        kept = (output / WORK, journal_path(output / PAGE))
        click.echo(f"rm -r {shlex.join(printable(place, 4096) for place in kept)}", err=True)


def _check_device(device: str) -> None:
    """Refuse one that cannot be used before anything is done."""
    if device not in ("auto", "cpu"):  # torch takes its time
        from quant.calibration.device import choose_device

        choose_device(device)


def _loops(kind, prompts: str, profiles: tuple[str, ...], seeds: int, limit: int):
    from quant.evaluation.loops import read_prompts
    from quant.recipe import find_profile

    settings = {name: find_profile(name).settings() for name in profiles or ("qwen-official",)}
    return kind(tuple(read_prompts(prompts)), settings, tuple(range(1, seeds + 1)), limit)


def _questions(path: Path | None) -> tuple:
    from quant.evaluation.questions import read_questions

    return () if path is None else tuple(read_questions(path))


def _find(model: str, candidates: tuple[str, ...], where: dict):
    """The reference, the candidates found, and those that are not there, each with its error."""
    from quant.errors import QwqQuantError
    from quant.evaluation.evaluate import Failed, Model, is_base_file
    from quant.hub import resolve

    path = Path(model)
    places = {}
    for name in candidates:  # typed twice, measured once
        places.setdefault(os.path.normpath(name), name)
    candidates = tuple(places.values())
    among = (model, *candidates)
    reference = Model(
        _short(model, among), path if is_base_file(path) else resolve(model, **where).path
    )
    found, missing = [], []
    for name in candidates:
        shown = _short(name, among)
        try:
            found.append(Model(shown, resolve(name, **where).path))
        except QwqQuantError as error:
            missing.append(Failed(shown, error))
    return reference, found, missing


def _short(name: str, among: tuple[str, ...]) -> str:
    """The last part of a path; as many more as tell it from others that end in the same."""
    others = [each.rstrip("/").split("/") for each in among if each != name]
    parts = name.rstrip("/").split("/")
    for n in range(1, len(parts)):
        if not any(other[-n:] == parts[-n:] for other in others):
            return "/".join(parts[-n:])
    return name


class _Bars:
    """A bar for each step, on stderr, and notes between them."""

    def __init__(self):
        self._bar = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._end()

    def _end(self) -> None:
        if self._bar:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def begin(self, label: str, total: int) -> None:
        from quant.cli.progress import Progress

        self._end()
        self._bar = Progress(label, total)

    def advance(self, n: int) -> None:
        self._bar.advance(n)

    def note(self, text: str) -> None:
        from quant.cli.plan_table import print_note

        self._end()
        print_note(text, err=True)
