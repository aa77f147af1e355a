"""to-gguf that goes on after an interrupted run: the same bytes, nothing done twice."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from faults import tiny_model
from safetensors.torch import load_file, save_file

from quant import convert, durable, journal, target_size, write_gguf
from quant.cli import cli, options
from quant.durable import own_leftovers
from quant.errors import BadInput, InputMissing, OutputFailed
from quant.journal import MODES, Resume, Stopped
from quant.measured_errors import MeasuredErrors
from quant.source import open_source
from quant.target_size import Target
from quant.to_gguf import Wishes, plan_gguf

SPLIT = {"max_file_nbytes": 280_000}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of 15 tensors; tests that change it copy it."""
    return tiny_model(tmp_path_factory.mktemp("resume") / "model")


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """Bytes of each file of an undisturbed run, by wishes."""
    made = {}

    def get(type_name="Q8_0", **wishes) -> dict[str, bytes]:
        key = (type_name, *wishes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            write(model, folder / "m.gguf", type_name, **wishes)
            made[key] = {p.name: p.read_bytes() for p in folder.glob("*.gguf")}
        return made[key]

    return get


def write(model, output, type_name="Q8_0", resume=None, nan_policy="refuse", force=False, **wishes):
    source = open_source(str(model)) if isinstance(model, Path) else model
    job = plan_gguf(source, Wishes(type_name, **wishes))
    return write_gguf.write_gguf(
        job, output, resume=resume, nan_policy=nan_policy, force=force, command=("to-gguf", "a b")
    )


def interrupt(model, output, n_tensors, *args, **options) -> Stopped:
    """Stop after so many tensors."""
    resume = Resume()
    append = journal.Journal.append

    def counted(self, *unit):
        if self._n_done + 1 == n_tensors:
            resume.stop.make()
        append(self, *unit)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(journal.Journal, "append", counted)
        write(model, output, *args, resume=resume, **options)
    return stopped.value


def going_on(model, output, *args, **options) -> tuple[list[str], list[str]]:
    """Run once more: what it said, and the names of the tensors that were encoded."""
    said, encoded = [], []
    encode_rows = convert.encode_rows

    def noted(assignment, *rest):
        encoded.append(assignment.name)
        return encode_rows(assignment, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "encode_rows", noted)
        write(model, output, *args, resume=Resume(say=said.append), **options)
    return said, encoded


def files(folder) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.is_file() and p.name != "qwq-quant.json"
    }


