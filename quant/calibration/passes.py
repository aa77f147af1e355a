"""Passes over a model's layers, each continued where an interrupted run left it.

    passes = journal.hold(Passes(journal))
    journal.begin(passes.take_up(len(journal.units)))
    ...
    walk = passes.begin("imatrix", model.n_layers)
    hidden = model.embed(tokens)
    walk.restore("hidden", hidden.tensor)
    for layer in model.layers(seq_len, n_done=walk.n_done):
        ...                                     # changes hidden and finds something out
        walk.done({"hidden": hidden.tensor}, facts=found_out)

What the next step needs is a state: arrays, of which the hidden states are 1.3 GB for 64k tokens of
QwQ-32B. States lie in a hidden folder, .NAME.states beside .NAME.journal. Of a pass there are two
files in turn, so that the last good state is never overwritten; and a file is written again only
when the state that is newer than its own has reached the disk, with its line in the journal:

    {"pass": "imatrix", "step": 6, "of": 64, "facts": ...}
    {"pass": "imatrix", "step": 7, "of": 64, "facts": ..., "state": {"file": "imatrix.1", "at": 0,
     "nbytes": 1342177280, "xxh3": "5e1c...", "arrays": {"hidden": ["torch.float32", [...], ...]}}}

A state is saved only so often that saving takes a tenth of the time, and whenever the user wants to
stop. Steps that no saved state is behind are not in the journal: they are not finished. Facts are
of one step, as JSON, and short; a pass that is finished has them all at once, without its states.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from xxhash import xxh3_128

from quant.calibration.hidden_states import StatesFile, bytes_of
from quant.durable import (
    PendingFile,
    flush_folder,
    states_folder,
    temporary_path,
    translated_errors,
)
from quant.journal import Journal
from quant.sinks.written import is_there

PATIENCE = 9
"""So many times as long as saving the last state took, at least, is computed before the next."""

BLOCK_NBYTES = 8 << 20
"""Hashed, then written: while it is in the processor's cache."""

State = Mapping[str, torch.Tensor | np.ndarray]
"""Arrays by name, contiguous, on the CPU."""


