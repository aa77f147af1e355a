"""The journal itself: what counts of a damaged one, when units are on the disk, who may write."""

import errno
import os
import threading

import pytest

from quant import journal
from quant.durable import PendingFile, journal_path
from quant.errors import CannotCreate, OutputFailed
from quant.fingerprint import differences, fingerprint
from quant.journal import Journal, Resume, Stopped
from quant.tensors import TensorInfo

JOB = {"type": "Q8_0", "tensors": "xxh3:1", "source files": {"a": [1, 2, "3"]}}


def opened(path, job=JOB, mode="auto", n_units=9) -> Journal:
    return Journal(path, job, Resume(mode), "layers", n_units)


def interrupted(path, units, job=JOB):
    """A journal of a run that was killed behind these units."""
    made = opened(path, job)
    made.begin()
    for unit in units:
        made.append(unit)
    made._close()


def units_of(path, job=JOB) -> list:
    found = opened(path, job)
    found._leave_as_found()
    return found.units


@pytest.fixture
def output(tmp_path):
    return tmp_path / "m.gguf"


def test_cut_anywhere_the_whole_lines_count(output):
    interrupted(output, ["first", {"second": 2}, ["third"]])
    data = journal_path(output).read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")][1:]
    for nbytes in range(len(data) + 1):
        journal_path(output).write_bytes(data[:nbytes])
        whole = sum(end <= nbytes for end in ends)
        assert units_of(output) == ["first", {"second": 2}, ["third"]][:whole], nbytes


def test_any_changed_byte_ends_what_counts(output):
    interrupted(output, ["first", {"second": 2}, ["third"]])
    data = journal_path(output).read_bytes()
    for at in range(len(data)):
        journal_path(output).write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        before = max(0, data[:at].count(b"\n") - 1)
        assert units_of(output) == ["first", {"second": 2}, ["third"]][:before], at


def test_lines_of_an_older_journal_do_not_count(output):
    """A power cut may leave them behind the new first line."""
    interrupted(output, ["old"], {**JOB, "type": "F16"})
    old = journal_path(output).read_bytes().splitlines(keepends=True)
    interrupted(output, ["new"])
    new = journal_path(output).read_bytes().splitlines(keepends=True)
    journal_path(output).write_bytes(new[0] + old[1])
    assert units_of(output) == []
    journal_path(output).write_bytes(b"".join(new) + old[1])
    assert units_of(output) == ["new"]


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"x" * 70, b"[" * 99999 + b"\n", b"\n\n"])
def test_what_is_no_journal_is_begun_anew(content, output):
    journal_path(output).write_bytes(content)
    with opened(output) as found:
        assert found.units == [] and found.abandoned is None
        found.begin()
    assert not journal_path(output).exists()


def test_going_on_forgets_what_is_behind(output):
    interrupted(output, [1, 2, 3, 4])
    found = opened(output)
    found.begin(2)
    found.append("three")
    found._close()
    assert units_of(output) == [1, 2, "three"]


def test_a_second_run_is_refused(output):
    with opened(output) as first:
        first.begin()
        with pytest.raises(CannotCreate, match="Another run is writing"):
            opened(output)
    opened(output)._leave_as_found()
    assert not journal_path(output).exists()


def test_a_journal_that_is_no_file_is_refused(output):
    os.mkfifo(journal_path(output))
    with pytest.raises(CannotCreate, match="no regular file"):
        opened(output)
    journal_path(output).unlink()
    journal_path(output).symlink_to("/etc/passwd")
    with pytest.raises(CannotCreate, match="no regular file"):
        opened(output)
    journal_path(output).unlink()
    journal_path(output).mkdir()
    with pytest.raises(CannotCreate, match="no regular file"):
        opened(output)


class Data:
    """What a journal holds, noting what is done with it."""

    def __init__(self, flushing=lambda: None):
        self.flush_failed, self.flushing, self.done = False, flushing, []

    def flush(self):
        self.done.append("flush")
        try:
            self.flushing()
        except OSError:
            self.flush_failed = True
            raise

    def keep(self):
        self.done.append("keep")

    def discard(self):
        self.done.append("discard")


def test_a_unit_is_marked_only_when_its_data_is_flushed(output, monkeypatch):
    """And the run does not wait for that."""
    monkeypatch.setattr(journal, "FLUSH_NBYTES", 100)
    allowed, begun = threading.Event(), threading.Event()

    def slow():
        begun.set()
        assert allowed.wait(30)

    made = opened(output)
    made.begin()
    made.hold(Data(slow))
    made.append(1, 60)
    assert not begun.is_set()
    made.append(2, 60)
    assert begun.wait(30)
    made.append(3, 1000)
    assert b"on_disk" not in journal_path(output).read_bytes()
    allowed.set()
    made._flushing[0].result()
    made.append(4, 0)
    assert b'{"on_disk":2}' in journal_path(output).read_bytes()
    made._flusher.shutdown()
    made._close()
    found = opened(output)
    assert found.units == [1, 2, 3, 4] and found.n_on_disk == 2
    found._leave_as_found()


