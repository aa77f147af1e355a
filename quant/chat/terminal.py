"""The terminal's side of a conversation: lines in, commands, answers as they come.

Answers and what commands reply go to stdout, notes to stderr, so that

    echo 'What is 47 + 85?' | qwq-quant chat MODEL > answer.txt

holds the answer alone. Commands are those of Qwen's own demo.
# ref: https://github.com/QwenLM/Qwen/blob/main/cli_demo.py
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

from quant.chat.answer import FULL, LOOPS, STOPPED, Answer
from quant.chat.session import Session
from quant.chat.spelling import Piece, visible
from quant.chat.voice import Voice
from quant.display import printable
from quant.errors import QwqQuantError, UsageError

DIM, PLAIN, CLEAR = "\x1b[2m", "\x1b[0m", "\x1b[2J\x1b[H"

LEAVE = object()


class Screen:
    """Where answers are shown; thoughts dimmed, or between their tags where nothing can be dim."""

    def __init__(self, out: TextIO, environment: Mapping[str, str] = os.environ):
        self._out, self._thinking, self._at_line_start = out, False, True
        dumb = environment.get("TERM", "dumb") == "dumb" or environment.get("NO_COLOR")
        self.has_styles = out.isatty() and not dumb

    def show(self, piece: Piece) -> None:
        """A piece of an answer, made harmless."""
        if piece.is_thought != self._thinking:
            self._switch()
        self._write(visible(piece.text))

    def end(self) -> None:
        """The end of an answer, or of what there is of it."""
        if self._thinking and self.has_styles:
            self._out.write(PLAIN)
        self._thinking = False
        self._new_line()

    def line(self, text: str = "") -> None:
        """A line of our own words, in which all that is foreign was made harmless."""
        self._new_line()
        self._write(f"{text}\n")

    def clear(self) -> None:
        if self.has_styles:
            self._write(CLEAR)

    def _switch(self) -> None:
        """From thought to answer, or the other way."""
        if self._thinking:
            self._out.write(PLAIN if self.has_styles else "")
            self._new_line()
            self._write("\n" if self.has_styles else "</think>\n\n")
        else:
            self._write(DIM if self.has_styles else "<think>\n")
        self._thinking = not self._thinking
        self._at_line_start = True

    def _new_line(self) -> None:
        if not self._at_line_start:
            self._write("\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
        self._at_line_start = text.endswith("\n")


class Terminal:
    """Reads questions and commands until there are no more. `run` is all that others need."""

    def __init__(self, session: Session, note: Callable[[str], None]):
        """note: tells the user something beside the answers."""
        self._session, self._note = session, note
        self._screen = Screen(sys.stdout)
        self._interactive = sys.stdin is not None and sys.stdin.isatty()

    def run(self) -> None:
        """Raises QwqQuantError for a question that fails, if nobody is there to ask another."""
        if self._interactive:
            with suppress(ImportError):
                import readline  # noqa: F401, makes the line that input() reads editable
        goes_on = True
        while goes_on and (line := self._read()) is not None:
            try:
                goes_on = self._obey(line)
            except KeyboardInterrupt as interrupt:
                _only_ctrl_c(interrupt)
                self._screen.end()
                self._note("Stopped.")
            except QwqQuantError as error:
                if not self._interactive:
                    raise
                self._screen.end()
                self._note(str(error))

    def _read(self) -> str | None:
        """What was typed; None at the end of input (Ctrl-D)."""
        while sys.stdin is not None:
            try:
                line = input("\n> " if self._interactive else "")
                return line.encode(errors="replace").decode().strip()
            except EOFError:
                if self._interactive:
                    self._screen.line()
                return None
            except UnicodeDecodeError:
                self._note("That was no UTF-8 text.")
            except KeyboardInterrupt as interrupt:
                _only_ctrl_c(interrupt)
                self._screen.line()
                self._note("Ctrl-D or :exit leaves.")
        return None

    def _obey(self, line: str) -> bool:
        """Ask a question or carry out a command; whether to go on."""
        if not line.startswith(":") or not line[1:2].isalpha():
            if line:
                self._ask(line)
            return True
        word, *rest = line[1:].split()
        command = next((c for c in COMMANDS if word in c.names), None)
        if command is None:
            raise UsageError(
                f"There is no :{printable(word, 40)}.", "", ":help lists the commands."
            )
        return command.act(self, rest) is not LEAVE

    # --- questions ---

    def _ask(self, question: str) -> None:
        voices = self._session.voices
        for voice in voices:
            if len(voices) > 1:
                self._screen.line(f"--- {printable(voice.name)}")
            answer = self._session.ask(voice, question)
            self._show(answer)
            if why := self._why_it_ended(voice, answer):
                self._note(why)
            if voice is voices[0] and not self._session.keep(question, answer):
                self._note("The conversation goes on without this question and its answer.")

    def _show(self, answer: Answer) -> None:
        """An answer as it comes; Ctrl-C ends it."""
        try:
            for piece in answer:
                self._screen.show(piece)
        except KeyboardInterrupt as interrupt:
            _only_ctrl_c(interrupt)
        finally:
            self._screen.end()

    def _why_it_ended(self, voice: Voice, answer: Answer) -> str:
        """What is to be said of an answer that is not a whole one, else ""."""
        if answer.ending == LOOPS:
            return (
                f"It repeats the same {answer.period} tokens over and over, so it was stopped. Try "
                f"{self._session.against_loops()}. If it loops with every seed, see what is wrong "
                "with the model: qwq-quant doctor MODEL"
            )
        if answer.ending == FULL:
            return (
                f"The context of {voice.context} tokens is full, so the answer was cut off. "
                ":clear-history makes room, --context starts with more."
            )
        if answer.ending == STOPPED:
            has_answer = voice.turn("", answer.text).answer.strip()
            return "" if has_answer else "It stopped without an answer."
        return "Stopped."

    # --- commands ---

    def _help(self, words: list[str]) -> None:
        for command in COMMANDS:
            short = ", ".join(f":{name}" for name in command.names[1:])
            about = f"{command.about} ({short})" if short else command.about
            self._screen.line(f"  :{command.usage:<22} {about}")
        self._screen.line("  Ctrl-C stops an answer, Ctrl-D leaves. All else is a question.")

    def _leave(self, words: list[str]) -> object:
        return LEAVE

    def _clear(self, words: list[str]) -> None:
        self._screen.clear()

    def _forget(self, words: list[str]) -> None:
        self._screen.line(f"Forgotten: {self._session.forget()} questions and their answers.")

    def _history(self, words: list[str]) -> None:
        if not self._session.turns:
            self._screen.line("Nothing was said yet.")
        for turn in self._session.turns:
            self._screen.line(f"You: {visible(turn.question)}")
            self._screen.line(f"{printable(self._session.voices[0].name)}: {visible(turn.answer)}")

    def _seed(self, words: list[str]) -> None:
        if words:
            self._session.set_seed(" ".join(words))
        self._screen.line(f"seed = {self._session.seed}")

    def _conf(self, words: list[str]) -> None:
        if words:
            self._session.change(words)
        for name, value in self._session.settings.items():
            mark = "  (changed)" if name in self._session.changed else ""
            self._screen.line(f"{name} = {visible(str(value))}{mark}")

    def _reset(self, words: list[str]) -> None:
        self._session.reset()
        self._screen.line("The settings are the profile's again.")


def _only_ctrl_c(interrupt: KeyboardInterrupt) -> None:
    """Raise it again if it stands for another signal, such as SIGTERM: that ends the program."""
    if type(interrupt) is not KeyboardInterrupt:
        raise interrupt


@dataclass(frozen=True)
class Command:
    """What is typed behind a colon. names: the first is the whole one; act may return LEAVE."""

    names: tuple[str, ...]
    usage: str
    about: str
    act: Callable[[Terminal, list[str]], object]


COMMANDS = (
    Command(("help", "h"), "help", "this list", Terminal._help),
    Command(("exit", "quit", "q"), "exit", "leave", Terminal._leave),
    Command(("clear", "cl"), "clear", "clear the screen", Terminal._clear),
    Command(("clear-history", "clear-his", "clh"), "clear-history", "begin anew", Terminal._forget),
    Command(("history", "his"), "history", "what was said, without thoughts", Terminal._history),
    Command(("seed",), "seed [N]", "show or set the seed of every answer", Terminal._seed),
    Command(("conf",), "conf [KEY=VALUE ...]", "show or change the settings", Terminal._conf),
    Command(("reset", "reset-conf"), "reset", "the profile's settings again", Terminal._reset),
)
