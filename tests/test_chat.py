"""chat: as it is used, through a pseudo-terminal, and its parts on real models."""

import fcntl
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from doctor_helpers import QWEN25, edit, rewrite_gguf
from evaluation_helpers import to_gguf

from quant.chat.answer import FULL, LOOPS, STOPPED
from quant.chat.session import Session
from quant.chat.spelling import Piece, Thoughts, TokenText, visible
from quant.chat.terminal import COMMANDS, Screen
from quant.chat.voice import Turn, find_model, load
from quant.errors import BadInput, BadRecipe, InputMissing, UsageError
from quant.evaluation.loops import generate
from quant.evaluation.sampler import Sampler
from quant.gguf_file import Value
from quant.recipe import Profile
from quant.texts import read_texts

RUN = [sys.executable, "-c", "from quant.cli import main; main()", "chat"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SUM = "What is 47 + 85?"
PROMPT = "\n> "
RIGHT = "47 + 85 = 132"
HOT = ["temp=100", "top_k=0", "top_p=1", "min_p=0"]
GREEDY = Profile(sequence="temperature", temp=0.0)

CYCLE = (3, ">[2J\x1b")
"""What the planted model repeats: as a terminal would obey it, the screen is cleared."""


@pytest.fixture
def copy(tiny_qwq, tmp_path):
    return shutil.copytree(tiny_qwq, tmp_path / "tiny-qwq")


@pytest.fixture(scope="module")
def gguf(tiny_qwq, tmp_path_factory):
    return to_gguf(tiny_qwq, "Q8_0", tmp_path_factory.mktemp("gguf") / "tiny-qwq-Q8_0.gguf")


@pytest.fixture(scope="module")
def voice(gguf):
    """The GGUF file in llama.cpp."""
    found = load(find_model(str(gguf), {}))
    with found.runner:
        yield found


@pytest.fixture(scope="module")
def looping(tiny_qwq, tmp_path_factory):
    """A GGUF file of a model that goes round in CYCLE, whatever it is asked.

    Attention and feed-forward write nothing, so that the last token alone decides on the next.
    """
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("looping")
    model = shutil.copytree(tiny_qwq, folder / "looping-qwq")
    ids = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    cycle = [ids[c] for c in (">", "[", "2", "J", chr(256 + 0x1B))]  # GPT-2's letter for ESC
    w = load_file(model / "model.safetensors")
    for name in w:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            w[name].zero_()
    w["model.norm.weight"].fill_(1)
    embedding, head = w["model.embed_tokens.weight"].zero_(), w["lm_head.weight"].zero_()
    embedding[:, len(cycle)] = 1  # all other tokens lead into the cycle
    head[cycle[0], len(cycle)] = 8
    for i, token in enumerate(cycle):
        embedding[token] = 0
        embedding[token, i] = 1
        head[cycle[(i + 1) % len(cycle)], i] = 8
    save_file(w, model / "model.safetensors", {"format": "pt"})
    return to_gguf(model, "F16", folder / "looping-qwq.gguf")


def ask(session, question, voice=None):
    """An answer drawn to its end, and its pieces put together: (thought, said)."""
    answer = session.ask(voice or session.voices[0], question)
    pieces = list(answer)
    session.keep(question, answer)
    thought, said = ("".join(p.text for p in pieces if p.is_thought is t) for t in (True, False))
    return answer, thought, said


# --- through a pseudo-terminal ----------------------------------------------------------------


class Terminal:
    """A `chat` on a pseudo-terminal of its own, which it is the foreground process of."""

    def __init__(self, *args, **environment):
        self.keyboard, terminal = os.openpty()
        self._child = subprocess.Popen(
            [*RUN, *map(str, args)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is sent to it
            env={
                **os.environ,
                "TERM": "xterm",
                "NO_COLOR": "",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )
        os.close(terminal)
        self._ahead = ""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._child.kill()
        self._child.wait()
        os.close(self.keyboard)

    def read(self, until: str = PROMPT, n_characters: int = 0) -> str:
        """What is printed, up to `until` or so many characters."""
        printed, deadline = self._ahead, time.monotonic() + 60
        while (end := _end(printed, until, n_characters)) is None:
            ready, _, _ = select.select([self.keyboard], [], [], deadline - time.monotonic())
            assert ready, f"{until!r} did not come: {printed!r}"
            printed += os.read(self.keyboard, 4096).decode(errors="replace").replace("\r", "")
        self._ahead = printed[end:]
        if until == PROMPT and not n_characters:
            self._wait_until_it_listens()
        return printed[:end]

    def _wait_until_it_listens(self) -> None:
        """Python sees a signal that comes between prompt and reading only with the next key."""
        stat = Path(f"/proc/{self._child.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":  # asleep
            time.sleep(0.001)

    def type(self, keys: str, until: str = PROMPT) -> str:
        os.write(self.keyboard, keys.encode())
        return self.read(until)

    def say(self, line: str) -> str:
        """A line, and what is printed behind its echo."""
        return self.type(f"{line}\n").partition(line)[2]

    def leave(self, keys: str) -> int:
        os.write(self.keyboard, keys.encode())
        return self._child.wait(timeout=30)

    def end(self, number: int) -> int:
        self._child.send_signal(number)
        return self._child.wait(timeout=30)


def _end(printed: str, until: str, n_characters: int) -> int | None:
    """Where to stop reading; None if it has not been printed yet."""
    if n_characters:
        return n_characters if len(printed) >= n_characters else None
    return printed.index(until) + len(until) if until in printed else None


def story(terminal: Terminal, seed: int) -> str:
    """The beginning of an answer that goes on for about 2048 tokens, up to Ctrl-C."""
    assert f"seed = {seed}" in terminal.say(f":seed {seed}")
    os.write(terminal.keyboard, b"Tell me a story.\n")
    terminal.read(until="\x1b[2m")
    begun = terminal.read(n_characters=60)
    stopped = terminal.type("\x03")
    assert "Note:   Stopped.\n" in stopped and "without this question" in " ".join(stopped.split())
    return begun + stopped.partition("^C")[0]


def test_a_gguf_in_a_terminal(gguf):
    with Terminal(gguf) as terminal:
        greeting = " ".join(terminal.read().split())
        assert 'recipe qwq-32b (for qwen2 called "tiny-qwq"), profile qwen-official' in greeting
        answer = terminal.say(SUM)
        assert "\x1b[2mTens: 40 + 80 = 120." in answer and f"\x1b[0m\n{RIGHT}\n" in answer

        history = terminal.say(":history")
        assert f"You: {SUM}\ntiny-qwq-Q8_0.gguf: {RIGHT}\n" in history and "Tens" not in history

        assert "temp = 100.0  (changed)" in terminal.say(f":conf {' '.join(HOT)}")
        terminal.say(":clear-history")
        answers = [story(terminal, seed) for seed in (5, 6, 5)]
        n = min(map(len, answers))
        assert n > 30 and answers[0][:n] == answers[2][:n] != answers[1][:n]
        assert "Nothing was said yet." in terminal.say(":history")
        assert "reset" not in terminal.say(":reset") and "changed" not in terminal.say(":conf")

        assert "Ctrl-D or :exit leaves." in terminal.type("\x03")  # nothing to stop
        assert "There is no :sed. :help lists" in terminal.say(":sed 3")
        assert "is no seed" in terminal.say(":seed -1")
        helped = terminal.say(":help")
        assert all(f":{command.usage} " in helped for command in COMMANDS)
        terminal.type(":clear\n", until="\x1b[2J")
        terminal.read()
        assert RIGHT in terminal.say(SUM)  # all went on
        assert terminal.leave("\x04") == 0  # Ctrl-D


def test_a_folder_beside_a_model_that_loops(tiny_qwq, looping):
    with Terminal(tiny_qwq, "--compare", looping, NO_COLOR="1") as terminal:
        terminal.read()
        said = terminal.say(SUM)
        first, _, second = said.partition("--- looping-qwq.gguf\n")
        assert (
            first.startswith("\n--- tiny-qwq\n<think>\nTens") and f"</think>\n\n{RIGHT}\n" in first
        )
        assert "\\x1b>[2J" in second and "\x1b" not in said
        assert "It repeats the same 5 tokens" in second and second.count("[2J") < 40
        assert ":conf presence_penalty=1" in " ".join(second.split())
        assert f"tiny-qwq: {RIGHT}\n" in terminal.say(":history")
        assert terminal.end(signal.SIGTERM) == 143


def ask_through_a_pipe(*args, question=SUM):
    return subprocess.run(
        [*RUN, *map(str, args)],
        input=question,
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
    )


def test_a_pipe_gets_the_answer_alone(gguf, copy):
    done = ask_through_a_pipe(gguf, question=f"{SUM}\n:history\n")
    thought, answer = done.stdout.split("</think>\n\n")
    assert thought.startswith("<think>\nTens: 40") and done.returncode == 0
    assert answer == f"{RIGHT}\nYou: {SUM}\n{gguf.name}: {RIGHT}\n"
    assert "recipe qwq-32b" in done.stderr and "recipe" not in done.stdout
    # There is nobody to ask again.
    done = ask_through_a_pipe(gguf, "--context", "16", question=f"{SUM}\n{SUM}\n")
    assert done.returncode == 2 and done.stderr.count("too many for a context of 16") == 1
    edit(copy, "tokenizer_config.json", chat_template=...)
    done = ask_through_a_pipe(copy)
    assert done.returncode == 65 and "fix MODEL -o NEW --apply template-missing" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


# --- text -------------------------------------------------------------------------------------


def test_what_a_terminal_would_obey_is_escaped():
    assert visible("\x1b[2J\x07\r\x9b\x7f\u202e\ud800") == (r"\x1b[2J\x07\r\x9b\x7f\u202e\ud800")
    plain = "a\tb\n你好　\xa0 नमस्ते 👩\u200d👧 ğ\u0301"
    assert visible(plain) == plain


def test_characters_are_given_whole(voice, texts):
    """In a small vocabulary most of the world's characters are several tokens."""
    n_waiting = 0
    for record in read_texts(texts / "languages.jsonl").records:
        tokens = voice.runner.tokenize(record.text[:400], special=True).tolist()
        spelled = TokenText(voice.runner.text)
        pieces = [spelled.add(token) for token in tokens]
        assert "".join(pieces) + spelled.rest() == voice.runner.text(tokens)
        assert "\ufffd" not in "".join(pieces)
        n_waiting += pieces.count("")
    assert n_waiting > 100


def test_bytes_that_are_no_character_hold_nothing_up(voice):
    first, second = voice.runner.tokenize("é", special=True).tolist()  # its two bytes
    assert voice.runner.text([first]) == "\ufffd"
    text = voice.runner.tokenize("yes", special=True).tolist()
    spelled = TokenText(voice.runner.text)
    pieces = [spelled.add(token) for token in [first] * 4 + [second, *text]]
    assert pieces[:4] == ["", "", "", "\ufffd" * 4]
    assert "".join(pieces) == "\ufffd" * 5 + "yes"  # none is lost
    spelled.add(first)
    assert spelled.rest() == "\ufffd"


@pytest.mark.parametrize(
    ("is_open", "text", "thought", "said"),
    [
        (True, "a\nb\n</think>\n\nyes", "a\nb\n", "yes"),
        (True, "a < b </thin </think>yes", "a < b </thin ", "yes"),
        (True, "never closed </thi", "never closed </thi", ""),
        (True, "</think>yes <think> no", "", "yes <think> no"),
        (False, "\n <think>\na</think>\n\nyes\n", "a", "yes\n"),
        (False, "yes </think> no", "", "yes </think> no"),
        (False, "<thin air>", "", "<thin air>"),
        (False, " <thi", "", " <thi"),
        (False, "  yes", "", "  yes"),
    ],
)
def test_thoughts_are_told_from_answers_however_the_text_comes(is_open, text, thought, said):
    for size in range(1, len(text) + 1):
        thoughts, pieces = Thoughts(is_open), []
        for start in range(0, len(text), size):
            pieces += thoughts.add(text[start : start + size])
        pieces += thoughts.rest()
        assert "".join(p.text for p in pieces if p.is_thought) == thought
        assert "".join(p.text for p in pieces if not p.is_thought) == said
        assert all(p.text for p in pieces)


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"TERM": "xterm"}, "\x1b[2mwhy\x1b[0m\n\nyes\n"),
        ({"TERM": "dumb"}, "<think>\nwhy\n</think>\n\nyes\n"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "<think>\nwhy\n</think>\n\nyes\n"),
        ({}, "<think>\nwhy\n</think>\n\nyes\n"),
    ],
)
def test_thoughts_are_dim_where_that_can_be(environment, shown):
    screen = Screen(Tty(), environment)
    for piece in (Piece("wh", True), Piece("y", True), Piece("yes", False)):
        screen.show(piece)
    screen.end()
    screen.end()
    assert screen._out.getvalue() == shown


