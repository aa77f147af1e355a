"""Folders of weights that another run goes on with: the journal, the folder and its shards."""

import json
import os
from dataclasses import asdict

import numpy as np
import pytest

from quant import durable
from quant.durable import PendingFolder, temporary_path
from quant.errors import OutputFailed
from quant.journal import Journal, Resume, Stopped
from quant.sinks import safetensors as sink_module
from quant.sinks.safetensors import ShardedSink
from quant.sinks.written import WrittenTensor

N_UNITS = 9
JOB = {"type": "nf4"}


def parts(i: int) -> dict[str, np.ndarray]:
    """A unit as bitsandbytes has them: a weight, and JSON whose length only its bytes tell."""
    text = json.dumps({"unit": i, "more": "x" * (7 * i % 30)}).encode()
    return {
        f"{i}.weight": np.full((100, 10), i, np.float32),
        f"{i}.state": np.frombuffer(text, np.uint8),
    }


PLANNED = [
    (name, "F32" if data.ndim == 2 else "U8", data.shape if data.ndim == 2 else (99,))
    for i in range(N_UNITS)
    for name, data in parts(i).items()
]


def write(output, n_stop=None, said=None, made=None, force=False):
    """The job, as a command does it: nine units of two tensors in five shards."""
    resume = Resume(say=(said if said is not None else []).append)
    with Journal(output, JOB, resume, "groups", N_UNITS) as journal:
        if journal.completed is not None and PendingFolder.was_published(output):
            return
        sink = ShardedSink(temporary_path(output), PLANNED, 9000)
        n_done = 0
        if journal.units:
            journal.hold(PendingFolder(output, force, taken_up=True))
            units = [[WrittenTensor.from_json(t) for t in unit] for unit in journal.units]
            n_done = sink.take_up(units, journal.n_on_disk, journal.tick)
        journal.hold(sink)
        journal.begin(n_done)
        if not journal.units:
            journal.hold(PendingFolder(output, force))
        for i in range(n_done, N_UNITS):
            if i + 1 == n_stop:
                resume.stop.make()
            if made is not None:
                made.append(i)
            unit = [sink.write(name, data) for name, data in parts(i).items()]
            journal.append([asdict(tensor) for tensor in unit], 4000)
        sink.finish(journal.tick)
        (folder,) = [held for held in journal._held if isinstance(held, PendingFolder)]
        names = [{"name": path.name} for path in folder.temporary.iterdir()]
        manifest = {"outputs": {".": {"files": names}}}
        (folder.temporary / "qwq-quant.json").write_text(json.dumps(manifest))
        journal.complete({})
        folder.publish()


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors*")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    write(folder)
    assert len(files(folder)) == 6
    return files(folder)


@pytest.mark.parametrize("marks", [True, False], ids=["flushed", "killed before a flush"])
@pytest.mark.parametrize("n_done", range(1, N_UNITS + 1))
def test_a_second_run_goes_on_where_the_first_stopped(n_done, marks, undisturbed, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(Stopped, match=f"{n_done} of 9 groups are finished and kept"):
        write(output, n_stop=n_done)
    assert sorted(os.listdir(tmp_path)) == [".out.journal", ".out.partial"]
    if not marks:
        path = tmp_path / ".out.journal"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(line for line in lines if b"on_disk" not in line))
    said, made = [], []
    write(output, said=said, made=made)
    assert f"Going on after {n_done} of 9 groups" in said[0]
    assert made == list(range(n_done, N_UNITS))
    assert files(output) == undisturbed and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("shard", range(5))
def test_a_run_that_ended_while_its_shards_got_their_names(
    shard, undisturbed, tmp_path, monkeypatch
):
    output, verify, n = tmp_path / "out", sink_module._verify, 0

    def failing(*args):
        nonlocal n
        n += 1
        if n > shard:
            raise KeyboardInterrupt
        return verify(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sink_module, "_verify", failing)
        write(output)
    assert len(list((tmp_path / ".out.partial").glob("*.safetensors"))) == shard
    made = []
    write(output, made=made)
    assert not made and files(output) == undisturbed


@pytest.mark.parametrize("n_renames", [0, 1, 2])
def test_a_run_that_ended_while_the_folder_got_its_name(
    n_renames, undisturbed, tmp_path, monkeypatch
):
    """Over an older one: that is moved away first, and removed last."""
    output, rename, n = tmp_path / "out", os.rename, 0
    write(output)
    (output / "model-00001-of-00005.safetensors").write_bytes(b"old")

    def failing(*args):
        nonlocal n
        if n == n_renames:
            raise KeyboardInterrupt
        n += 1
        rename(*args)

    def no_time(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable.os, "rename", failing)
        if n_renames == 2:
            patch.setattr(durable.shutil, "rmtree", no_time)
        write(output, force=True)
    left = {".out.journal", ".out.partial", "out", ".out.older"}
    missing = [{".out.older"}, {"out"}, {".out.partial"}][n_renames]
    assert set(os.listdir(tmp_path)) == left - missing
    made = []
    write(output, made=made, force=True)
    assert not made and files(output) == undisturbed and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["weight", "state"])
def test_lost_data_is_found_by_its_hash(name, undisturbed, tmp_path):
    """One byte of the fourth unit is not what was written, and nothing says it was flushed."""
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        write(output, n_stop=7)
    path = tmp_path / ".out.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b"on_disk" not in line))
    found = b'{"unit": 3' if name == "state" else np.full(250, 3, np.float32).tobytes()
    for shard in (tmp_path / ".out.partial").iterdir():
        shard.write_bytes(shard.read_bytes().replace(found, found[:-1] + b"\xa5"))
    made = []
    write(output, made=made)
    assert made == list(range(3, N_UNITS)) and files(output) == undisturbed


def test_small_files_of_an_earlier_run_are_not_taken_up(tmp_path):
    first = PendingFolder(tmp_path / "out")
    for name in ("config.json", "model.safetensors", ".model-2.safetensors.partial", "a.partial"):
        (first.temporary / name).write_text("old")
    (first.temporary / "figures").mkdir()
    (first.temporary / "link.safetensors").symlink_to("/etc/passwd")
    first.keep()
    second = PendingFolder(tmp_path / "out", taken_up=True)
    left = sorted(os.listdir(second.temporary))
    second.discard()
    assert left == [".model-2.safetensors.partial", "model.safetensors"]


def test_a_full_disk_keeps_the_folder(undisturbed, tmp_path, monkeypatch):
    write_at, n = durable.PendingFile.write_at, 0

    def failing(self, *args):
        nonlocal n
        n += 1
        if n > 9:
            with durable.translated_errors(self.path):
                raise OSError(28, "No space left on device")
        write_at(self, *args)

    with monkeypatch.context() as patch, pytest.raises(OutputFailed) as failed:
        patch.setattr(durable.PendingFile, "write_at", failing)
        write(tmp_path / "out")
    assert "4 of 9 groups are finished and kept" in failed.value.why
    assert durable.own_leftovers(tmp_path / "out") > 4 * 4000
    write(tmp_path / "out")
    assert files(tmp_path / "out") == undisturbed