def hidden(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def copied(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


# --- the same bytes, nothing done twice -------------------------------------------------------


@pytest.mark.parametrize("wishes", [{}, SPLIT], ids=["one file", "split"])
@pytest.mark.parametrize("n_done", [1, 8, 14, 15])
def test_a_second_run_goes_on_where_the_first_stopped(n_done, wishes, model, undisturbed, tmp_path):
    stopped = interrupt(model, tmp_path / "m.gguf", n_done, **wishes)
    assert stopped.exit_code == 75 and f"{n_done} of 15 tensors are finished" in stopped.why
    assert stopped.next_step == "Go on with: qwq-quant to-gguf 'a b'"
    assert not list(tmp_path.glob("*.gguf")) and ".m.gguf.journal" in hidden(tmp_path)
    said, encoded = going_on(model, tmp_path / "m.gguf", **wishes)
    assert [text.partition(" of an")[0] for text in said] == [
        f"Going on after {n_done} of 15 tensors"
    ]
    names = [a.name for a in plan_gguf(open_source(str(model)), Wishes("Q8_0")).plan.assignments]
    assert sorted(set(encoded)) == sorted(names[n_done:])
    assert files(tmp_path) == undisturbed(**wishes)


def test_the_manifest_is_that_of_an_undisturbed_run(model, tmp_path):
    def entry(folder) -> dict:
        found = json.loads((folder / "qwq-quant.json").read_text())["outputs"]["m.gguf"]
        return {key: value for key, value in found.items() if key != "time"}

    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
    write(model, tmp_path / "once" / "m.gguf")
    interrupt(model, tmp_path / "twice" / "m.gguf", 5)
    write(model, tmp_path / "twice" / "m.gguf")
    assert entry(tmp_path / "once") == entry(tmp_path / "twice")


def test_what_the_weights_forced_upon_the_plan_is_not_forgotten(model, tmp_path):
    """A tensor beyond float16 becomes BF16 before the interruption, and is told of after it."""
    folder = copied(model, tmp_path)
    spoil(folder, 70000.0)
    interrupt(folder, tmp_path / "m.gguf", 12, "F16")
    result = write(folder, tmp_path / "m.gguf", "F16")
    again = write(folder, tmp_path / "again.gguf", "F16")
    assert result.changes == again.changes and len(again.changes) == 1
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def spoil(folder, value, name="model.layers.0.self_attn.q_proj.weight"):
    """Put one value into a tensor; all become float32."""
    tensors = {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_can_be_interrupted_again_and_again(model, undisturbed, tmp_path):
    for n_done in (2, 3, 9, 15):
        interrupt(model, tmp_path / "m.gguf", n_done)
    said, encoded = going_on(model, tmp_path / "m.gguf")
    assert not encoded and "15 of 15" in said[0] and files(tmp_path) == undisturbed()


# --- what was lost is made again --------------------------------------------------------------


def end_of(path, n_tensors: int) -> int:
    """Where the n-th tensor of the file that is being written ends."""
    lines = path.with_name(".m.gguf.journal").read_text().splitlines()
    units = [json.loads(line.partition(" ")[2]).get("unit") for line in lines]
    entry = [u for u in units if u][n_tensors - 1]["tensor"]["entry"]
    header = len(sinks_of(path)[0].planned_header)
    return header + entry["offset"] + write_gguf.tensor_nbytes(entry["type"], entry["shape"])


def sinks_of(path):
    model = path.parent / "model"
    job = plan_gguf(open_source(str(model)), Wishes("Q8_0"))
    return write_gguf._sinks(job, [path])


def forget_marks(folder):
    """As if the power had failed before anything was flushed: no line says `on_disk`."""
    path = folder / ".m.gguf.journal"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"on_disk"' not in line))


@pytest.mark.parametrize("how", ["cut", "zeros", "one bit"])
def test_lost_data_behind_the_last_flush_is_found_by_its_hash(how, model, undisturbed, tmp_path):
    folder = copied(model, tmp_path)
    interrupt(folder, tmp_path / "m.gguf", 10)
    forget_marks(tmp_path)
    partial, kept = tmp_path / ".m.gguf.partial", end_of(tmp_path / "m.gguf", 6)
    data = partial.read_bytes()
    if how == "cut":
        partial.write_bytes(data[: kept + 3])
    elif how == "zeros":
        partial.write_bytes(data[:kept].ljust(len(data), b"\0"))
    else:
        at = kept + 40  # in the seventh tensor, behind the padding
        partial.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    said, encoded = going_on(folder, tmp_path / "m.gguf")
    assert "after 6 of 15" in said[0] and len(set(encoded)) == 9
    assert (tmp_path / "m.gguf").read_bytes() == undisturbed()["m.gguf"]


@pytest.mark.parametrize("what", ["nonsense", "other tensors"])
def test_units_that_are_not_the_plan_s_do_not_count(what, model, undisturbed, tmp_path):
    """Somebody's own journal, hashes and all."""
    interrupt(model, tmp_path / "m.gguf", 10)
    path = tmp_path / ".m.gguf.journal"
    first, *units = path.read_text().splitlines()
    if what == "nonsense":
        texts = ['{"unit":{"tensor":{"entry":{"shape":7}},"changes":[]}}', '{"unit":"x"}']
    else:
        texts = [unit.partition(" ")[2] for unit in (units[1], units[0])]
    lines = [f"{journal._hash(first[:16] + text)} {text}" for text in texts]
    path.write_text("\n".join([first, *lines, ""]))
    said, encoded = going_on(model, tmp_path / "m.gguf")
    assert "starts over" in said[0] and len(set(encoded)) == 15
    assert files(tmp_path) == undisturbed()


def test_a_file_that_is_gone_is_begun_anew(model, undisturbed, tmp_path):
    interrupt(model, tmp_path / "m.gguf", 10)
    (tmp_path / ".m.gguf.partial").unlink()
    said, encoded = going_on(model, tmp_path / "m.gguf")
    assert "no longer there" in said[0] and len(set(encoded)) == 15
    assert files(tmp_path) == undisturbed()


def test_a_disk_that_lied_about_flushing_is_found_in_the_end(model, undisturbed, tmp_path):
    """What the journal calls safe is not hashed twice; reading the whole file back still is."""
    folder = copied(model, tmp_path)
    interrupt(folder, tmp_path / "m.gguf", 10)
    with open(tmp_path / ".m.gguf.partial", "r+b") as file:
        file.seek(end_of(tmp_path / "m.gguf", 3) - 1)
        file.write(b"\xa5\xa5")
    with pytest.raises(OutputFailed, match="differ from what was written"):
        write(folder, tmp_path / "m.gguf")
    assert hidden(tmp_path) == []
    write(folder, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == undisturbed()["m.gguf"]


def test_after_a_failed_flush_only_what_was_flushed_before_counts(model, undisturbed, tmp_path):
    """The system forgets that pages could not be written, so a later check would see ghosts."""
    fsync, flushed = os.fsync, []

    def failing(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".m.gguf.partial"):
            flushed.append(descriptor)
            if len(flushed) == 2:
                raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputFailed) as failed:
        patch.setattr(durable.os, "fsync", failing)
        patch.setattr(journal, "FLUSH_NBYTES", 1 << 15)
        patch.setattr(journal.Journal, "append", settled(journal.Journal.append))
        write(model, tmp_path / "m.gguf")
    assert "1 of 15 tensors are finished" in failed.value.why
    said, _ = going_on(model, tmp_path / "m.gguf")
    assert "after 1 of 15" in said[0] and files(tmp_path) == undisturbed()


def settled(append):
    """Journal.append that waits for the flush it may have begun, so that the test knows when."""

    def waiting(self, *unit):
        append(self, *unit)
        if self._flushing is not None:
            self._flushing[0].exception()

    return waiting


def test_a_split_file_that_is_gone_while_its_siblings_have_their_names(
    model, undisturbed, tmp_path, monkeypatch
):
    publish = durable.PendingFile.publish

    def once(self):
        if "-00002-of" in self.path.name:
            raise KeyboardInterrupt
        publish(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable.PendingFile, "publish", once)
        write(model, tmp_path / "m.gguf", **SPLIT)
    (lost,) = tmp_path.glob(".*.partial")
    lost.unlink()
    said, encoded = going_on(model, tmp_path / "m.gguf", **SPLIT)
    assert "Going on after" in said[0] and "token_embd.weight" not in encoded
    assert files(tmp_path) == undisturbed(**SPLIT)


# --- only the same job goes on ----------------------------------------------------------------


def test_another_job_starts_over_and_says_why(model, undisturbed, tmp_path):
    interrupt(model, tmp_path / "m.gguf", 10, "F16")
    said, encoded = going_on(model, tmp_path / "m.gguf")
    assert "starts over" in said[0] and "type was F16 and is Q8_0" in said[0]
    assert len(set(encoded)) == 15 and files(tmp_path) == undisturbed()


CHANGES = {
    "source file model.safetensors": lambda folder: os.utime(folder / "model.safetensors", (1, 1)),
    "metadata": lambda folder: edit(folder / "config.json", rms_norm_eps=1e-6),
    "tensors": None,  # another --tensor-type
    "nan policy was refuse and is zero": None,
    "qwq-quant was 0.0.1": None,
    "program": None,
}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_the_bytes_is_looked_at(what, model, tmp_path, monkeypatch):
    folder = copied(model, tmp_path)
    options = {}
    with monkeypatch.context() as patch:
        if what.startswith("qwq-quant"):
            patch.setattr("quant.fingerprint.__version__", "0.0.1")
        if what == "program":
            patch.setattr(write_gguf, "CODE", ("formats",))
        interrupt(folder, tmp_path / "m.gguf", 10)
    if CHANGES[what] is not None:
        CHANGES[what](folder)
    elif what == "tensors":
        from quant.mixtures import Choices

        options = {"choices": Choices(tensor_types=(("ffn_up", "F16"),))}
    elif what.startswith("nan"):
        options = {"nan_policy": "zero"}
    before = files(tmp_path)
    with pytest.raises(BadInput) as refused:
        write(folder, tmp_path / "m.gguf", resume=Resume("required"), **options)
    assert what in refused.value.why, refused.value.why
    assert files(tmp_path) == before
    said, encoded = going_on(folder, tmp_path / "m.gguf", **options)
    assert what in said[0] and len(set(encoded)) == 15 and hidden(tmp_path) == []


def test_an_adapter_that_was_trained_on_starts_over(model, tmp_path):
    """Its file has the same name, size and header, and so has the model."""
    from lora_makers import make_adapter

    from quant.lora import merge_adapter, open_adapter

    folder = make_adapter(tmp_path / "lora", model)

    def merged():
        return merge_adapter(open_source(str(model)), open_adapter(str(folder)))

    interrupt(merged(), tmp_path / "m.gguf", 10)
    interrupt(merged(), tmp_path / "m.gguf", 11)  # goes on: nothing has changed
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-2] + bytes(2))
    said, encoded = going_on(merged(), tmp_path / "m.gguf")
    assert "source file adapter_model.safetensors" in said[0] and len(set(encoded)) == 15


def test_a_moved_model_is_the_same_one(model, undisturbed, tmp_path):
    folder = copied(model, tmp_path)
    interrupt(folder, tmp_path / "m.gguf", 10)
    (tmp_path / "moved").mkdir()
    folder.rename(tmp_path / "moved" / "model")
    said, _ = going_on(tmp_path / "moved" / "model", tmp_path / "m.gguf")
    assert "after 10 of 15" in said[0]
    assert (tmp_path / "m.gguf").read_bytes() == undisturbed()["m.gguf"]


def test_required_goes_on_or_fails_and_changes_nothing(model, undisturbed, tmp_path):
    with pytest.raises(InputMissing, match="no interrupted run"):
        write(model, tmp_path / "m.gguf", resume=Resume("required"))
    assert os.listdir(tmp_path) == []
    interrupt(model, tmp_path / "m.gguf", 10)
    kept = files(tmp_path)
    with pytest.raises(BadInput, match="cannot be continued"):
        write(model, tmp_path / "m.gguf", "F16", resume=Resume("required"))
    assert files(tmp_path) == kept
    write(model, tmp_path / "m.gguf", resume=Resume("required"))
    assert files(tmp_path) == undisturbed()


def test_never_removes_what_there_is_and_keeps_nothing(model, undisturbed, tmp_path):
    interrupt(model, tmp_path / "m.gguf", 10)
    said = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputFailed) as failed:
        patch.setattr(durable.PendingFile, "write_at", full_disk)
        write(model, tmp_path / "m.gguf", resume=Resume("never", say=said.append))
    assert hidden(tmp_path) == [] and said == []
    assert "Nothing was left behind" in failed.value.why
    interrupt(model, tmp_path / "m.gguf", 10)
    write(model, tmp_path / "m.gguf", resume=Resume("never"))
    assert files(tmp_path) == undisturbed()


