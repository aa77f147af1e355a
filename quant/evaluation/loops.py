"""Does it stop? Answers to a set of prompts, and what is wrong with them.

Reasoning models think aloud for thousands of tokens, and some never stop: sampled wrongly, or
quantized too far, they say the same again and again. Perplexity does not see it, so answers are
drawn, with the sampling settings of a recipe and with fixed seeds, and each is looked at:

    endless    it did not stop by the limit of tokens
    loops      its end is one piece of text, at least MIN_COPIES times
    repeated   the share of its n-grams that occurred before in it
    thought    tokens before </think>; none if it was never closed

# ref: on loops under greedy decoding, Holtzman et al., The Curious Case of Neural Text
# Degeneration (2020), arXiv:1904.09751; on QwQ's, its model card and the recipe qwq-32b
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import islice, product

import numpy as np

from quant.display import printable
from quant.errors import BadInput, BadRecipe
from quant.evaluation.runners import Runner
from quant.evaluation.sampler import Sampler

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

N_GRAM = 8
"""Tokens in an n-gram: eight in a row do not come again by chance, though a table's may."""

MIN_COPIES = 4
MIN_LOOP = 64
"""An end of at least 4 copies and 64 tokens is a loop; a list of short equal lines is none."""

CLOSE = "</think>"


@dataclass(frozen=True)
class Answer:
    """One answer. Token counts are of the answer, not of the prompt."""

    prompt: str  # its name
    seed: int
    n_tokens: int
    endless: bool
    period: int | None  # tokens of the piece it ends in again and again; None: no loop
    repeated: float  # 0 ... 1
    thought: int | None  # tokens before </think>; None if there was no thought or no end of it
    text: str

    @property
    def loops(self) -> bool:
        return self.period is not None


@dataclass(frozen=True)
class Prompt:
    name: str
    text: str


def read_prompts(name_or_file: str) -> list[Prompt]:
    """The prompts of a shipped set ("flappy-bird") or of a TOML file.

    Raises InputMissing or BadRecipe.
    """
    from quant.recipe import is_file_name, read_toml_text  # pydantic takes its time

    if is_file_name(name_or_file):
        text = read_toml_text(name_or_file, "a set of prompts")
    elif name_or_file in prompt_sets():
        text = (_shipped() / f"{name_or_file}.toml").read_text(encoding="utf-8")
    else:
        raise BadRecipe(
            f'There is no set of prompts "{printable(name_or_file)}".',
            "A file's name must end in .toml.",
            f"There are: {', '.join(prompt_sets())}.",
        )
    return _parse(text, printable(name_or_file))


