"""PendingFolder: an output of many files that appears whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from quant import durable
from quant.durable import PendingFile, PendingFolder, own_leftovers
from quant.errors import CannotCreate, OutputFailed


def fill(folder, text="new"):
    """Write an output as a run does, its manifest last."""
    (folder / "figures").mkdir()
    (folder / "config.json").write_text(text)
    (folder / "figures" / "error.svg").write_text(text)
    files = [{"name": "config.json"}, {"name": "figures/error.svg"}]
    manifest = {"outputs": {".": {"files": files}}}
    (folder / "qwq-quant.json").write_text(json.dumps(manifest))


def make(path, text="new", force=False):
    pending = PendingFolder(path, force)
    try:
        fill(pending.temporary, text)
        pending.publish()
    finally:
        pending.discard()


def text_of(path):
    return (path / "config.json").read_text(), (path / "figures" / "error.svg").read_text()


def test_the_folder_appears_when_it_is_published(tmp_path):
    pending = PendingFolder(tmp_path / "out")
    fill(pending.temporary)
    assert pending.temporary == tmp_path / ".out.partial" and not (tmp_path / "out").exists()
    pending.publish()
    pending.discard()
    assert os.listdir(tmp_path) == ["out"] and text_of(tmp_path / "out") == ("new", "new")


def test_discarded_it_leaves_nothing(tmp_path):
    pending = PendingFolder(tmp_path / "out")
    fill(pending.temporary)
    pending.discard()
    assert os.listdir(tmp_path) == []


def test_relative_paths_and_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    make("out/")
    assert text_of(tmp_path / "out") == ("new", "new") and os.listdir(tmp_path) == ["out"]


def test_an_older_output_is_replaced_only_with_force(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(CannotCreate, match="exists already"):
        PendingFolder(tmp_path / "out")
    assert text_of(tmp_path / "out") == ("old", "old")
    make(tmp_path / "out", "new", force=True)
    assert text_of(tmp_path / "out") == ("new", "new") and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: (out / "qwq-quant.json").unlink(),
        lambda out: (out / "qwq-quant.json").write_text("{"),
        lambda out: (out / "qwq-quant.json").write_text('{"outputs": {".": {"files": [3]}}}'),
        lambda out: (out / "qwq-quant.json").write_text('{"outputs": {"a.gguf": {"files": []}}}'),
        lambda out: (out / "notes.txt").write_text("mine"),
        lambda out: (out / "figures" / "mine.svg").write_text("mine"),
        lambda out: (out / "link").symlink_to(out),
    ],
)
def test_what_others_wrote_is_never_replaced(tmp_path, spoil):
    make(tmp_path / "out", "old")
    spoil(tmp_path / "out")
    before = sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(CannotCreate, match="did not write"):
        make(tmp_path / "out", force=True)
    assert sorted(os.listdir(tmp_path / "out")) == before and os.listdir(tmp_path) == ["out"]


def test_what_others_write_meanwhile_is_not_replaced(tmp_path):
    pending = PendingFolder(tmp_path / "out", force=True)
    fill(pending.temporary)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CannotCreate, match=r"notes\.txt"):
        pending.publish()
    pending.discard()
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_or_a_link_is_never_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("file", "link"):
        with pytest.raises(CannotCreate, match="is no folder"):
            PendingFolder(tmp_path / name, force=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "target"]


def test_a_missing_parent_is_named(tmp_path):
    with pytest.raises(CannotCreate, match="there is no folder") as caught:
        PendingFolder(tmp_path / "missing" / "out")
    assert f"mkdir -p {tmp_path / 'missing'}" in str(caught.value)


def test_a_second_run_is_refused(tmp_path):
    first = PendingFolder(tmp_path / "out")
    fill(first.temporary)
    with pytest.raises(CannotCreate, match="Another run is writing"):
        PendingFolder(tmp_path / "out")
    first.publish()
    assert text_of(tmp_path / "out") == ("new", "new")
    make(tmp_path / "out", "third", force=True)


def test_a_full_disk_is_explained(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    pending = PendingFolder(tmp_path / "out", force=True)
    fill(pending.temporary)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OutputFailed, match="disk became full"):
        pending.publish()
    pending.discard()
    assert os.listdir(tmp_path) == ["out"] and text_of(tmp_path / "out") == ("old", "old")


KILLED = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from quant import durable
from test_durable_folder import fill

rename = os.rename
n = 0

def counted(*args):
    global n
    if n == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    n += 1
    rename(*args)

os.rename = counted
pending = durable.PendingFolder(Path({path!r}), force=True)
fill(pending.temporary)
print(n, flush=True)
pending.publish()
"""