def full_disk(self, offset, data):
    if offset < 270_000:
        os.pwrite(self.descriptor, data, offset)
        return
    with durable.translated_errors(self.path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_another_split_left_is_removed(model, undisturbed, tmp_path):
    interrupt(model, tmp_path / "m.gguf", 15, **SPLIT)
    assert len(hidden(tmp_path)) == 3
    said, _ = going_on(model, tmp_path / "m.gguf")
    assert "files was 2 and is 1" in said[0] and files(tmp_path) == undisturbed()


def test_without_force_an_older_output_stays_and_so_does_the_work(model, undisturbed, tmp_path):
    write(model, tmp_path / "m.gguf", "F16")
    interrupt(model, tmp_path / "m.gguf", 10, force=True)
    kept = files(tmp_path)
    with pytest.raises(durable.CannotCreate, match="exists already"):
        write(model, tmp_path / "m.gguf")
    assert files(tmp_path) == kept
    said, _ = going_on(model, tmp_path / "m.gguf", force=True)
    assert "after 10 of 15" in said[0] and files(tmp_path) == undisturbed()


# --- failures that a second run gets over, and others -----------------------------------------


def test_nan_weights_leave_nothing_however_much_is_finished(model, tmp_path):
    folder = copied(model, tmp_path)
    spoil(folder, np.nan, "model.norm.weight")
    with pytest.raises(BadInput, match="NaN"):
        write(folder, tmp_path / "m.gguf")
    assert hidden(tmp_path) == []


def test_a_file_beyond_the_file_system_s_limit_leaves_nothing(model, tmp_path):
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (420_000, 420_000))
sys.argv = ["q", "to-gguf", {str(model)!r}, "-o", {str(tmp_path / "m.gguf")!r}, "-t", "BF16"]
from quant.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 74 and "--split-max-size" in done.stderr
    assert "Nothing was left behind" in done.stderr and os.listdir(tmp_path) == []