def prompt_sets() -> list[str]:
    """Names of the sets that ship with the package."""
    names = (file.name for file in _shipped().iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def _shipped():
    return resources.files("qwq_recipes") / "prompts"


def _parse(text: str, shown: str) -> list[Prompt]:
    try:
        entries = tomllib.loads(text).get("prompts")
    except tomllib.TOMLDecodeError as error:
        raise BadRecipe(f"The set of prompts {shown} is no TOML.", printable(error)) from None
    try:
        prompts = [Prompt(**entry) for entry in entries]
        if not prompts or not all(isinstance(v, str) for p in prompts for v in asdict(p).values()):
            raise TypeError
    except TypeError:
        raise BadRecipe(
            f"The set of prompts {shown} cannot be read.",
            "It must have [[prompts]], each with a name and a text and nothing else.",
        ) from None
    return prompts


# --- answers ----------------------------------------------------------------------------------


def generate(
    runner: Runner, prompt: np.ndarray, sampler: Sampler, limit: int
) -> tuple[list[int], bool]:
    """(tokens of the answer, whether it stopped by itself). prompt: token ids int32 (n,)."""
    sampler.accept(prompt.tolist())
    logits = runner.begin(prompt, n_ctx=len(prompt) + limit)
    tokens: list[int] = []
    while True:
        if not np.isfinite(logits).all():
            raise BadInput(f"{printable(runner.name)} gives logits that are not finite.")
        token = sampler.draw(logits)
        if token in runner.eos:
            return tokens, True
        tokens.append(token)
        if len(tokens) == limit:
            return tokens, False
        logits = runner.go_on(token)


def answer_prompts(
    runner: Runner,
    prompts: Sequence[Prompt],
    settings: Mapping[str, object],
    seeds: Sequence[int],
    limit: int,
    first: int = 0,
) -> Iterator[Answer]:
    """Every prompt with every seed, from the `first`-th answer on: none hangs on those before it.

    settings: a profile's; limit: tokens of an answer. Raises BadInput if the chat template fails.
    """
    asked = runner.prompts([prompt.text for prompt in prompts])
    wanted = product(zip(prompts, asked, strict=True), seeds)
    for (prompt, text), seed in islice(wanted, first, None):
        ids = runner.tokenize(text, special=True)
        if runner.bos is not None and (len(ids) == 0 or ids[0] != runner.bos):
            ids = np.concatenate([np.array([runner.bos], np.int32), ids])
        sampler = Sampler(settings, seed, runner.text)
        tokens, stopped = generate(runner, ids, sampler, limit)
        yield examine(runner, prompt.name, seed, text, tokens, stopped)


def examine(
    runner: Runner, prompt: str, seed: int, asked: str, tokens: list[int], stopped: bool
) -> Answer:
    """What is to be said of an answer to the prompt text `asked`."""
    text = runner.text(tokens) if tokens else ""
    return Answer(
        prompt=prompt,
        seed=seed,
        n_tokens=len(tokens),
        endless=not stopped,
        period=loop_period(tokens),
        repeated=repeated_share(tokens),
        thought=_thought_length(runner, asked, tokens, text),
        text=text,
    )


def repeated_share(tokens: Sequence[int], n: int = N_GRAM) -> float:
    """Share of the n-grams that occurred before; 0 for texts shorter than two of them."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop_period(tokens: Sequence[int]) -> int | None:
    """Tokens of the piece whose copies the text ends in; None where it does not loop.

    The shortest period p such that the last max(MIN_LOOP, MIN_COPIES * p) tokens repeat after p.
    """
    ids = np.asarray(tokens)
    for p in range(1, len(ids) // MIN_COPIES + 1):
        tail = ids[-max(MIN_LOOP, MIN_COPIES * p) :]
        if len(tail) >= MIN_LOOP and np.array_equal(tail[p:], tail[:-p]):
            return p
    return None


def _thought_length(runner: Runner, asked: str, tokens: list[int], text: str) -> int | None:
    """Tokens before the answer's </think>; None unless it, or the prompt, opened <think>."""
    opened = asked.rstrip().endswith("<think>") or text.lstrip().startswith("<think>")
    if not opened or CLOSE not in text:
        return None
    closing = runner.tokenize(CLOSE, special=True).tolist()
    for i in range(len(tokens) - len(closing) + 1):
        if tokens[i : i + len(closing)] == closing:
            return i
    return len(runner.tokenize(text.partition(CLOSE)[0], special=True))  # cut into other tokens


# --- in sum -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoopReport:
    """Answers with one profile, in sum. Rates are shares of n_answers."""

    profile: str
    limit: int
    n_answers: int
    endless: float
    looping: float
    repeated: float  # mean
    n_thoughts: int  # answers whose thought was closed
    thought_median: float | None  # tokens
    thought_longest: int | None
    by_seed: dict[int, dict[str, float | None]]  # endless looping repeated thought_median


def sum_up(answers: Sequence[Answer], profile: str, limit: int) -> LoopReport:
    """Of at least one answer."""
    thoughts = _thoughts(answers)
    return LoopReport(
        profile=profile,
        limit=limit,
        n_answers=len(answers),
        **_rates(answers),
        n_thoughts=len(thoughts),
        thought_longest=max(thoughts, default=None),
        by_seed={
            seed: _rates([a for a in answers if a.seed == seed])
            for seed in sorted({a.seed for a in answers})
        },
    )


def _rates(answers: Sequence[Answer]) -> dict[str, float | None]:
    thoughts = _thoughts(answers)
    return {
        "endless": float(np.mean([a.endless for a in answers])),
        "looping": float(np.mean([a.loops for a in answers])),
        "repeated": float(np.mean([a.repeated for a in answers])),
        "thought_median": float(np.median(thoughts)) if thoughts else None,
    }


def _thoughts(answers: Sequence[Answer]) -> list[int]:
    return [a.thought for a in answers if a.thought is not None]
