"""Recipes: what ships is whole and commented, a mistake speaks, and profiles act in llama.cpp."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import llama_oracle
import pytest
from click.testing import CliRunner

from quant.checkpoint import Checkpoint
from quant.cli import recipes as cli_recipes
from quant.errors import BadRecipe, InputMissing
from quant.gguf_file import GgufFile, Value
from quant.metadata_keys import SAMPLING
from quant.recipe import (
    PENALTIES,
    Profile,
    all_profiles,
    choose_recipe,
    find_profile,
    json_schema,
    read_profile,
    read_recipe,
    recipe_names,
    recipe_text,
)
from quant.sampling import (
    DEFAULT_SEQUENCE,
    PREFIX,
    check_sampling,
    sampling_from_generation_config,
)
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf

ROOT = Path(__file__).parents[1]
PROFILES = sorted(all_profiles())


def plain(metadata) -> dict:
    return {key.removeprefix(PREFIX): value.data for key, value in metadata.items()}


# --- what ships -------------------------------------------------------------------------------


def test_the_shipped_recipes():
    assert recipe_names() == [
        "deepseek-r1-distill", "qwen2.5", "qwen3", "qwen3-instruct-2507", "qwen3-thinking-2507",
        "qwq-32b",
    ]  # fmt: skip
    for name in recipe_names():
        assert read_recipe(name).name == name
    assert len(all_profiles()) == sum(len(read_recipe(n).profiles) for n in recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_why_it_exists(name):
    text = recipe_text(name)
    assert "# Why:" in text and "# Known:" in text
    for profile in read_recipe(name).profiles:
        head = re.split(rf'\[profiles\."?{re.escape(profile)}"?\]', text)[0]
        comment = head.rstrip().rpartition("\n\n")[2]
        assert "# Does:" in comment and "# Does not:" in comment, profile
        assert read_recipe(name).profiles[profile].about


def test_the_three_profiles_of_qwq():
    assert list(read_recipe("qwq-32b").profiles) == [
        "qwen-official",
        "unsloth",
        "unsloth-with-penalties",
    ]
    official = plain(read_profile("qwen-official"))
    assert official == {
        "sequence": DEFAULT_SEQUENCE,
        "temp": 0.6,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.0,
        "penalty_repeat": 1.0,
    }
    unsloth = find_profile("unsloth")
    assert unsloth.sequence == "top_k;top_p;min_p;temperature;dry;typ_p;xtc"
    assert unsloth.not_in_gguf() == {"dry_multiplier": 0.5, "dry_penalty_last_n": 4096}
    assert "penalty_repeat" not in unsloth.settings()  # it would do nothing
    assert find_profile("unsloth-with-penalties").sequence.split(";")[3:5] == [
        "temperature",
        "penalties",
    ]


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_acts(name):
    metadata = read_profile(name)
    assert check_sampling(metadata) == []
    for key, value in metadata.items():
        assert value.type == SAMPLING[key.removeprefix(PREFIX)].types[0]
        assert type(value.data) is {"f32": float, "i32": int, "str": str}[value.type]


def test_the_makers_settings_are_what_their_recipe_expects():
    for recipe in map(read_recipe, recipe_names()):
        known = recipe.expected.generation.model_dump()
        own = recipe.profile(None)[1].settings()
        for name, ours in {"temperature": "temp", "repetition_penalty": "penalty_repeat"}.items():
            assert own[ours] in known[name]
        assert own["top_p"] in known["top_p"] and own["top_k"] in known["top_k"]


def test_profiles_know_gguf_s_twelve_settings_and_their_limits():
    assert SAMPLING.keys() <= Profile.model_fields.keys()
    assert PENALTIES.keys() <= Profile.model_fields.keys()
    for name, key in SAMPLING.items():
        for bad in (key.range or ()) and (key.range[0] - 1, key.range[1] + 1):
            with pytest.raises(ValueError):
                Profile(**{name: int(bad) if key.types[0] == "i32" else bad})


# --- a penalty that no sampler applies --------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sequence": "top_k;temp", "penalty_repeat": 1.1}, "penalty_repeat is 1.1, but no"),
        ({"sequence": "top_k;temp", "presence_penalty": 1.0}, "presence_penalty is 1, but no"),
        ({"sequence": "top_k;temp", "frequency_penalty": 0.5}, "frequency_penalty is 0.5"),
        ({"sequence": "penalties;temp", "dry_multiplier": 0.5}, "`dry` is none of"),
        ({"mirostat": 2, "penalty_repeat": 1.1}, "Mirostat replaces"),
        ({"penalty_repeat": 1.1, "penalty_last_n": 0}, "looks back on 0 tokens"),
        ({"dry_multiplier": 0.5, "dry_penalty_last_n": 0}, "looks back on 0 tokens"),
    ],
)
def test_refused(settings, says, tmp_path):
    with pytest.raises(BadRecipe) as error:
        Profile(**settings)
    assert says in str(error.value) and error.value.next_step
    path = tmp_path / "mine.toml"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    with pytest.raises(BadRecipe):
        read_profile(str(path))


@pytest.mark.parametrize(
    "settings",
    [
        {"penalty_repeat": 1.1},  # llama.cpp's default sequence has penalties
        {"dry_multiplier": 0.5},
        {"sequence": "penalties;temp", "presence_penalty": 1.0},
        {"sequence": "temp", "penalty_repeat": 1.0, "dry_multiplier": 0.0, "presence_penalty": 0.0},
    ],
)
def test_taken(settings):
    Profile(**settings)


# --- the real llama.cpp -----------------------------------------------------------------------

WITNESS = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.fit_params = sys.argv[1], 128, False, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
with urllib.request.urlopen(server.listening_address + "/props") as answer:
    print("\\n" + json.dumps(json.load(answer)["default_generation_settings"]["params"]))
"""
SERVER_NAMES = {
    "temp": "temperature", "penalty_repeat": "repeat_penalty", "penalty_last_n": "repeat_last_n",
    "sequence": "samplers",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_qwq, tmp_path_factory):
    """profile -> a GGUF file of tiny-qwq that carries it."""
    folder, paths = tmp_path_factory.mktemp("profiles"), {}
    for name in PROFILES:
        job = plan_gguf(open_source(str(tiny_qwq)), Wishes("Q8_0", sampling=name))
        write_gguf(job, folder / f"{name}.gguf")
        paths[name] = folder / f"{name}.gguf"
    return paths


