"""What measuring takes of memory, seen from outside: the largest resident set of a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from model_makers import make_model

N_LAYERS, HIDDEN = 48, 256
FEW, MANY = 512, 2048

CODE = """
import json, resource, sys
from pathlib import Path
from measuring_helpers import measured, random_tokens
from quant.calibration import streamed_model
streamed_model.ACTIVATION_NBYTES = 8 << 20  # that both sizes fill
folder, metrics, *sizes = sys.argv[1:]
peaks = []
for n in sizes:
    measured(Path(folder), random_tokens((int(n) // 64, 64)), *metrics.split(","))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of many thin layers, whose states outweigh it."""
    folder = tmp_path_factory.mktemp("deep")
    make_model(
        "qwen2",
        folder,
        num_hidden_layers=N_LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_key_value_heads=1,
        vocab_size=4096,
    )
    return folder


def test_memory_does_not_grow_with_layers_times_tokens(deep):
    """The default metric makes a backward pass, which sees the input of every layer again."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(deep), "gradient", str(FEW), str(MANY)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    few, many = json.loads(done.stdout)
    one = 4 * HIDDEN * (MANY - FEW)  # bytes that the states of one layer grow by
    assert many - few < 0.2 * N_LAYERS * one, (few, many)