def test_a_source_that_cannot_be_read_for_a_while(model, undisturbed, tmp_path):
    """A file server that goes away: the same command goes on when it is back."""
    preadv, n = os.preadv, 0

    def failing(*args):
        nonlocal n
        n += 1
        if n > 8:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadInput) as failed:
        patch.setattr("quant.tensors.os.preadv", failing)
        write(model, tmp_path / "m.gguf")
    assert "The system says: Input/output error. " in failed.value.why
    assert "are finished and kept" in failed.value.why
    said, encoded = going_on(model, tmp_path / "m.gguf")
    assert "Going on" in said[0] and len(set(encoded)) < 15 and files(tmp_path) == undisturbed()


def test_ctrl_c_in_a_program_that_calls_the_library(model, undisturbed, tmp_path):
    said = []
    job = plan_gguf(open_source(str(model)), Wishes("Q8_0"))
    with pytest.raises(KeyboardInterrupt):
        write_gguf.write_gguf(
            job, tmp_path / "m.gguf", resume=Resume(say=said.append), progress=interrupted_at(4)
        )
    assert "are finished and kept" in said[0] and "Go on with: the same call" in said[0]
    said, _ = going_on(model, tmp_path / "m.gguf")
    assert "Going on" in said[0] and files(tmp_path) == undisturbed()


