"""A conversation: what was said, the seed, and the settings, which may be changed as it goes."""

from collections.abc import Sequence

from pydantic import ValidationError

from quant.chat.answer import STOPPED, Answer
from quant.chat.voice import Voice
from quant.display import printable
from quant.errors import UsageError
from quant.evaluation.sampler import DEFAULTS, Sampler
from quant.recipe import Profile

LARGEST_SEED = 2**63 - 1


class Session:
    """Questions to one model, or each to two: both see the first one's answers as their history.

    So the prompt is the same for both, however far their answers are apart. Only answers that the
    model ended by itself are kept.
    """

    def __init__(self, voices: Sequence[Voice], profile: Profile, seed: int):
        """Raises BadRecipe for a profile that cannot be sampled here."""
        self.voices, self.seed, self.turns = list(voices), seed, []
        self._original = self._profile = _sampled(profile)

    def ask(self, voice: Voice, question: str) -> Answer:
        """An answer to be drawn. Raises BadInput, UsageError if there is no room for it."""
        prompt = voice.prompt(self.turns, question)
        if len(prompt) >= voice.context:
            raise UsageError(
                f"The conversation and this question have {len(prompt)} tokens: too many for "
                f"a context of {voice.context}.",
                "",
                "Ask something shorter, begin anew with :clear-history, or start with a larger "
                "--context.",
            )
        return Answer(voice, prompt, self._profile.settings(), self.seed)

    def keep(self, question: str, answer: Answer) -> bool:
        """Whether it became part of the conversation: an answer of the first model that is one."""
        turn = self.voices[0].turn(question, answer.text)
        if answer.ending != STOPPED or not turn.answer.strip():
            return False
        self.turns.append(turn)
        return True

    def forget(self) -> int:
        """Begin anew; how many questions there were."""
        n, self.turns = len(self.turns), []
        return n

    # --- settings ---

    @property
    def settings(self) -> dict[str, object]:
        """Everything that sampling looks at; what the profile leaves out is llama.cpp's default."""
        return {**DEFAULTS, **self._profile.settings()}

    @property
    def changed(self) -> set[str]:
        """Names of settings that are not the profile's any more."""
        original = {**DEFAULTS, **self._original.settings()}
        return {name for name, value in self.settings.items() if original[name] != value}

    def set_seed(self, text: str) -> None:
        """Raises UsageError for what is no seed."""
        if not text.isascii() or not text.isdecimal() or int(text[:20]) > LARGEST_SEED:
            raise UsageError(f"{printable(text, 40)} is no seed.", "", "Write a number: :seed 42")
        self.seed = int(text)

    def change(self, words: Sequence[str]) -> None:
        """["temp=0.7", "top_k=20"]: all of them, or none. Raises UsageError or BadRecipe."""
        changes = {}
        for word in words:
            name, equals, value = word.partition("=")
            if not equals:
                raise UsageError(f"{printable(word, 60)} is not written as KEY=VALUE.")
            changes[name] = _number(value)
        self._profile = _sampled(_changed(self._profile, changes))

    def against_loops(self) -> str:
        """What may help against repetition and would act, in words."""
        samplers = str(self.settings["sequence"]).split(";")
        if "penalties" in samplers:
            return "another :seed, or :conf presence_penalty=1"
        if "dry" in samplers:
            return "another :seed, or :conf dry_multiplier=1"
        return "another :seed"

    def reset(self) -> None:
        """The profile's own settings again."""
        self._profile = self._original


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _changed(profile: Profile, changes: dict) -> Profile:
    """Raises UsageError with the first mistake, BadRecipe for a penalty that would not act."""
    unknown = [name for name in changes if name not in DEFAULTS]
    if unknown:
        raise UsageError(
            f"There is no setting {printable(unknown[0], 60)}.",
            "",
            f"There are: {', '.join(DEFAULTS)}.",
        )
    try:
        return Profile(**{**profile.settings(), **changes})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        value = printable(repr(first["input"]), 60)
        raise UsageError(
            f"{'.'.join(map(str, first['loc']))} cannot be {value}.", f"{printable(first['msg'])}."
        ) from None


def _sampled(profile: Profile) -> Profile:
    """The profile, if our samplers can follow it. Raises BadRecipe."""
    Sampler(profile.settings(), 0, lambda tokens: "")
    return profile
