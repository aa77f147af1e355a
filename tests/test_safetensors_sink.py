"""ShardedSink: read back by safetensors, loaded by transformers, equal to what they would save."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from quant import durable
from quant.durable import PendingFolder
from quant.errors import OutputFailed
from quant.formats.nf4 import Bnb4bit
from quant.safetensors_file import read_header
from quant.sinks.safetensors import INDEX, ShardedSink

ROOT = Path(__file__).parents[1]
DTYPES = {"F32": np.float32, "BF16": np.uint16, "U8": np.uint8, "F16": np.float16, "I64": np.int64}


def some_tensors(rng, shapes):
    """(name, dtype, array) of all widths in turn, and many odd lengths."""
    tensors = []
    for i, shape in enumerate(shapes):
        dtype = list(DTYPES)[i % len(DTYPES)]
        values = rng.integers(0, 100, shape).astype(DTYPES[dtype])
        tensors.append((f"layer.{i}.weight", dtype, values))
    return tensors


SHAPES = [(3, 5), (7,), (5, 1), (), (2, 3, 4), (1, 1), (11,), (13,), (0, 4), (64, 33), (9, 9)]


def write(folder, tensors, **options):
    sink = ShardedSink(folder, [(n, d, a.shape) for n, d, a in tensors], **options)
    try:
        for name, _, array in tensors:
            sink.write(name, array)
        return sink.finish()
    finally:
        sink.discard()


def to_torch(dtype, array):
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def read_all(folder):
    """Every tensor, found as transformers finds it: by the index, or in the one file."""
    if (folder / INDEX).exists():
        files = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    else:
        files = {"model.safetensors"}
    return {name: t for file in files for name, t in load_file(folder / file).items()}


@pytest.mark.parametrize("max_nbytes", [10**9, 2000, 1])
def test_safetensors_reads_what_was_written(tmp_path, max_nbytes):
    tensors = some_tensors(np.random.default_rng(0), SHAPES)
    files = write(tmp_path, tensors, max_shard_nbytes=max_nbytes)
    again = read_all(tmp_path)
    assert again.keys() == {name for name, _, _ in tensors}
    for name, dtype, array in tensors:
        assert torch.equal(again[name], to_torch(dtype, array)), name
    for file in files:
        with safe_open(file.path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert file.nbytes == file.path.stat().st_size
    names = [file.path.name for file in files]
    n = len(files)
    if max_nbytes == 10**9:
        assert names == ["model.safetensors"] and not (tmp_path / INDEX).exists()
    else:
        assert n > 2 and names == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    assert sorted(os.listdir(tmp_path)) == sorted(names + [INDEX] * (n > 1))


def test_the_index_is_transformers_own(tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    theirs = json.loads((tmp_path / "theirs" / INDEX).read_text())
    tensors = []
    for file in dict.fromkeys(theirs["weight_map"].values()):
        infos, _ = read_header(tmp_path / "theirs" / file)
        loaded = load_file(tmp_path / "theirs" / file)
        tensors += [(name, info.dtype, loaded[name].numpy()) for name, info in infos.items()]
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", tensors, max_shard_nbytes=20_000)
    ours = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    config.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_places_are_those_of_save_file(tmp_path):
    """Wide types first, so that each tensor is aligned; only the header has spaces at its end."""
    rng = np.random.default_rng(0)
    tensors = [
        (f"{i}", dtype, rng.integers(0, 100, (3, i + 1)).astype(DTYPES[dtype]))
        for i, dtype in enumerate(["U8", "F32", "I64", "U8", "F32"])
    ]
    write(tmp_path, tensors)
    save_file({n: a for n, _, a in tensors}, tmp_path / "theirs", metadata={"format": "pt"})
    infos, _ = read_header(tmp_path / "model.safetensors")
    order = sorted(infos.values(), key=lambda info: info.offset)
    theirs, _ = read_header(tmp_path / "theirs")
    assert [i.name for i in order] == sorted(theirs, key=lambda name: theirs[name].offset)
    for info in order:
        assert info.offset % np.dtype(DTYPES[info.dtype]).itemsize == 0


def test_rows_in_blocks_and_lengths_that_come_late(tmp_path):
    rng = np.random.default_rng(0)
    w = rng.integers(0, 2**16, (100, 33), np.uint16)
    late = [np.frombuffer(b"{}" * n, np.uint8) for n in (10, 3, 8)]
    planned = [("a", "U8", (30,)), ("w", "BF16", w.shape), ("b", "U8", (6,)), ("c", "U8", (16,))]
    sink = ShardedSink(tmp_path, planned)
    sink.write("a", late[0])
    sink.write("w", (w[i : i + 7] for i in range(0, 100, 7)))
    sink.write("b", late[1])
    sink.write("c", late[2])
    (file,) = sink.finish()
    again = load_file(file.path)
    np.testing.assert_array_equal(again["w"].view(torch.uint16).numpy(), w)
    for name, data in zip("abc", late, strict=True):
        assert again[name].numpy().tobytes() == data.tobytes()
    hashes = {t.entry.name: t.xxh3_128 for t in file.tensors}
    assert hashes["w"] == xxh3_128_hexdigest(w.tobytes())


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("b", np.ones(4, np.uint8), "where the plan has a"),
        ("a", np.ones((2, 2)), "is F32, not float64"),
        ("a", np.ones((3, 2), np.float32), "more than its 16 bytes"),
        ("a", np.ones(1, np.float32), "4 bytes instead of 16"),
    ],
)
def test_what_is_not_planned_is_refused(tmp_path, name, array, message):
    sink = ShardedSink(tmp_path, [("a", "F32", (2, 2)), ("b", "U8", (4,))])
    with pytest.raises(ValueError, match=message):
        sink.write(name, array)
    sink.discard()
    assert os.listdir(tmp_path) == []


def test_an_unfinished_or_impossible_plan_is_refused(tmp_path):
    sink = ShardedSink(tmp_path, [("a", "U8", (2,)), ("b", "U8", (4,))])
    sink.write("a", np.ones(2, np.uint8))
    with pytest.raises(ValueError, match="1 planned tensors were not written, first b"):
        sink.finish()
    sink.discard()
    with pytest.raises(ValueError, match="one name"):
        ShardedSink(tmp_path, [("a", "F32", (1,)), ("a", "F32", (1,))])
    sink = ShardedSink(tmp_path, [("a", "U8", (2,))])
    sink.write("a", np.ones(2, np.uint8))
    with pytest.raises(ValueError, match="where the plan has the end"):
        sink.write("b", np.ones(2, np.uint8))
    sink.discard()


def test_names_of_any_kind_survive(tmp_path):
    names = ["plain", 'quote"', "back\\slash", "snowman ☃", "control \x1b[2J", "new\nline"]
    write(tmp_path, [(name, "U8", np.ones((1, 1), np.uint8)) for name in names])
    assert set(load_file(tmp_path / "model.safetensors")) == set(names)


def test_wrong_bytes_on_the_disk_are_noticed(tmp_path, monkeypatch):
    """A disk that stores one byte wrong: simulated at the only place bytes are handed to it."""
    honest = durable.PendingFile.write_at

    def lying(self, offset, data):
        honest(self, offset, data)
        if offset > 1000:
            os.pwrite(self.descriptor, b"\xa5", offset)

    monkeypatch.setattr(durable.PendingFile, "write_at", lying)
    tensors = [(str(i), "F32", np.ones((300, 2), np.float32)) for i in range(4)]
    with pytest.raises(OutputFailed, match=r"model\.safetensors was read back and the bytes of 1"):
        write(tmp_path, tensors)
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from quant.durable import PendingFolder
from quant.errors import OutputFailed
from quant.sinks.safetensors import ShardedSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
pending = PendingFolder(Path(sys.argv[1]))
sink = ShardedSink(pending.temporary, [("w", "U8", (1000, 1000))])
try:
    sink.write("w", (np.ones((10, 1000), np.uint8) for _ in range(100)))
    sink.finish()
    pending.publish()
except OutputFailed as error:
    print(error)
finally:
    sink.discard()
    pending.discard()
"""


def test_a_full_disk_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "larger than this file system" in result.stdout and not result.stderr
    assert os.listdir(tmp_path) == []


# --- a whole model: the encoder, the sink and the folder together ---------------------------------


def quantization_config(quant_type="nf4", double_quant=True):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )


def quantized_by_transformers(folder: Path, target: Path, *options) -> None:
    """Load in 4 bits and save. No forward in between: on some processors it repacks weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization_config(*options), dtype=torch.bfloat16
    )
    model.save_pretrained(target)


def quantized_by_us(folder: Path, target: Path, config: Path, format: Bnb4bit) -> None:
    """All linear layers but lm_head in 4 bits, the rest in bfloat16, in shards of 100 kB."""
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(folder / "model.safetensors").items()}
    planned = []
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            for part, (dtype, shape) in format.parts(tensor.shape).items():
                planned.append((f"{name}.{part}" if part else name, dtype, shape))
        else:
            planned.append((name, "BF16", tensor.shape))
    pending = PendingFolder(target)
    sink = ShardedSink(pending.temporary, planned, 100_000)
    try:
        for name, tensor in tensors.items():
            if name.endswith("proj.weight"):
                parts = format.encode(tensor.float().numpy(), "bfloat16")
                for part, array in parts.items():
                    sink.write(f"{name}.{part}" if part else name, array)
            else:
                sink.write(name, tensor.view(torch.uint16).numpy())
        sink.finish()
        (pending.temporary / "config.json").write_text(config.read_text())
        pending.publish()
    finally:
        sink.discard()
        pending.discard()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False], ids=["nested", "plain"])
def test_a_model_is_what_transformers_would_save(made_models, tmp_path, quant_type, double_quant):
    folder, _ = made_models("qwen2")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    quantized_by_transformers(folder, theirs, quant_type, double_quant)
    quantized_by_us(folder, ours, theirs / "config.json", Bnb4bit(quant_type, double_quant))
    expected, found = read_all(theirs), read_all(ours)
    assert found.keys() == expected.keys() and len(expected) > 50
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    tokens = torch.tensor([[5, 17, 300, 4000, 12]])
    logits = []
    for place in (theirs, ours):
        model = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_searched_scales_load_too(made_models, tmp_path):
    folder, model = made_models("qwen2")
    quantized_by_transformers(folder, tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    quantized_by_us(folder, tmp_path / "ours", config, Bnb4bit(search_scales=True))
    tokens = torch.tensor([[5, 17, 300, 4000, 12]])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        exact, found = model.eval()(tokens).logits, loaded(tokens).logits.float()
    assert float(((found - exact) ** 2).sum()) < 0.05 * float((exact**2).sum())


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from quant.durable import PendingFolder
from quant.sinks.safetensors import ShardedSink
pending = PendingFolder(Path(sys.argv[1]))
sink = ShardedSink(pending.temporary, [(str(i), "F32", (100, 10)) for i in range(9)], 9000)
for i in range(int(sys.argv[2])):
    sink.write(str(i), np.full((100, 10), i, np.float32))
if sys.argv[3] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sink.finish()
pending.publish()
"""


@pytest.mark.parametrize("n_written", [0, 5])
def test_a_killed_run_leaves_no_final_name_and_the_next_takes_over(tmp_path, n_written):
    def run(n, how):
        command = [sys.executable, "-c", KILLED, tmp_path / "out", str(n), how]
        return subprocess.run(command, cwd=ROOT, capture_output=True)

    assert run(n_written, "kill").returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.partial"]
    result = run(9, "finish")
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path) == ["out"]
    again = read_all(tmp_path / "out")
    assert {name: float(t.mean()) for name, t in again.items()} == {str(i): i for i in range(9)}
    n_files = len(list((tmp_path / "out").iterdir()))
    assert n_files == 1 + len(list((tmp_path / "out").glob("model-*.safetensors"))) == 6