def test_time_alone_has_it_flushed_too(output, monkeypatch):
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0.0)
    with opened(output) as made:
        made.begin()
        data = made.hold(Data())
        made.append(1)
        made._flushing[0].result()
        assert data.done == ["flush"]
    assert data.done[-1] == "discard"  # in its place PendingFile does nothing, once it is published


def test_units_behind_a_failed_flush_are_forgotten(output):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputFailed) as failed, opened(output) as made:
        made.begin()
        data = made.hold(Data())
        made.append(1)
        made._settle()
        made.append(2)
        data.flushing = full
        made.complete([])
    assert "1 of 9 layers are finished and kept" in failed.value.why and data.done[-1] == "keep"
    found = opened(output)
    assert found.units == [1] and found.n_on_disk == 1
    found._leave_as_found()


def test_a_pending_file_is_kept_or_removed_with_the_journal(output):
    for error, left in ((MemoryError, 2), (CannotCreate, 2), (OutputFailed, 0)):
        with pytest.raises(error), opened(output) as made:
            made.begin()
            made.hold(PendingFile(output))
            made.append(1)
            raise error("no")
        assert len(os.listdir(output.parent)) == left, error


def test_what_the_disk_does_not_let_us_remove_is_left(output, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(journal.os, "unlink", failing)
    with pytest.raises(OutputFailed) as failed, opened(output) as made:
        made.begin()
        made.hold(PendingFile(output)).write_at(0, b"x" * 5000)
        raise OutputFailed("no")
    assert "Nothing was left" not in failed.value.why and len(os.listdir(output.parent)) == 2


def test_where_the_end_is_lost_it_is_not_complete_any_more(output):
    made = opened(output)
    made.begin()
    for unit in (1, 2):
        made.append(unit)
    made.complete({"files": 1})
    made._close()
    found = opened(output)
    assert found.completed == {"files": 1} and found.n_on_disk == 2
    found.begin(1)
    assert found.completed is None
    found._close()
    found = opened(output)
    assert found.completed is None and found.n_on_disk == 1 and found.units == [1]
    found._leave_as_found()


def test_differences_are_told_in_words():
    new = {**JOB, "type": "F16", "tensors": "xxh3:2", "source files": {"a": [1, 2, "4"], "b": []}}
    assert differences(JOB, new) == [
        "source file a", "source file b", "tensors", "type was Q8_0 and is F16",
    ]  # fmt: skip
    assert differences({"\x1b[2J": {}}, {}) == ["\\x1b[2J"]
    assert differences(JOB, JOB) == []


def test_a_fingerprint_is_the_same_after_json_and_tells_values_apart():
    import json

    import numpy as np

    def of(value):
        return fingerprint(code=("finite.py",), hashed={"x": value}, files=2)

    assert json.loads(json.dumps(of((1, 2)))) == of((1, 2))
    # fmt: off
    values = [1, 1.0, "1", b"1", True, None, (1, 2), ((1,), 2), {"a": 1}, {"a": "1"},
              np.arange(3), np.arange(3.0), np.arange(6).reshape(2, 3), np.arange(6), len]
    # fmt: on
    assert len({of(value)["x"] for value in values}) == len(values)
    with pytest.raises(TypeError):
        of(object())


def test_an_adapter_is_told_by_its_content(tmp_path):
    """Of the same size and time, and changed behind its header."""
    path = tmp_path / "adapter_model.safetensors"
    tables = []
    for content in (b"header, then 1", b"header, then 2"):
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        info = TensorInfo("a", (1,), "F32", path, 7, 4)
        tables.append(fingerprint(code=(), hashed={"tensors": info}))
    assert differences(*tables) == ["source file adapter_model.safetensors"]


def test_units_that_belong_together_are_not_parted_by_a_stop(output):
    resume = Resume()
    with (
        pytest.raises(Stopped, match="2 of 9 layers"),
        Journal(output, JOB, resume, "layers", 9) as made,
    ):
        made.begin()
        resume.stop.make()
        assert made.stopping
        made.append("first", may_stop=False)
        made.append("second")
    assert units_of(output) == ["first", "second"]


def test_flush_waits_for_data_and_lines(output):
    """A power cut behind it takes nothing from before it."""
    flushed = []

    class Data:
        flush_failed = False

        def flush(self):
            flushed.append(journal_path(output).read_bytes().count(b"unit"))

        keep = discard = lambda self: None

    with opened(output) as made:
        made.hold(Data())
        made.begin()
        made.append("first")
        made.append("second")
        made.flush()
        assert flushed == [2] and made.n_on_disk == 2
        assert b'{"on_disk":2}' in journal_path(output).read_bytes()