def test_an_answer_that_is_broken_off_leaves_nothing_dim():
    screen = Screen(Tty(), {"TERM": "xterm"})
    screen.show(Piece("why", True))
    screen.end()
    assert screen._out.getvalue() == "\x1b[2mwhy\x1b[0m\n"


# --- conversations ----------------------------------------------------------------------------


def test_two_turns_make_the_prompt_that_the_template_makes(voice, tiny_qwq):
    """Whole answers or only what was behind their thoughts: QwQ's template makes the same of it."""
    session = Session([voice], GREEDY, 1)
    answer, thought, said = ask(session, SUM)
    assert (answer.ending, said) == (STOPPED, RIGHT) and thought.startswith("Tens")
    assert session.turns == [Turn(SUM, f"<think>\n{answer.text}")]
    prompt = voice.runner.text(voice.prompt(session.turns, "And 1 + 1?").tolist())
    assert prompt == (
        f"<|im_start|>user\n{SUM}<|im_end|>\n<|im_start|>assistant\n{RIGHT}<|im_end|>\n"
        "<|im_start|>user\nAnd 1 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    with load(find_model(str(tiny_qwq), {})).runner as folder:
        assert (
            folder.tokenize(prompt, special=True).tolist()
            == voice.prompt(session.turns, "And 1 + 1?").tolist()
        )


def test_a_template_that_keeps_thoughts_is_given_none(gguf, tmp_path):
    """Qwen2.5's would keep them all; and the system's words are the template's own."""

    def change(metadata):
        metadata["tokenizer.chat_template"] = Value("str", QWEN25)

    keeps = rewrite_gguf(gguf, tmp_path / "qwq-keeps.gguf", change)
    with (kept := load(find_model(str(keeps), {}))).runner:
        turns = [kept.turn(SUM, f"<think>\nTens\n</think>\n\n{RIGHT}")]
        prompt = kept.runner.text(kept.prompt(turns, "And?").tolist())
    assert prompt.startswith("<|im_start|>system\nYou are Qwen")
    assert "Tens" not in prompt and f"assistant\n{RIGHT}<|im_end|>" in prompt


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<think>\nwhy\n</think>\n\nyes", "yes"),
        ("<think>\nwhy", ""),
        ("no thought", "no thought"),
        ("why\n</think>\nyes", "yes"),
    ],
)
def test_the_answer_in_what_was_said(said, answer):
    assert Turn("?", said).answer == answer