def interrupted_at(n: int):
    """A progress that is interrupted at the n-th call."""
    calls = []

    def progress(n_weights):
        calls.append(n_weights)
        if len(calls) == n:
            raise KeyboardInterrupt

    return progress


def test_the_preflight_counts_what_is_kept(model, tmp_path):
    interrupt(model, tmp_path / "m.gguf", 15)
    kept = [tmp_path / ".m.gguf.partial", tmp_path / ".m.gguf.journal"]
    taken = sum(path.stat().st_blocks * 512 for path in kept)
    assert own_leftovers(tmp_path / "m.gguf") == taken > 280_000


def test_the_preflight_counts_what_another_split_left(model, tmp_path, monkeypatch):
    """It is removed when the new job begins."""
    from types import SimpleNamespace

    from quant.gguf_needs import gguf_needs

    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=1))
    interrupt(model, tmp_path / "m.gguf", 15, **SPLIT)
    job = plan_gguf(open_source(str(model)), Wishes("Q8_0"))
    kept = [tmp_path / name for name in hidden(tmp_path)]
    free = gguf_needs(job, tmp_path / "m.gguf").disk_free
    assert len(kept) == 3 and free == sum(path.stat().st_blocks * 512 for path in kept)


# --- signals ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model that takes about a second: 242 tensors, and its undisturbed file."""
    from model_makers import make_model

    folder = tmp_path_factory.mktemp("large")
    make_model("qwen2", folder / "model", num_hidden_layers=20, hidden_size=256)
    write(folder / "model", folder / "m.gguf", "Q8_0")
    return folder


