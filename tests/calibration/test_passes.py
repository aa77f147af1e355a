"""Passes that were ended at any moment go on to the same result, and make no step twice."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from quant import check_weights
from quant.calibration import passes as passes_module
from quant.calibration.feedback import quantize_streamed
from quant.calibration.needs import FEEDBACK, GRADIENT, of_check
from quant.calibration.passes import UNKEPT, Passes
from quant.calibration.streamed_model import StreamedModel
from quant.calibration.tokens import Tokens
from quant.calibration.weights import ChangedWeights, CheckpointWeights
from quant.checkpoint import Checkpoint
from quant.groups import find_groups
from quant.journal import Journal, Resume, Stopped
from quant.measuring.gradient import measure_gradient

IDS = np.random.default_rng(0).integers(0, 4090, (2, 12))
TOKENS = Tokens(IDS, "text", "")
N_STEPS = 3 + 2 * 3 + 1 + 3 + 4
"""quantize, check of two models, their comparison, gradient there and back with the head."""


def coarse(w: torch.Tensor) -> torch.Tensor:
    return (w * 8).round() / 8


def walk(checkpoint: Checkpoint, passes: Passes) -> list:
    """Three jobs that go through the layers, as JSON."""
    groups = find_groups(checkpoint.tensors.values())
    steps = []

    def quantize(name, W, H):
        return coarse(W)

    model = StreamedModel(checkpoint)
    hidden = quantize_streamed(model, groups, IDS, quantize, steps.append, passes)
    names = frozenset(f"{name}.weight" for group in groups for name in group.modules)
    other = ChangedWeights(CheckpointWeights(checkpoint), names, lambda _, w: coarse(w))
    candidates = [check_weights.Candidate("coarse", 1, other)]
    rows = check_weights.check_weights(checkpoint, candidates, TOKENS, "cpu", steps.append, passes)
    damage = measure_gradient(model, groups, IDS, coarse, steps.append, passes)
    return json.loads(json.dumps([hidden.tensor.sum().item(), *map(vars, rows), damage]))


def run(output, checkpoint, resume=None, job=1):
    """All of it as a command does it."""
    with Journal(output, {"job": job}, resume or Resume(), "steps", N_STEPS) as journal:
        passes = journal.hold(Passes(journal))
        journal.begin(passes.take_up(len(journal.units)))
        found = walk(checkpoint, passes)
        journal.complete({})
    return found


@pytest.fixture(scope="module")
def checkpoint(made_models):
    return Checkpoint.open(made_models("qwen2")[0])


@pytest.fixture(scope="module")
def undisturbed(checkpoint):
    return walk(checkpoint, UNKEPT)


@pytest.fixture
def loaded(monkeypatch) -> list[int]:
    """The layers that were loaded, one after the other."""
    load, indices = StreamedModel._load, []
    monkeypatch.setattr(
        StreamedModel, "_load", lambda self, i, n: indices.append(i) or load(self, i, n)
    )
    return indices


@pytest.fixture
def always_saving(monkeypatch):
    monkeypatch.setattr(passes_module, "PATIENCE", 0)


ALL_LAYERS = [0, 1, 2] * 4 + [2, 1, 0]


def test_the_user_may_stop_behind_every_step(checkpoint, undisturbed, loaded, tmp_path):
    """Whether or not it was time to save: what a next run needs is written then."""
    output, said = tmp_path / "out", []
    for n in range(1, N_STEPS + 1):
        resume = Resume(say=said.append)
        resume.stop.make()
        with pytest.raises(Stopped, match=f"{n} of {N_STEPS} steps are finished and kept"):
            run(output, checkpoint, resume)
        assert {p.name for p in tmp_path.iterdir()} == {".out.journal", ".out.states"}
    assert run(output, checkpoint, Resume(say=said.append)) == undisturbed
    assert loaded == ALL_LAYERS
    assert f"Going on after {N_STEPS} of {N_STEPS} steps" in said[-1]
    assert not list(tmp_path.iterdir())


def test_a_stop_saves_though_it_is_not_time(checkpoint, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(passes_module, "PATIENCE", 1e9)
    resume, load = Resume(), StreamedModel._load

    def stopping(self, i, n):
        if i == 1:
            resume.stop.make()
        return load(self, i, n)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="2 of"):
        patch.setattr(StreamedModel, "_load", stopping)
        run(tmp_path / "out", checkpoint, resume)
    assert go_on(tmp_path, checkpoint) == (undisturbed, 2)


def test_a_state_is_written_over_only_when_the_next_has_reached_the_disk(
    checkpoint, always_saving, tmp_path, monkeypatch
):
    """Else a power cut could take both."""
    events = []

    def watched(name: str, honest):
        def operation(descriptor, *args):
            events.append((name, os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
            return honest(descriptor, *args)

        return operation

    for name in ("pwrite", "fsync"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    run(tmp_path / "out", checkpoint)
    written = [
        i for i, event in enumerate(events) if re.search(r"pwrite.*\.[01]\.partial", str(event))
    ]
    assert len(written) > 10
    for i in written:
        _, file = events[i]
        wanted = [("pwrite", ".out.journal"), ("fsync", file), ("fsync", ".out.journal")]
        behind = iter(events[i + 1 : [*written, len(events)][written.index(i) + 1]])
        assert all(event in behind for event in wanted), events[i : i + 9]


def images_of_every_operation(folder, monkeypatch, job) -> list:
    """What a kill leaves in the folder: copies of it, before every write, cut and removal."""
    images = []

    def watched(honest):
        def operation(*args, **kwargs):
            images.append(folder.with_name(f"image {len(images)}"))
            shutil.copytree(folder, images[-1])
            return honest(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for name in ("pwrite", "ftruncate", "unlink", "replace"):
            patch.setattr(os, name, watched(getattr(os, name)))
        job()
    return images


@pytest.mark.parametrize("patience", [0, 1e9], ids=["always saving", "hardly ever"])
def test_a_kill_at_any_moment(patience, checkpoint, undisturbed, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(passes_module, "PATIENCE", patience)
    folder = tmp_path / "run"
    folder.mkdir()
    images = images_of_every_operation(folder, monkeypatch, lambda: run(folder / "out", checkpoint))
    assert len(images) > (50 if patience == 0 else 25) and not list(folder.iterdir())
    n_before = 0
    for image in images:
        loaded.clear()
        completed = b'{"complete":' in (image / ".out.journal").read_bytes()
        found, n_done = go_on(image, checkpoint)
        assert found == undisturbed and not list(image.iterdir())
        if completed:  # an output would have its name, or get it now; states are being removed
            continue
        assert n_before <= n_done <= n_before + (1 if patience == 0 else 4)
        n_before = n_done
        assert loaded == ALL_LAYERS[len(ALL_LAYERS) - len(loaded) :]
        assert len(loaded) == layers_left(n_done)
    assert n_before == N_STEPS


def go_on(folder, checkpoint) -> tuple[list, int]:
    """What another run finds, and how many steps it had not to make."""
    said = []
    found = run(folder / "out", checkpoint, Resume(say=said.append))
    after = re.match(r"Going on after (\d+) of", said[0]) if said else None
    return found, int(after[1]) if after else 0


def layers_left(n_done: int) -> int:
    """Two of the steps, the tenth and the fourteenth, are no layers."""
    return len(ALL_LAYERS) - n_done + (n_done >= 10) + (n_done >= 14)


def stop_after(n: int, output, checkpoint) -> None:
    """Leave what a run leaves that was stopped behind the n-th step."""
    note = Passes.note

    def noting(self, units):
        if self._journal._n_done + len(units) == n:
            self._journal._resume.stop.make()
        note(self, units)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Passes, "note", noting)
        run(output, checkpoint, Resume())


def test_what_is_kept_is_known_beforehand(checkpoint, always_saving, tmp_path, monkeypatch):
    """Of all three, and of the last one's output of "quantize", which stays."""
    seen, note = {}, Passes.note

    def noting(self, units):
        name = units[-1]["pass"].partition(" ")[0]
        nbytes = sum(p.stat().st_size for p in (tmp_path / ".out.states").iterdir())
        seen[name] = max(seen.get(name, 0), nbytes)
        note(self, units)

    monkeypatch.setattr(Passes, "note", noting)
    run(tmp_path / "out", checkpoint)
    hidden = 4 * IDS.size * checkpoint.config["hidden_size"]
    assert seen == {
        "quantize": FEEDBACK.saved * hidden,
        "check": (1 + of_check(2, IDS.size).saved) * hidden,
        "gradient": (1 + GRADIENT.saved + checkpoint.config["num_hidden_layers"] + 1) * hidden,
    }


def spoil(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "n, file, n_kept",
    [
        (2, "quantize.1", 1),  # the state before is in the other file
        (2, "quantize.0", 2),
        (5, "check source.1", 4),
        (8, "check source.0", 3),  # of a finished pass: nothing behind it is of use
        (12, "gradient inputs", 11),
        (15, "gradient.1", 14),
        (16, "gradient inputs", 11),
    ],
)
def test_a_damaged_state_is_found_out(
    n, file, n_kept, checkpoint, undisturbed, always_saving, tmp_path
):
    stop_after(n, tmp_path / "out", checkpoint)
    spoil(tmp_path / ".out.states" / f".{file}.partial")
    assert go_on(tmp_path, checkpoint) == (undisturbed, n_kept)
    assert not list(tmp_path.iterdir())


def test_states_that_are_gone(checkpoint, undisturbed, always_saving, tmp_path):
    stop_after(5, tmp_path / "out", checkpoint)
    shutil.rmtree(tmp_path / ".out.states")
    assert go_on(tmp_path, checkpoint) == (undisturbed, 0)
