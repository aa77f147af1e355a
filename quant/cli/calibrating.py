"""What the commands that run a model on a text share."""

from pathlib import Path

CHECKED_TOKENS, CHECKED_SEQ_LEN = 8192, 256
"""Of held-out text: half of them are scored."""


def calibration_tokens(checkpoint, calibration: Path | None, n_tokens: int, seq_len: int):
    """Tokens of the text that --calibration names, or of the built-in one.

    Raises BadInput, UsageError.
    """
    from quant.calibration.tokens import cut_tokens
    from quant.texts import built_in_texts, read_texts

    texts = built_in_texts() if calibration is None else read_texts(calibration)
    return cut_tokens(checkpoint, texts, n_tokens, seq_len)


def planned_run(
    checkpoint, works, output: Path, nbytes: int, calibration: Path | None, n_tokens: int,
    seq_len: int, device: str, saves: bool = False,
):  # fmt: skip
    """What running the model will take, a LayerwiseRun. saves: states are kept beside the output,
    for a run that goes on. Raises BadInput, Unavailable, UsageError."""
    from quant.calibration.needs import LayerwiseRun, tokens_at_most
    from quant.texts import built_in_texts, read_texts

    if works:
        from quant.calibration.device import choose_device
        from quant.calibration.tokens import check_sequences, cut_tokens

        check_sequences(checkpoint, n_tokens, seq_len)
        texts = built_in_texts() if calibration is None else read_texts(calibration)
        device, short = choose_device(device), 2 * seq_len
        if tokens_at_most(texts, short) < short:  # it may not even be one sequence
            n_tokens = cut_tokens(checkpoint, texts, n_tokens, seq_len).n_tokens
        n_tokens = max(1, tokens_at_most(texts, n_tokens) // seq_len) * seq_len
    return LayerwiseRun(checkpoint, tuple(works), n_tokens, seq_len, device, output, nbytes, saves)


def preflight(run, dry_run: bool) -> None:
    """Refuse a LayerwiseRun that cannot be made. A dry run ends here: what it takes is printed, and
    the exit code says whether it fits. Raises CannotCreate, OutputFailed, Unavailable.
    """
    import click

    from quant.cli.plan_table import print_needs
    from quant.display import printable

    needs = run.needs()
    if not dry_run:
        return needs.require()
    text = f" over about {run.n_tokens} tokens" if any(w.forwards for w in run.works) else ""
    name = printable(Path(run.checkpoint.name).absolute().name, 36)
    click.echo(f"{name} is taken layer by layer{text}.")
    print_needs(needs, run.estimate())
    raise click.exceptions.Exit(needs.exit_code)


def held_out_tokens(checkpoint):
    """Tokens of the built-in text that written models are checked on.

    The same whatever the model was calibrated on, so that results can be compared.
    """
    from quant.calibration.tokens import context_length, cut_tokens
    from quant.texts import held_out_texts

    seq_len = min(CHECKED_SEQ_LEN, context_length(checkpoint))
    return cut_tokens(checkpoint, held_out_texts(), CHECKED_TOKENS, seq_len)
