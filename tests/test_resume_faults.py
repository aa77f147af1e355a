"""to-gguf under every fault at every operation: what is left is whole; a second run finishes it."""

import os
from concurrent.futures import ThreadPoolExecutor

import faults
import pytest

JOBS = {
    "new": ("kill", "EIO", "power"),
    "split": ("kill",),
    "replacing": ("ENOSPC",),
}
"""Job -> the faults it meets here; scripts/check_reliability.py has all against all."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Job, kind -> what came of the fault at n = 1, 2, ...; the jobs in two processes."""
    folder = tmp_path_factory.mktemp("faults")
    model = faults.tiny_model(folder / "model")
    jobs = faults.gguf_jobs(model, folder)

    def of(names: tuple[str, ...]) -> list[dict]:
        return [
            case
            for name in names
            for case in faults.campaign(folder / name, [jobs[name]], JOBS[name])
        ]

    with ThreadPoolExecutor(2) as pool:
        found = [case for part in pool.map(of, [("new",), ("split", "replacing")]) for case in part]
    return {
        (job, kind): [c for c in found if (c["job"], c["kind"]) == (job, kind)]
        for job, kinds in JOBS.items()
        for kind in kinds
    }


@pytest.mark.parametrize(
    "job, kind", [(job, kind) for job, kinds in JOBS.items() for kind in kinds]
)
def test_nothing_is_lost(job, kind, cases):
    found = cases[job, kind]
    assert [c["at"] for c in found] == list(range(1, len(found) + 1))
    assert {c["struck"].split()[0] for c in found} >= {
        "open", "pwrite", "fsync", "ftruncate", "replace", "unlink",
    }  # fmt: skip
    wrong = {(c["at"], c["struck"]): faults.what_is_wrong(c) for c in found}
    assert not {n: w for n, w in wrong.items() if w}


def test_work_is_kept_and_the_message_says_how_to_go_on(cases):
    found = cases["replacing", "ENOSPC"]
    going_on = [c for c in found if "Going on after" in (c["second_error"] or "")]
    assert len(going_on) > len(found) // 2
    for case in going_on:
        error = " ".join(case["error"].split())
        assert "The disk became full" in error, error
        assert "are finished and kept" in error or "All is written and verified" in error, error
        assert "Go on with: qwq-quant to-gguf " in error
        assert case["between"]["m.gguf"] in (case["older"]["m.gguf"], case["expected"]["m.gguf"])
    few = [c for c in found if c["code"] and c not in going_on]
    for case in few:  # before the first tensor
        assert "Nothing was left behind." in case["error"] or "open" in case["struck"]
        assert list(case["between"]) == list(case["older"])


def test_what_was_not_flushed_is_made_again(cases):
    """After a power cut fewer tensors are taken up than after a kill at the same operation."""
    kill, power = cases["new", "kill"], cases["new", "power"]

    def taken_up(case: dict) -> int:
        words = (case["second_error"] or "").split()
        return int(words[words.index("after") + 1]) if "after" in words else 0

    both = [(taken_up(k), taken_up(p)) for k, p in zip(kill, power, strict=False)]
    assert all(k >= p for k, p in both) and sum(k > p for k, p in both) > len(both) // 4


def test_the_fault_layer_itself(tmp_path):
    """A power cut takes what was not flushed, and only that."""
    (tmp_path / "f").mkdir()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        faulty = faults.FaultyFolder(tmp_path / "f", "power: zeros", 6, write)
        faulty.install()
        descriptor = os.open(tmp_path / "f" / "a", os.O_RDWR | os.O_CREAT, 0o666)
        os.pwrite(descriptor, b"first", 0)
        os.fsync(descriptor)
        os.pwrite(descriptor, b"second", 5)
        os.open(tmp_path / "f" / "b", os.O_RDWR | os.O_CREAT, 0o666)
        os.pwrite(descriptor, b"third", 0)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    assert os.read(read, 100) == b"pwrite a\n"
    assert (tmp_path / "f" / "a").read_bytes() == b"first" + bytes(6)
    assert (tmp_path / "f" / "b").read_bytes() == b""