@pytest.mark.parametrize("name", PROFILES)
def test_llama_cpp_reads_the_keys_back(name, made):
    found = llama_oracle.metadata(made[name])
    for key, value in read_profile(name).items():
        text = found[key]
        if value.type == "str":
            assert text == value.data
        else:
            assert float(text) == pytest.approx(value.data, rel=1e-6)
            assert value.type == "f32" or text == str(value.data)


@pytest.mark.parametrize("name", PROFILES)
def test_llama_cpp_s_server_samples_so(name, made):
    """Its common code parses the keys; the sampler chain it would run is printed by /props."""
    pytest.importorskip("xllamacpp")
    done = subprocess.run(
        [sys.executable, "-c", WITNESS, str(made[name])],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    for setting, value in plain(read_profile(name)).items():
        served = found[SERVER_NAMES.get(setting, setting)]
        if setting == "sequence":
            assert ";".join(served) == value
        else:
            assert served == pytest.approx(value, rel=1e-6)


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("temperature = 0.6", "Did you mean temp?"),
        ("repetition_penalty = 1.1", "Did you mean penalty_repeat?"),
        ("top-k = 40", "Did you mean top_k?"),
        ("[sampling]\ntemp = 0.6", "unknown key sampling"),
        ("temp = '0.6'", "temp is '0.6'"),
        ("temp = nan", "temp is nan"),
        ("temp = inf", "temp is inf"),
        ("top_k = 40.5", "top_k is 40.5"),
        ("top_k = true", "top_k is True"),
        ("top_p = 1.01", "less than or equal to 1"),
        ("mirostat = 3", "less than or equal to 2"),
        ("penalty_last_n = -1", "greater than or equal to 0"),
        ("sequence = 1", "sequence is 1"),
        ("sequence = 'top_k,temp'", "separated by ';' alone"),
        ("temp = 2026-11-21", "temp is"),
        ("temp = ", "is no TOML"),
        ("temp = 1\ntemp = 2", "is no TOML"),
        ("temp = 'a\\u001b[2J'", "temp is"),
    ],
)
def test_bad_profiles(text, says, tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(BadRecipe) as error:
        read_profile(str(path))
    assert says in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("thinks = true", "thinks = true\nthink = true", "Did you mean thinks?"),
        ("thinks = true", "", "lacks thinks"),
        ("thinks = true", "thinks = 1", "thinks is 1"),
        ("temp = 0.6", "temperature = 0.6", "profiles.qwen-official.temperature"),
        ("factor = 4.0", "factor = 0.5", "yarn.factor is 0.5"),
        ("rms_norm_eps = [1e-5]", "rms_norm_epsilon = [1e-5]", "Did you mean rms_norm_eps?"),
        ("rms_norm_eps = [1e-5]", "rms_norm_eps = []", "expected.rms_norm_eps is []"),
        ('name = "qwq"\n', 'name = "("\n', "no regular expression"),
        ("[profiles.unsloth]", '[profiles."a\\u001b[2J"]', "should match pattern"),
        ('parser = "deepseek_r1"', 'parser = "x; rm -rf ~"', "should match pattern"),
        ("thinks = true", "thinks = " + "[" * 20_000 + "]" * 20_000, "is no TOML"),
    ],
    ids=range(11),
)
def test_bad_recipes(old, new, says, tmp_path):
    text = recipe_text("qwq-32b")
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(BadRecipe) as error:
        read_recipe(str(path))
    assert says in str(error.value) and "\x1b" not in str(error.value)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('temp = 1\ntop_k = 20\nsequence = "Top-K;Temp"\nmirostat = 0\n')
    assert read_profile(str(path)) == {
        PREFIX + "temp": Value("f32", 1.0),
        PREFIX + "top_k": Value("i32", 20),
        PREFIX + "sequence": Value("str", "top_k;temperature"),
        PREFIX + "mirostat": Value("i32", 0),
    }
    path.write_text(recipe_text("qwen3"))
    assert read_recipe(str(path)) == read_recipe("qwen3")