def test_both_models_are_told_the_first_one_s_answers(voice, looping):
    with (other := load(find_model(str(looping), {}))).runner:
        session = Session([voice, other], GREEDY, 1)
        ask(session, SUM)
        prompts = [v.prompt(session.turns, "And?").tolist() for v in session.voices]
        answer, _, _ = ask(session, "And?", other)
    assert prompts[0] == prompts[1]
    assert (answer.ending, answer.period) == (LOOPS, 5)
    assert [turn.question for turn in session.turns] == [SUM]  # a loop is not kept


def test_the_same_seed_draws_the_same(voice):
    session = Session([voice], Profile(), 1)
    session.change([*HOT, "dry_multiplier=1"])
    drawn = []
    for seed in ("1", "2", "1"):
        session.set_seed(seed)
        answer = session.ask(voice, "Hi")
        drawn.append([next(pieces) for pieces in [iter(answer)] for _ in range(20)])
        assert answer.ending is None and not session.keep("Hi", answer)
    assert drawn[0] == drawn[2] != drawn[1]


def test_answers_are_drawn_as_evaluate_draws_them(voice):
    profile = Profile(temp=0.9, penalty_repeat=1.5, presence_penalty=1.0, dry_multiplier=1.0)
    prompt = voice.prompt([], SUM)
    sampler = Sampler(profile.settings(), 3, voice.runner.text)
    tokens, _ = generate(voice.runner, prompt, sampler, 100)
    answer, _, _ = ask(Session([voice], profile, 3), SUM)
    assert answer.text.startswith(voice.runner.text(tokens)) and len(tokens) > 20