def run_killed(path, after):
    code = KILLED.format(tests=os.path.dirname(__file__), path=str(path), after=after)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_killed_before_the_first_rename(tmp_path):
    run_killed(tmp_path / "out", after=0)
    assert os.listdir(tmp_path) == [".out.partial"]
    (tmp_path / ".out.partial" / "leftover").write_text("x" * 100_000)
    assert own_leftovers(tmp_path / "out") >= 100_000
    make(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "figures", "qwq-quant.json"]


def test_killed_between_two_renames_nothing_is_lost(tmp_path):
    make(tmp_path / "out", "old")
    run_killed(tmp_path / "out", after=1)
    assert sorted(os.listdir(tmp_path)) == [".out.older", ".out.partial"]
    with pytest.raises(CannotCreate, match="exists already"):  # the older one is back
        make(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and text_of(tmp_path / "out") == ("old", "old")


def test_killed_before_the_older_one_was_removed(tmp_path):
    make(tmp_path / "out", "new")
    (tmp_path / ".out.older").mkdir()
    fill(tmp_path / ".out.older", "old")
    make(tmp_path / "out", "third", force=True)
    assert os.listdir(tmp_path) == ["out"] and text_of(tmp_path / "out") == ("third", "third")


def test_a_run_that_is_killed_while_it_writes(tmp_path):
    code = f"""
import sys
from pathlib import Path
from quant.durable import PendingFolder
pending = PendingFolder(Path({str(tmp_path / "out")!r}))
with open(pending.temporary / "model.safetensors", "wb") as file:
    while True:
        file.write(bytes(1 << 16))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while own_leftovers(tmp_path / "out") < 1 << 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    with pytest.raises(CannotCreate, match="Another run"):
        PendingFolder(tmp_path / "out")
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and text_of(tmp_path / "out") == ("new", "new")


def test_what_another_command_left_for_an_output_of_that_name(tmp_path):
    (tmp_path / ".out.partial").write_text("a file, cut short")
    make(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and text_of(tmp_path / "out") == ("new", "new")

    (tmp_path / ".m.gguf.partial" / "figures").mkdir(parents=True)
    (tmp_path / ".m.gguf.partial" / "figures" / "error.svg").write_text("a folder, cut short")
    pending = PendingFile(tmp_path / "m.gguf")
    pending.write_at(0, b"new")
    pending.publish()
    assert (tmp_path / "m.gguf").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["m.gguf", "out"]


def test_another_command_that_is_at_work_is_left_alone(tmp_path):
    folder = PendingFolder(tmp_path / "folder")
    fill(folder.temporary)
    with pytest.raises(CannotCreate, match="Another run is writing"):
        PendingFile(tmp_path / "folder")
    file = PendingFile(tmp_path / "file")
    with pytest.raises(CannotCreate, match="Another run is writing"):
        PendingFolder(tmp_path / "file")
    folder.publish()
    file.publish()
    assert text_of(tmp_path / "folder") == ("new", "new") and (tmp_path / "file").is_file()


@pytest.mark.parametrize("make_it", [os.mkfifo, lambda place: os.symlink("/dev/null", place)])
def test_a_hidden_name_that_is_nothing_of_ours_is_named(tmp_path, make_it):
    place = tmp_path / ".m.gguf.partial"
    make_it(place)
    with pytest.raises(CannotCreate, match=r"\.m\.gguf\.partial is no regular file"):
        PendingFile(tmp_path / "m.gguf")
    assert os.path.lexists(place)