def test_what_is_not_there(tmp_path):
    with pytest.raises(BadRecipe, match="Did you mean qwen-official"):
        read_profile("qwen-oficial")
    with pytest.raises(BadRecipe, match="Did you mean qwq-32b"):
        read_recipe("qwq")
    for name in (str(tmp_path / "none.toml"), "../recipes/qwq-32b", "a\0b.toml"):
        with pytest.raises(InputMissing):
            read_profile(name)
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "latin1.toml").write_bytes(b"# \xff\n")
    for name in ("folder.toml", "pipe.toml", "latin1.toml", "x" * 5000 + ".toml"):
        with pytest.raises(BadRecipe):  # and it does not wait for a writer of the pipe
            read_profile(str(tmp_path / name))


# --- choosing ---------------------------------------------------------------------------------


def model(architecture: str, name: str) -> Checkpoint:
    return Checkpoint(Path("/"), name, None, {"architectures": [architecture]}, {})


@pytest.mark.parametrize(
    ("architecture", "name", "recipe"),
    [
        ("Qwen2ForCausalLM", "Qwen/QwQ-32B", "qwq-32b"),
        ("Qwen2ForCausalLM", "me/my-QwQ-tune", "qwq-32b"),
        ("Qwen2ForCausalLM", "Qwen/Qwen2.5-7B-Instruct", "qwen2.5"),
        ("Qwen2ForCausalLM", "Qwen/Qwen2.5-7B", None),  # a base model
        ("Qwen2ForCausalLM", "Qwen/Qwen2.5-Math-7B-Instruct", None),
        ("Qwen3ForCausalLM", "Qwen/Qwen3-8B", "qwen3"),
        ("Qwen3MoeForCausalLM", "Qwen/Qwen3-30B-A3B", "qwen3"),
        ("Qwen3ForCausalLM", "Qwen/Qwen3-8B-Base", None),
        ("Qwen3ForCausalLM", "Qwen/Qwen3-4B-Instruct-2507", "qwen3-instruct-2507"),
        ("Qwen3MoeForCausalLM", "Qwen/Qwen3-30B-A3B-Thinking-2507", "qwen3-thinking-2507"),
        ("Qwen2ForCausalLM", "Qwen/Qwen2.5-14B-Instruct-1M", None),  # another theta, another eps
        ("Qwen3ForCausalLM", "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", None),
        ("Qwen2ForCausalLM", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "deepseek-r1-distill"),
        ("LlamaForCausalLM", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek-r1-distill"),
        ("LlamaForCausalLM", "QwQ-llama", None),
        ("Qwen2ForCausalLM", "QwQ-Qwen2.5-Instruct-DeepSeek-R1-Distill", None),  # two fit
        ("Qwen2ForCausalLM", "model", None),
    ],
)
def test_by_the_model_s_identity(architecture, name, recipe):
    chosen = choose_recipe(model(architecture, name))
    assert (chosen and chosen.recipe.name) == recipe
    if chosen:
        assert name.rpartition("/")[2] in chosen.why


def test_a_named_recipe_wins_and_a_gguf_has_an_identity(made, tiny_qwq):
    assert choose_recipe(model("X", "y"), "qwen3").recipe.name == "qwen3"
    gguf = GgufFile.open(made["qwen-official"])
    assert choose_recipe(gguf).recipe.name == "qwq-32b"
    assert choose_recipe(open_source(str(tiny_qwq))).recipe.name == "qwq-32b"


def test_hostile_names_choose_nothing_and_take_no_time():
    for name in ("\x1b[2J" * 1000, "qwen" * 100_000, ["qwq"], None):
        config = {"architectures": ["Qwen2ForCausalLM"], "_name_or_path": name}
        choose_recipe(Checkpoint(Path("/"), "m", None, config, {}))
    assert choose_recipe(Checkpoint(Path("/"), "qwq", None, {"architectures": 5}, {})) is None


# --- the command ------------------------------------------------------------------------------


def recipes(*args):
    done = CliRunner().invoke(cli_recipes.command, list(args), standalone_mode=False)
    assert done.exception is None, done.exception
    return done.output


def test_the_list_names_every_profile_in_80_columns():
    output = recipes()
    assert all(name in output for name in (*recipe_names(), *PROFILES))
    assert max(map(len, output.splitlines())) <= 80
    assert len(json.loads(recipes("--format", "json"))) == len(recipe_names())


def test_one_recipe_is_printed_with_its_comments():
    assert recipes("qwq-32b") == recipe_text("qwq-32b")
    assert json.loads(recipes("qwq-32b", "--format", "json"))["title"] == "QwQ-32B"


def test_the_schema_knows_every_key_and_refuses_others():
    schema = json.loads(recipes("--schema"))
    assert schema == json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Profile"]["properties"].keys() == Profile.model_fields.keys()
    assert schema["$defs"]["Profile"]["additionalProperties"] is False
    for key in ("temp", "min_p", "sequence"):
        assert schema["$defs"]["Profile"]["properties"][key]["description"]


def test_generation_config_and_profile_agree_for_tiny_qwq(tiny_qwq):
    config = json.loads((tiny_qwq / "generation_config.json").read_text())
    official = plain(read_profile("qwen-official"))
    del official["sequence"]
    assert plain(sampling_from_generation_config(config)) == official