def test_a_full_context(gguf, voice):
    whole, _, _ = ask(Session([voice], GREEDY, 1), SUM)
    n = len(voice.prompt([], SUM)) + len(voice.runner.tokenize(whole.text, special=True))
    with (small := load(find_model(str(gguf), {}, context=n - 2))).runner:
        session = Session([small], GREEDY, 1)
        answer, thought, said = ask(session, SUM)
        assert answer.ending == FULL and thought and said
        assert answer.text == voice.runner.text(
            voice.runner.tokenize(whole.text, special=True).tolist()[:-2]
        )
        assert not session.turns  # it is no whole answer
        with pytest.raises(UsageError, match=f"too many for a context of {n - 2}"):
            session.ask(small, SUM * 9)


def test_settings(voice):
    session = Session([voice], Profile(temp=0.6, sequence="top_k;temperature"), 1)
    assert session.settings["top_k"] == 40 and session.changed == set()
    session.change(["temp=1", "top_k=7"])
    assert (session.settings["temp"], session.changed) == (1.0, {"temp", "top_k"})
    for words, error in (
        (["temp"], "KEY=VALUE"),
        (["tmp=1"], "no setting tmp"),
        (["temp=hot"], "temp cannot be 'hot'"),
        (["top_k=1.5"], "top_k cannot be 1.5"),
        (["top_p=nan"], "top_p cannot be nan"),
        (["top_k=9", "min_p=2"], "min_p cannot be 2"),
        (["mirostat=1"], "no setting mirostat"),
        (["sequence=top_k,temperature"], "';' alone"),
        (["presence_penalty=1"], "`penalties` is none of"),
    ):
        with pytest.raises((UsageError, BadRecipe)) as raised:
            session.change(words)
        assert error in str(raised.value)
        assert session.settings["top_k"] == 7  # all or none
    session.reset()
    assert session.changed == set()
    assert session.against_loops() == "another :seed"
    session.change(["sequence=dry;temperature"])
    assert "dry_multiplier" in session.against_loops()
    for seed in ("", "-1", "1.5", "9" * 30, "²"):
        with pytest.raises(UsageError):
            session.set_seed(seed)
    with pytest.raises(BadRecipe, match="Mirostat"):
        Session([voice], Profile(mirostat=1), 1)