class Passes:
    """All passes of one output. With a journal that keeps nothing, or none, nothing is written.

    For Journal.hold: what it does to held data is done to the states.
    """

    def __init__(self, journal: Journal | None = None):
        self._journal = journal if journal is not None and journal.keeps_work else None
        self._folder = states_folder(journal.output) if journal is not None else Path()
        self._units: dict[str, list[dict]] = {}  # pass -> its units in the journal
        self._files: dict[str, PendingFile] = {}
        self._has_new_names = False
        self._saved_at, self._took = time.monotonic(), 0.0

    # --- the passes ---------------------------------------------------------------------------

    def take_up(self, n_units: int) -> int:
        """Of the journal's first n units, those to go on behind: all that is needed then is there.

        Units of others than passes may be among them. Where a pass is in the middle, they count
        only as far as its last saved state.
        """
        units = self._journal.units if self._journal else []
        self._units, known = {}, {}
        for n in range(min(n_units, len(units)), 0, -1):
            with suppress(KeyError, TypeError, ValueError):  # no units of ours
                found = _by_pass(units[:n])
                if found is not None and all(self._is_there(s, known) for s in _needed(found)):
                    self._units = found
                    return n
        return 0

    @property
    def keeps_work(self) -> bool:
        return self._journal is not None

    def begin(
        self, name: str, n_steps: int, until: str = "", into: StatesFile | None = None
    ) -> "Pass":
        """The pass of that name, which no other of this output has. One begins when another ends.

        n_steps: what it has in all. until: the pass that needs what this one leaves; when that is
        finished, it is removed. into: a file that keeps the state behind every step, as the entry
        of the number of steps done, because the later pass needs them all.
        """
        found = self._units.get(name, [])
        if found and found[0]["of"] != n_steps:
            found = []
        if self._journal:
            self._units[name] = list(found)
            self._remove_unneeded({into.kept.path.name} if into is not None else set())
        return Pass(self, found, into, {"pass": name, "of": n_steps, "until": until})

    def once(self, name: str, make: Callable[[], object]) -> object:
        """What `make()` gives, JSON; no run makes it again that goes on with this one."""
        step = self.begin(name, 1)
        if not step.finished:
            step.done({}, facts=make())
        return step.facts[0]

    def file(self, name: str) -> PendingFile | None:
        """A file of that name for a StatesFile; None if nothing is kept."""
        return self._open(name) if self._journal else None

    # --- saving -------------------------------------------------------------------------------

    def is_time(self) -> bool:
        """Whether a state is to be saved now."""
        waited = time.monotonic() - self._saved_at
        return self._journal.stopping or waited >= PATIENCE * self._took

    def save(self, file: str, arrays: State) -> dict:
        """Write a state; what the journal is to say of it. Raises OutputFailed."""
        pending, digest, at, described = self._open(file), xxh3_128(), 0, {}
        for name, array in arrays.items():
            data = _bytes(array)
            described[name] = [str(array.dtype), list(array.shape), len(data)]
            for start in range(0, len(data), BLOCK_NBYTES):
                block = data[start : start + BLOCK_NBYTES]
                digest.update(block)
                pending.write_at(at + start, block)
            at += len(data)
        return _state(file, 0, at, digest.hexdigest(), described)

    def note(self, units: list[dict]) -> None:
        """Steps of a pass are finished, the last of them with its state.

        Raises OutputFailed, and Stopped if the user wants it.
        """
        *before, last = units
        self._units[last["pass"]] += units
        for unit in before:
            self._journal.append(unit, may_stop=False)
        self._journal.append(last, last["state"]["nbytes"] if "state" in last else 0)

    def settle(self, started: float) -> None:
        """Wait until all is on the disk, where saving began then: older states may go now."""
        self._journal.flush()
        self._saved_at = time.monotonic()
        self._took = self._saved_at - started

    def read(self, state: dict, name: str, into: torch.Tensor | np.ndarray) -> None:
        """An array of a saved state. Raises ValueError if it is of another type or shape."""
        at, arrays = state["at"], state["arrays"]
        dtype, shape, _ = arrays[name]
        if (str(into.dtype), list(into.shape)) != (dtype, shape):
            raise ValueError(f"{name} was saved as {dtype} {shape}, not {into.dtype} {into.shape}")
        for before, (_, _, nbytes) in arrays.items():
            if before == name:
                break
            at += nbytes
        view, descriptor = _bytes(into), self._open(state["file"]).descriptor
        while view:  # the system reads 2 GB at a time
            n = os.preadv(descriptor, [view], at)
            if not n:
                raise EOFError(f"the state of {name} became shorter")
            view, at = view[n:], at + n

    # --- the files ----------------------------------------------------------------------------

    def _open(self, file: str) -> PendingFile:
        """A file of states, as it is, or empty. Raises OutputFailed or CannotCreate."""
        if file not in self._files:
            if not self._folder.exists():
                with translated_errors(self._folder):
                    os.mkdir(self._folder)
            self._files[file] = PendingFile(self._folder / file, taken_up=True)
            self._has_new_names = True
        return self._files[file]

    def _is_there(self, state: dict, known: dict[tuple, bool]) -> bool:
        """Whether a state can be read as it was saved; known: what was found out before."""
        key = state["file"], state["at"], state["xxh3"]
        if key not in known:
            known[key] = temporary_path(self._folder / state["file"]).is_file() and is_there(
                self._open(state["file"]), *(state[k] for k in ("at", "nbytes", "xxh3")),
                lambda: None,
            )  # fmt: skip
        return known[key]

    def _remove_unneeded(self, needed: set[str]) -> None:
        """Remove all files but these, and those that hold what a pass, or another run, needs."""
        needed = needed | {state["file"] for state in _needed(self._units)}
        for file in self._files.keys() - needed:
            self._files.pop(file).discard()
        for place in self._folder.glob(".*.partial"):  # an earlier run's
            if place.name not in {temporary_path(self._folder / file).name for file in needed}:
                with suppress(OSError):
                    os.unlink(place)

    # --- as held by the journal ---------------------------------------------------------------

    @property
    def flush_failed(self) -> bool:
        return any(file.flush_failed for file in self._files.values())

    def flush(self) -> None:
        """In the journal's other thread or in this one."""
        for file in list(self._files.values()):
            file.flush()
        if self._has_new_names:
            self._has_new_names = False
            with translated_errors(self._folder):
                flush_folder(self._folder)

    def keep(self) -> None:
        for file in self._files.values():
            file.keep()

    def discard(self) -> None:
        for file in self._files.values():
            file.discard()
        rmtree(self._folder, ignore_errors=True)


UNKEPT = Passes()
"""Passes of which nothing is written, and none is continued."""


