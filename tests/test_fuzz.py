"""Every reader of strangers' files on a few damaged ones: accepted, or an error of ours."""

import pytest
from fuzz_targets import MEMORY_NBYTES, Fault, Target, execute, targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quant.errors import BadInput

NAMES = (
    "safetensors header", "index", "model settings", "GGUF header", "tokenizer.json",
    "tokenizer.model", "recipe", "sampling profile", "overrides", "importance matrix",
    "sensitivities", "LoRA adapter", "journal", "manifest",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
def test_never_anything_but_an_answer_or_a_refusal(name, made):
    outcomes = set()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(made[name].inputs)
    def check(drawn):
        outcomes.add(execute(made[name], drawn))

    check()
    assert len(outcomes) > 1 or name == "journal"  # which never complains


def test_what_nobody_damaged_is_accepted(made):
    """Otherwise nothing deep would be reached."""
    assert tuple(made) == NAMES
    for target in made.values():
        target.run(target.valid)


def test_the_limits_themselves(monkeypatch):
    def raises(error):
        raise error

    def spin(_):
        while True:
            pass

    for run in (
        lambda drawn: bytearray(2 * MEMORY_NBYTES),
        lambda drawn: raises(KeyError("x")),
        lambda drawn: raises(RecursionError()),
        spin,
    ):
        monkeypatch.setattr("fuzz_targets.SECONDS", 0.1 if run is spin else 10.0)
        with pytest.raises(Fault):
            execute(Target("x", None, st.none(), run), None)
    assert (
        execute(Target("x", None, st.none(), lambda drawn: bytearray(1 << 20)), None) == "accepted"
    )
    refused = execute(Target("x", None, st.none(), lambda drawn: raises(BadInput("x"))), None)
    assert refused.startswith("BadInput")