# --- models that cannot chat ------------------------------------------------------------------


def test_models_that_cannot_chat(copy, gguf, tmp_path):
    def without(key):
        return rewrite_gguf(gguf, tmp_path / f"qwq-{key[-8:]}.gguf", lambda keys: keys.pop(key))

    with pytest.raises(BadInput, match=r"no chat template(?s:.*)to-gguf FILE -o NEW --chat"):
        find_model(str(without("tokenizer.chat_template")), {})
    with pytest.raises(BadInput, match="cannot load"):
        load(find_model(str(without("tokenizer.ggml.tokens")), {}))
    with pytest.raises(UsageError, match="2048"):
        find_model(str(copy), {}, context=4096 * 4)
    with pytest.raises(UsageError, match="YaRN"):
        find_model(str(copy), {}, context=4096)
    spelled = json.loads((copy / "tokenizer.json").read_text())
    spelled["model"] |= {"vocab": {}, "merges": []}
    (copy / "tokenizer.json").write_text(json.dumps(spelled))
    with pytest.raises(BadInput, match="tokenizer of tiny-qwq loses"):
        load(find_model(str(copy), {}))
    (copy / "tokenizer.json").unlink()  # of nothing transformers makes an empty one
    with pytest.raises(InputMissing, match="holds no tokenizer"):
        load(find_model(str(copy), {}))
    (copy / "config.json").unlink()
    with pytest.raises(InputMissing, match=r"no config\.json"):
        find_model(str(copy), {})


def test_a_hostile_template_is_refused_and_not_run(copy, tmp_path):
    edit(copy, "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__ }}")
    with pytest.raises(BadInput, match="makes no prompt"):
        find_model(str(copy), {})
    edit(copy, "tokenizer_config.json", chat_template="Q: what?")
    with pytest.raises(BadInput, match="leaves the question out"):
        find_model(str(copy), {})
    # One that waits for its second question.
    later = "{% if messages|length > 1 %}{{ ''.__class__.__mro__ }}{% endif %}"
    later += "{{ messages[-1].content }}"
    edit(copy, "tokenizer_config.json", chat_template=later)
    with (voice := load(find_model(str(copy), {}))).runner:
        assert len(voice.prompt([], SUM)) > 0
        with pytest.raises(BadInput, match="unsafe"):
            voice.prompt([Turn(SUM, RIGHT)], SUM)


def test_a_bitsandbytes_folder_beside_a_gguf(tiny_qwq, voice, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tiny_qwq, quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    folder = tmp_path / "tiny-qwq-nf4"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_qwq / name, folder)
    found = find_model(str(folder), {})
    assert found.run.profile_name == "qwen-official"
    with (quantized := load(found)).runner:
        session = Session([quantized, voice], found.run.profile, 1)
        for each in session.voices:
            answer, thought, said = ask(session, SUM, each)
            assert answer.ending == STOPPED and thought.startswith("Tens: 40 + 80 = 120.")
            assert said == RIGHT


def test_logits_that_are_not_finite(voice, monkeypatch):
    broken = np.full(voice.runner.n_vocab, np.nan, np.float32)
    monkeypatch.setattr(type(voice.runner), "go_on", lambda *args: broken)
    with pytest.raises(BadInput, match="not finite"):
        ask(Session([voice], GREEDY, 1), SUM)