class Pass:
    """Steps of which each needs what the one before left. Made by Passes.begin."""

    def __init__(self, passes: Passes, found: list[dict], into: StatesFile | None, about: dict):
        self._passes, self._into, self._about = passes, into, about
        self.n_done = len(found)
        """So many steps need not be made, the first ones."""
        self.facts = [unit["facts"] for unit in found]
        """What each of them found out."""
        self._state = found[-1].get("state", _NONE) if found else _NONE
        self._pending: list[dict] = []  # units that are not in the journal yet

    @property
    def finished(self) -> bool:
        return self.n_done == self._about["of"]

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what the last of the steps left; empty if none was made."""
        return {name: tuple(shape) for name, (_, shape, _) in self._state["arrays"].items()}

    def restore(self, name: str, into: torch.Tensor | np.ndarray) -> None:
        """Fill an array as it was behind the last of the steps; untouched if none was made.

        Raises KeyError if it was not kept.
        """
        if self.n_done:
            self._passes.read(self._state, name, into)

    def done(self, needed: State, kept: State | None = None, facts: object = None) -> None:
        """A step is made. needed: what the next step needs; kept: what is also needed later.

        They are read now or never; behind the last step, only `kept` is saved.
        Raises OutputFailed, and Stopped, with all saved, if the user wants it.
        """
        facts = json.loads(json.dumps(facts))  # the same whether a run goes on or does all
        unit = {**self._about, "step": self.n_done, "facts": facts}
        self.n_done += 1
        self.facts.append(facts)
        if not self._passes.keeps_work:
            return
        self._pending.append(unit)
        if self._into is not None:
            unit["state"] = self._state = _noted(self._into, self.n_done, needed)
            self._note()
        elif self.finished or self._passes.is_time():
            started = time.monotonic()
            state = {**({} if self.finished else needed), **(kept or {})}
            if state or not self.finished:
                unit["state"] = self._state = self._passes.save(self._next_file(), state)
            self._note()
            self._passes.settle(started)

    def _next_file(self) -> str:
        """Not the one that holds the last state."""
        slot = 1 if self._state["file"].endswith(".0") else 0
        return f"{self._about['pass']}.{slot}"

    def _note(self) -> None:
        units, self._pending = self._pending, []
        self._passes.note(units)


# --- units and states -----------------------------------------------------------------------------

_FILE = re.compile(r"\w[\w .-]*")


def _state(file: str, at: int, nbytes: int, xxh3: str, arrays: dict) -> dict:
    return {"file": file, "at": at, "nbytes": nbytes, "xxh3": xxh3, "arrays": arrays}


_NONE = _state("", 0, 0, "", {})


def _noted(into: StatesFile, i: int, needed: State) -> dict:
    """The state that is the i-th entry of a file; it is there already."""
    ((name, states),) = needed.items()
    data = _bytes(states)
    described = {name: [str(states.dtype), list(states.shape), len(data)]}
    at, digest = i * into.nbytes, xxh3_128(data).hexdigest()
    return {**_state(into.kept.path.name, at, len(data), digest, described), "all": True}


def _bytes(array: torch.Tensor | np.ndarray) -> memoryview:
    """The memory of a contiguous array on the CPU."""
    if isinstance(array, torch.Tensor):
        return bytes_of(array)
    return memoryview(array.reshape(-1).view(np.uint8))


def _by_pass(units: list) -> dict[str, list[dict]] | None:
    """The units of each pass; None if one cannot go on behind the last of `units`."""
    found: dict[str, list[dict]] = {}
    current: dict | None = None
    for unit in units:
        if not isinstance(unit, dict) or "pass" not in unit:
            continue
        if unit["step"] == 0:
            found[unit["pass"]] = []
        found[unit["pass"]].append(unit)
        current = unit
    in_the_middle = current is not None and current["step"] + 1 < current["of"]
    if in_the_middle and not (current is units[-1] and "state" in current):
        return None
    return found


def _needed(found: dict[str, list[dict]]) -> list[dict]:
    """The states that passes with these units need to go on, or to be of use later."""
    states = []
    for units in found.values():
        until = found.get(units[-1]["until"]) if units else None
        if until and until[-1]["step"] + 1 == until[-1]["of"]:
            continue
        *before, last = [unit["state"] for unit in units if "state" in unit] or [None]
        if last is not None and last is units[-1].get("state"):
            states += [*(before if "all" in last else []), last]
    return states
