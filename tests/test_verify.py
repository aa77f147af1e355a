"""verify: a damaged output is told from a whole one, and the damage is named."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from evaluation_helpers import to_gguf
from safetensors.torch import load_file, save_file

from quant.cli import cli
from quant.dynamic_4bit import Budget, plan_4bit
from quant.errors import BadInput, InputMissing
from quant.formats.nf4 import Bnb4bit
from quant.gguf_file import open_gguf
from quant.importance import write_importance
from quant.source import open_checkpoint, open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.verify import find_outputs, verify
from quant.write_4bit import write_4bit
from quant.write_gguf import write_gguf


def states(path) -> dict[str, str]:
    (output,) = find_outputs(path)
    return {outcome.check: outcome.state for outcome in verify(output)}


def evidence(path, check: str) -> str:
    (output,) = find_outputs(path)
    (found,) = (outcome for outcome in verify(output) if outcome.check == check)
    return f"{found.state}: {found.evidence}"


ALL_OK = {"files": "ok", "structure": "ok", "meaning": "ok", "run": "ok"}


@pytest.fixture(scope="module")
def written(tiny_qwq, tmp_path_factory):
    """A folder with tiny.gguf, and the folder of a 4-bit model in it."""
    folder = tmp_path_factory.mktemp("written")
    to_gguf(tiny_qwq, "Q4_K_M", folder / "tiny.gguf")
    plan = plan_4bit(open_checkpoint(str(tiny_qwq)), Bnb4bit(), Budget("share", 0.0))
    write_4bit(plan, folder / "tiny-4bit")
    return folder


@pytest.fixture
def outputs(written, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(written, tmp_path / "written")


def flip(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# --- a GGUF file ------------------------------------------------------------------------------


def test_a_whole_file(written):
    assert states(written / "tiny.gguf") == ALL_OK
    assert "1 file, 4.4 MB, as written by qwq-quant" in evidence(written / "tiny.gguf", "files")


def test_the_damaged_tensor_is_named(outputs):
    path = outputs / "tiny.gguf"
    info = open_gguf(path).tensors["blk.3.ffn_up.weight"]
    flip(path, info.offset + info.nbytes - 1)
    said = evidence(path, "files")
    assert said == "failed: tiny.gguf was changed, in blk.3.ffn_up.weight."


def test_damage_elsewhere_is_told(outputs):
    path = outputs / "tiny.gguf"
    flip(path, path.read_bytes().index(b"tiny-qwq"))  # its general.name
    assert evidence(path, "files") == "failed: tiny.gguf was changed, outside its tensors."


def test_a_truncated_file(outputs):
    path = outputs / "tiny.gguf"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert f"has {len(whole) - 100} bytes, not {len(whole)}" in evidence(path, "files")
    found = states(path)
    assert found["structure"] == found["meaning"] == found["run"] == "failed"


def test_every_part_of_a_split_file_names_the_whole(tiny_qwq, tmp_path):
    job = plan_gguf(open_source(str(tiny_qwq)), Wishes("Q8_0", max_file_nbytes=4_000_000))
    files = write_gguf(job, tmp_path / "split.gguf").files
    assert len(files) > 1
    for file in files:
        assert find_outputs(file.path) == find_outputs(files[0].path)
    assert states(files[1].path) == ALL_OK
    files[1].path.unlink()
    assert f"{files[1].path.name} is missing." in evidence(files[0].path, "files")


def test_a_file_without_a_manifest(outputs):
    path = (outputs / "tiny.gguf").rename(outputs / "other.gguf")
    assert states(path) == ALL_OK | {"files": "not made"}


# --- a folder ---------------------------------------------------------------------------------


def test_a_whole_folder(written):
    assert states(written / "tiny-4bit") == ALL_OK


def test_a_model_that_does_not_fit_in_memory_runs_layer_by_layer(written, monkeypatch):
    from quant.evaluation.runners import folder
    from quant.verify import predict_one_token

    whole = predict_one_token(str(written / "tiny-4bit"), print)
    monkeypatch.setattr(folder, "_free_memory", lambda device: 0)
    assert predict_one_token(str(written / "tiny-4bit"), print) == whole


def test_a_list_of_exceptions_that_readers_misread(outputs):
    path = outputs / "tiny-4bit" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "down_proj"]
    path.write_text(json.dumps(config))
    assert "config.json has" in evidence(outputs / "tiny-4bit", "files")
    assert evidence(outputs / "tiny-4bit", "meaning").startswith("failed: ")


def test_a_damaged_shard_names_its_tensors(outputs):
    path = outputs / "tiny-4bit" / "model.safetensors"
    flip(path, path.stat().st_size - 1)
    folder = outputs / "tiny-4bit"
    assert "model.safetensors was changed, in model." in evidence(folder, "files")
    assert states(folder)["meaning"] == "failed"  # the last tensor is the JSON of a weight


def test_weights_that_give_no_numbers(outputs):
    folder = outputs / "tiny-4bit"
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight.nested_absmax"))
    tensors[name][:] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert evidence(folder, "run").startswith("failed: ")


def test_what_was_added_is_told(outputs):
    (outputs / "tiny-4bit" / "notes.txt").write_text("mine")
    assert evidence(outputs / "tiny-4bit", "files").endswith("; besides them: notes.txt")


def test_a_gptq_folder(made_models, tmp_path):
    from quant.calibration.tokens import cut_tokens
    from quant.formats.gptq import Gptq
    from quant.gptq_model import plan_gptq
    from quant.texts import built_in_texts
    from quant.write_gptq import write_gptq

    checkpoint = open_checkpoint(str(made_models("qwen2")[0]))
    plan = plan_gptq(checkpoint, Gptq(4, 32), 0.01, True)
    write_gptq(plan, cut_tokens(checkpoint, built_in_texts(), 1024, 128), tmp_path / "int4")
    assert states(tmp_path / "int4") == ALL_OK
    assert "linears in 4 bits: all readers agree" in evidence(tmp_path / "int4", "meaning")
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (tmp_path / "int4" / "config.json").write_text(json.dumps(config))
    assert evidence(tmp_path / "int4", "meaning").startswith("failed: ")


# --- which output -----------------------------------------------------------------------------


def test_a_folder_of_several_outputs(outputs, tiny_qwq):
    to_gguf(tiny_qwq, "BF16", outputs / "second.gguf")
    found = [output.path.name for output in find_outputs(outputs)]
    assert found == ["second.gguf", "tiny.gguf"]


def test_what_is_no_output(tmp_path):
    with pytest.raises(InputMissing):
        find_outputs(tmp_path / "nothing")
    (tmp_path / "qwq-quant.json").write_text("no")
    with pytest.raises(BadInput, match="is no manifest of qwq-quant's") as caught:
        find_outputs(tmp_path)
    assert "replaced" not in str(caught.value)


def test_an_importance_matrix_is_whole_though_nothing_runs(tmp_path):
    sums, counts = np.ones((1, 256), np.float32), np.array([512], np.float32)
    name = "blk.0.ffn_down.weight"
    write_importance(tmp_path / "i.gguf", {name: sums}, {name: counts}, 512, 1, ["a text"])
    found = {"files": "not made", "structure": "ok", "meaning": "ok", "run": "not made"}
    assert states(tmp_path / "i.gguf") == found
    content = (tmp_path / "i.gguf").read_bytes()
    nan = np.full(256, np.nan, np.float32).tobytes()
    assert sums.tobytes() in content
    (tmp_path / "i.gguf").write_bytes(content.replace(sums.tobytes(), nan))
    assert evidence(tmp_path / "i.gguf", "meaning").startswith("failed: ")


def test_a_file_that_is_no_model_is_not_called_a_broken_one(tmp_path):
    (tmp_path / "sensitivity.json").write_text("{}")
    with pytest.raises(BadInput, match="nothing that can be verified"):
        find_outputs(tmp_path / "sensitivity.json")
    (tmp_path / "m.gguf").write_text("{}")  # by its name, it should be
    assert states(tmp_path / "m.gguf")["structure"] == "failed"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", 3, None])
def test_a_manifest_that_leads_elsewhere(outputs, name):
    manifest = json.loads((outputs / "qwq-quant.json").read_text())
    manifest["outputs"]["tiny.gguf"]["files"][0]["name"] = name
    (outputs / "qwq-quant.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match="outside its folder"):
        find_outputs(outputs / "tiny.gguf")


# --- the command ------------------------------------------------------------------------------


def test_the_command(outputs):
    done = CliRunner().invoke(cli, ["verify", str(outputs / "tiny.gguf")])
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.output.splitlines()[1:]] == [
        ["files", "ok"], ["structure", "ok"], ["meaning", "ok"], ["run", "ok"]
    ]  # fmt: skip
    (outputs / "tiny.gguf").write_bytes(b"GGUF")
    done = CliRunner().invoke(cli, ["verify", str(outputs / "tiny.gguf"), "--format", "json"])
    assert done.exit_code == 65
    ((path, found),) = json.loads(done.stdout).items()
    assert path.endswith("tiny.gguf") and {each["state"] for each in found} == {"failed"}