def started(*args):
    """The command in a process of its own."""
    command = [sys.executable, "-c", "from quant.cli import main; main()", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_tensors(process, output, n=3):
    """Until so many are finished: a line each, after the journal's first."""
    path, deadline = output.with_name(f".{output.name}.journal"), time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") <= n:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_safely_and_the_printed_command_goes_on(number, large, tmp_path):
    process = started("to-gguf", large / "model", "-o", tmp_path / "m.gguf", "--type", "Q8_0")
    wait_for_tensors(process, tmp_path / "m.gguf")
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and "Stopping when the tensor in hand is finished" in error
    assert not (tmp_path / "m.gguf").exists() and "Traceback" not in error
    (command,) = [line for line in error.splitlines() if line.startswith("Go on with: ")]
    words = shlex.split(command.removeprefix("Go on with: "))
    assert words[0] == "qwq-quant"
    result = CliRunner().invoke(cli, words[1:])
    assert result.exit_code == 0 and "Going on after" in result.output, result.output
    assert files(tmp_path) == {"m.gguf": (large / "m.gguf").read_bytes()}


def test_killed_it_goes_on(large, tmp_path):
    args = ("to-gguf", large / "model", "-o", tmp_path / "m.gguf", "--type", "Q8_0")
    process = started(*args)
    wait_for_tensors(process, tmp_path / "m.gguf", 40)
    process.kill()
    process.wait()
    assert not (tmp_path / "m.gguf").exists()
    result = CliRunner().invoke(cli, list(map(str, args)))
    assert result.exit_code == 0 and "Going on after" in result.output, result.output
    assert files(tmp_path) == {"m.gguf": (large / "m.gguf").read_bytes()}


def test_a_second_signal_stops_at_once(large, tmp_path):
    """The first is waiting for a tensor that takes its time."""
    code = f"""
import os, signal, sys, time
from quant import convert
encode, n = convert.encode_rows, 0
def slow(*args):
    global n
    n += 1
    if n > 20:
        time.sleep(1)
    return encode(*args)
convert.encode_rows = slow
sys.argv = ["q", "to-gguf", {str(large / "model")!r}, "-o", {str(tmp_path / "m.gguf")!r}]
from quant.cli import main
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    wait_for_tensors(process, tmp_path / "m.gguf", 12)
    process.send_signal(signal.SIGINT)
    assert "Stopping when" in next(line for line in process.stderr if "Stopping" in line)
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait() == 75 and "Stopped at once." in error and "Go on with: " in error


def test_a_tensor_that_takes_too_long_is_given_up(model, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "GRACE_SECONDS", -1.0)
    resume, calls = Resume(), []

    def progress(n_weights):
        calls.append(n_weights)
        if len(calls) == 6:
            resume.stop.make()

    job = plan_gguf(open_source(str(model)), Wishes("Q8_0"))
    with pytest.raises(Stopped) as stopped:
        write_gguf.write_gguf(job, tmp_path / "m.gguf", resume=resume, progress=progress)
    assert "4 of 15 tensors" in stopped.value.why  # the first call tells of what was resumed
    going_on(model, tmp_path / "m.gguf")
    assert files(tmp_path) == undisturbed()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_where_nothing_is_kept_a_signal_ends_the_run(number, large, tmp_path):
    output = tmp_path / "m.gguf"
    process = started("to-gguf", large / "model", "-o", output, "--resume", "never")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.partial")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Interrupted" in error
    assert os.listdir(tmp_path) == []


def test_nohup_is_heeded(large, tmp_path):
    """A shell's nohup has SIGHUP ignored, and the run outlives its terminal."""
    code = f"""
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.argv = ["q", "to-gguf", {str(large / "model")!r}, "-o", {str(tmp_path / "m.gguf")!r}]
from quant.cli import main
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_for_tensors(process, tmp_path / "m.gguf")
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0 and (tmp_path / "m.gguf").exists()


def test_the_modes_of_the_command_line_are_the_library_s():
    @options.resume
    def command():
        pass

    (option,) = command.__click_params__
    assert tuple(option.type.choices) == MODES


# --- errors that a target size is chosen by ---------------------------------------------------


def test_measured_errors_are_kept_until_the_output_is_written(model, tmp_path, monkeypatch):
    measure, measured = target_size.measure, []

    def counted(assignment, *rest):
        measured.append(assignment.name)
        return measure(assignment, *rest)

    monkeypatch.setattr(target_size, "measure", counted)
    output = tmp_path / "m.gguf"
    words = ["to-gguf", str(model), "-o", str(output), "--target-bpw", "6"]
    undisturbed = CliRunner().invoke(cli, [*words[:3], str(tmp_path / "once.gguf"), *words[4:]])
    assert undisturbed.exit_code == 0, undisturbed.output
    n_all = len(measured)
    assert n_all > 8

    resume = Resume()

    def stop_at_five(done: int, total: int) -> None:
        if done == 5:
            resume.stop.make()

    wishes = Wishes(target=Target(bits_per_weight=6.0))
    with pytest.raises(Stopped, match=f"6 of {n_all} tensors are finished and kept"):
        plan_gguf(open_source(str(model)), wishes, stop_at_five, MeasuredErrors(output, resume))
    measured.clear()
    with monkeypatch.context() as patch:
        patch.setattr(write_gguf, "_write_rest", interrupted)
        assert CliRunner().invoke(cli, words).exit_code == 130
    assert len(measured) == n_all - 6
    measured.clear()
    done = CliRunner().invoke(cli, [*words, "--resume", "required"])
    assert done.exit_code == 0, done.output
    assert not measured and f"Going on after {n_all} of {n_all} tensors" in done.stderr
    assert output.read_bytes() == (tmp_path / "once.gguf").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt
