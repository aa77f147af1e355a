"""TensorReader against torch: every dtype exactly, FP8 scales in all their shapes, bad files."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quant.errors import BadInput
from quant.safetensors_file import read_header
from quant.tensors import TensorInfo, TensorReader, e4m3_values, fp8_block

ROOT = Path(__file__).resolve().parents[1]


def stored(tmp_path, **tensors) -> dict[str, TensorInfo]:
    save_file(tensors, tmp_path / "t.safetensors")
    return read_header(tmp_path / "t.safetensors")[0]


def read(info: TensorInfo, start: int, stop: int) -> np.ndarray:
    with TensorReader() as reader:
        return reader.read_float32(info, start, stop)


def same_bits(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Equal as bits, so that NaN equals NaN and -0.0 differs from 0.0; NaN's sign is free."""
    theirs = theirs.numpy().reshape(ours.shape)
    nan = np.isnan(theirs)
    assert (np.isnan(ours) == nan).all()
    assert (ours.view(np.uint32) == theirs.view(np.uint32))[~nan].all()


def test_e4m3_is_torchs_in_all_256_values():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    same_bits(e4m3_values(), every.float())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64]
)
@pytest.mark.parametrize("shape", [(), (1,), (63,), (5, 7), (3, 5, 33), (2, 1), (0, 4), (4, 0)])
def test_every_dtype_and_shape_reads_as_torch_reads_it(tmp_path, dtype, shape):
    torch.manual_seed(0)
    w = (torch.randn(shape, dtype=torch.float64) * 20).to(dtype)
    # A tensor of one odd byte before it: nothing in the file is aligned.
    info = stored(tmp_path, a=torch.zeros(1, dtype=torch.uint8), w=w)["w"]
    assert (info.shape, info.n_weights) == (shape, w.numel())
    same_bits(read(info, 0, info.n_rows), w.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_65536_half_precision_values(tmp_path, dtype):
    w = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(256, 256)
    same_bits(read(stored(tmp_path, w=w)["w"], 0, 256), w.float())


def test_rows_of_a_stack_of_matrices(tmp_path):
    w = torch.randn(3, 5, 33)
    info = stored(tmp_path, w=w)["w"]
    assert (info.n_rows, info.n_columns) == (15, 33)
    for start, stop in [(0, 15), (4, 6), (14, 15), (7, 7)]:
        same_bits(read(info, start, stop), w.reshape(15, 33)[start:stop])


def test_float32_that_is_read_may_be_written_to(tmp_path):
    info = stored(tmp_path, w=torch.ones(2, 2))["w"]
    with TensorReader() as reader:
        reader.read_float32(info, 0, 2)[:] = 7
        assert (reader.read_float32(info, 0, 2) == 1).all()


def fp8_with_scale(tmp_path, shape, scale: torch.Tensor) -> tuple[TensorInfo, torch.Tensor]:
    torch.manual_seed(1)
    w = (torch.randn(shape) * 30).to(torch.float8_e4m3fn)
    infos = stored(tmp_path, w=w, s=scale)
    return replace(infos["w"], scale=infos["s"]), w.float()


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (300, 200), (1, 130), (129, 1), (7, 5)])
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (16, 32), (256, 256), (1, 128), (32, 1)])
def test_block_scales(tmp_path, shape, block):
    down, across = (-(-n // b) for n, b in zip(shape, block, strict=True))
    scale = torch.rand(down, across) + 0.5
    info, w = fp8_with_scale(tmp_path, shape, scale)
    each = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    expected = w * each[: shape[0], : shape[1]]
    for start, stop in [
        (0, shape[0]),
        (shape[0] // 2, shape[0]),
        (shape[0] // 3, shape[0] // 3 + 1),
    ]:
        same_bits(read(info, start, stop), expected[start:stop])


@pytest.mark.parametrize("scale_shape", [(40,), (40, 1), (), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_per_row_and_one_for_all(tmp_path, scale_shape, dtype):
    scale = (torch.rand(scale_shape) + 0.5).to(dtype)
    info, w = fp8_with_scale(tmp_path, (40, 300), scale)
    each = scale.float().reshape(-1, 1)
    same_bits(read(info, 0, 40), w * each)
    same_bits(read(info, 17, 19), w[17:19] * (each[17:19] if len(each) > 1 else each))


def test_a_matrix_in_fp8_is_what_deepseeks_own_formula_gives(tmp_path):
    """w = stored * scale_inv for each 128x128 block, written as in DeepSeek-V3's weight_dequant."""
    shape, block = (300, 520), 128
    scale = torch.rand(3, 5)
    info, w = fp8_with_scale(tmp_path, shape, scale)
    expected = w.clone()
    for i in range(0, shape[0], block):
        for j in range(0, shape[1], block):
            expected[i : i + block, j : j + block] *= scale[i // block, j // block]
    same_bits(read(info, 0, 300), expected)


def test_nan_and_infinite_scales_reach_the_caller_without_a_warning(tmp_path):
    scale = torch.tensor([[float("inf"), float("nan"), 3e38]])
    w = torch.full((2, 300), 448.0).to(torch.float8_e4m3fn)
    w[0] = 0  # times infinity: invalid; 448 * 3e38: overflow
    infos = stored(tmp_path, w=w, s=scale)
    ours = read(replace(infos["w"], scale=infos["s"]), 0, 2)
    same_bits(ours, w.float() * scale.repeat_interleave(128, 1)[:, :300])


@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [
        ((256, 256), (3, 2)),
        ((256, 256), (7,)),
        ((256, 256), (2, 2, 1)),
        ((2, 256, 256), (2, 2, 2)),
        ((256,), (2,)),
        ((0, 5), (2, 1)),
        ((256, 256), (0, 0)),
        ((256, 256), ()),
    ],
)
def test_scales_that_do_not_cover_the_weight_are_refused(shape, scale_shape):
    with pytest.raises(ValueError, match=r"matrix|do not cover"):
        fp8_block(shape, scale_shape)


def test_powers_of_two_are_told_apart_by_the_number_of_scales():
    """Two block sizes that give the same number of scales > 1 would be a guess."""
    for n in range(1, 1100):
        counts = [-(-n // size) for size in (16, 32, 64, 128, 256)]
        many = [count for count in counts if count > 1]
        assert len(set(many)) == len(many), n


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    info = stored(tmp_path, **{"w\x1b[2J": torch.ones(4, 4)})["w\x1b[2J"]
    info.path.write_bytes(info.path.read_bytes()[:-1])
    with pytest.raises(BadInput, match="End of") as caught:
        read(info, 0, 4)
    assert "\x1b" not in str(caught.value)
    info.path.unlink()
    with pytest.raises(BadInput, match="No such file"):
        read(info, 0, 4)


def test_each_file_is_opened_once_and_closed_at_the_end(tmp_path):
    info, open_files = stored(tmp_path, w=torch.ones(4, 4))["w"], Path("/proc/self/fd")
    before = len(list(open_files.iterdir()))
    with TensorReader() as reader:
        for _ in range(10):
            reader.read_float32(info, 0, 4)
        assert len(list(open_files.iterdir())) == before + 1
    assert len(list(open_files.iterdir())) == before


def test_threads_read_what_one_thread_reads(tmp_path):
    w = torch.randn(64, 50)
    info, wrong = stored(tmp_path, w=w)["w"], []
    with TensorReader() as reader:

        def work(row):
            for _ in range(50):
                if not (reader.read_float32(info, row, row + 1) == w[row].numpy()).all():
                    wrong.append(row)

        threads = [threading.Thread(target=work, args=(row,)) for row in range(0, 64, 8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


CHILD = """
import resource, sys
from pathlib import Path
from quant.safetensors_file import read_header
from quant.tensors import TensorReader

def status_kb(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1])

before = status_kb("VmHWM")  # ru_maxrss would begin at the parent's
limit = status_kb("VmSize") * 1024 + 400_000_000  # a mapping of the file would not fit
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
info = read_header(Path(sys.argv[1]))[0]["small"]
with TensorReader() as reader:
    assert (reader.read_float32(info, 1, 2) == 0).all()
print(status_kb("VmHWM") - before)
"""


def test_a_small_tensor_of_an_8_gb_shard_costs_no_memory(tmp_path):
    n_big = 8_000_000_000
    places = {"big": (n_big // 2, [0, n_big]), "small": (6, [n_big, n_big + 12])}
    header = json.dumps(
        {
            name: {"dtype": "BF16", "shape": [3, n // 3] if n == 6 else [n], "data_offsets": place}
            for name, (n, place) in places.items()
        }
    ).encode()
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + n_big + 12)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, path], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 30_000  # kB
