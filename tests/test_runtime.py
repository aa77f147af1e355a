"""runtime: commands, Modelfile and programs, held to the grammars and programs that read them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from doctor_helpers import DEEPSEEK, QWEN3, QWEN25, QWQ, edit, rewrite_gguf, save_release

from quant.cli import runtime as cli_runtime
from quant.cli import to_gguf as cli_to_gguf
from quant.doctor.opening import open_to_run
from quant.doctor.sandbox import render
from quant.errors import BadInput, BadRecipe, UsageError
from quant.gguf_file import Value
from quant.recipe import Profile, find_profile, read_recipe, recipe_names, recipe_text
from quant.runtime import ENGINES
from quant.runtime.llama_cpp import FLAGS
from quant.runtime.ollama import PARAMETERS
from quant.runtime.ollama_templates import go_template
from quant.runtime.run import settle
from quant.source import open_source
from quant.to_gguf import Wishes, plan_gguf
from quant.write_gguf import write_gguf


def launch(model, engine, **options):
    return ENGINES[engine](settle(open_source(str(model)), str(model), **options))


@pytest.fixture(scope="module")
def gguf(tiny_qwq, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny qwq.gguf"
    job = plan_gguf(open_source(str(tiny_qwq)), Wishes("Q8_0", sampling="qwen-official"))
    write_gguf(job, path)
    return path


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases")
    found = {
        name: save_release(folder, name)
        for name in ("QwQ-32B", "Qwen2.5-7B-Instruct", "Qwen3-8B", "DeepSeek-R1-Distill-Qwen-32B")
    }
    far = shutil.copytree(found["Qwen3-8B"], folder / "far", symlinks=True, copy_function=os.link)
    (far / "config.json").unlink()
    text = (found["Qwen3-8B"] / "config.json").read_text()
    (far / "config.json").write_text(text.replace("40960", "262144"))
    return {**found, "far": far}


def options_of(command: str) -> dict[str, str]:
    """A command's options and their values."""
    words = shlex.split(command)
    pairs = zip(words, [*words[1:], ""], strict=True)
    return {word: value for word, value in pairs if re.match(r"--?[a-z]", word)}


# --- what is settled --------------------------------------------------------------------------


def test_profile_and_context(tiny_qwq, releases):
    run = settle(open_source(str(tiny_qwq)), "m")
    assert (run.profile_name, run.context, run.yarn) == ("qwen-official", 2048, None)
    run = settle(open_source(str(releases["QwQ-32B"])), "m")
    assert (run.context, run.yarn) == (32768, None)
    run = settle(open_source(str(releases["QwQ-32B"])), "m", context=131072)
    assert (run.yarn.factor, run.yarn.original_context) == (4.0, 32768)
    run = settle(open_source(str(releases["Qwen3-8B"])), "m", context=40000)
    assert run.yarn.factor == 2.0
    run = settle(open_source(str(releases["QwQ-32B"])), "m", profile="qwen3-thinking")
    assert run.profile == find_profile("qwen3-thinking")


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("QwQ-32B", {"context": 131073}, UsageError),
        ("DeepSeek-R1-Distill-Qwen-32B", {"context": 131073}, UsageError),
        ("QwQ-32B", {"context": 0}, UsageError),
        ("QwQ-32B", {"profile": "unsloht"}, BadRecipe),
        ("QwQ-32B", {"recipe": "qwq"}, BadRecipe),
    ],
)
def test_refused(name, options, error, releases):
    with pytest.raises(error):
        settle(open_source(str(releases[name])), "m", **options)


def test_a_family_s_yarn_is_not_for_a_model_that_reaches_farther(releases):
    """A tune of Qwen3-4B-Instruct-2507 under a shorter name."""
    run = settle(open_source(str(releases["far"])), "x", recipe="qwen3", context=200_000)
    assert run.yarn is None and run.context == 200_000


def test_settings_that_no_sampler_takes_are_told(gguf, tmp_path):
    def change(metadata):
        metadata["general.name"] = Value("str", "nobody's")
        metadata["general.sampling.temp"] = Value("f32", -1.0)

    path = rewrite_gguf(gguf, tmp_path / "x.gguf", change)
    with pytest.raises(BadInput, match=r"own setting temp is -1.0"):
        settle(open_source(str(path)), str(path))


def test_a_model_of_no_recipe_takes_its_own_settings(tiny_qwq, tmp_path):
    folder = shutil.copytree(tiny_qwq, tmp_path / "model")
    edit(folder, "generation_config.json", temperature=0.9, top_k=7)
    run = settle(open_source(str(folder)), "m")
    assert run.profile_name == "the model's own"
    assert run.profile.temp == 0.9 and run.profile.top_k == 7
    with pytest.raises(UsageError, match="more than the model's 2048"):
        settle(open_source(str(folder)), "m", context=4096)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("profile", ["qwen-official", "unsloth", "unsloth-with-penalties"])
def test_every_setting_is_given_or_said_to_be_lost(engine, profile, tiny_qwq):
    made = launch(tiny_qwq, engine, profile=profile)
    text = "\n".join([*made.commands, *made.files.values()])
    notes = " ".join(made.notes)
    for name, value in find_profile(profile).settings().items():
        assert str(value) in text or name in notes or (name == "sequence" and "order" in notes)


def test_names_that_cannot_be_typed_are_refused(tiny_qwq):
    with pytest.raises(BadInput):
        settle(open_source(str(tiny_qwq)), "m\nPARAMETER temperature 9")


# --- llama.cpp --------------------------------------------------------------------------------


def test_llama_cpp_is_told_everything(tiny_qwq):
    made = launch(tiny_qwq, "llama.cpp", profile="unsloth-with-penalties", context=8192)
    convert, serve = made.commands
    assert "--sampling unsloth-with-penalties" in convert
    given = options_of(serve)
    assert given["--samplers"] == "top_k;top_p;min_p;temperature;penalties;dry;typ_p;xtc"
    assert given["--repeat-penalty"] == "1.1" and given["--repeat-last-n"] == "64"
    assert given["--reasoning-budget"] == "6144" and given["-c"] == "8192"
    assert given["--rope-scaling"] == "yarn" and given["--rope-scale"] == "4"
    assert given["--yarn-orig-ctx"] == "2048" and "--jinja" in given
    assert "--sampler-seq" not in serve
    assert max(map(len, serve.splitlines())) <= 80


def test_a_gguf_needs_no_conversion_and_is_quoted(gguf):
    (serve,) = launch(gguf, "llama.cpp").commands
    assert options_of(serve)["-m"] == str(gguf) and "'" in serve


@pytest.mark.parametrize("name", ["-dash", "it's $(touch PWNED) `id`; #x", 'a"b', "a\\b"])
def test_any_name_that_can_be_typed_is_one_word(name, tiny_qwq, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).symlink_to(tiny_qwq)
    for engine in ENGINES:
        for command in launch(name, engine).commands:
            echoed = subprocess.run(
                ["bash", "-c", f"printf '%s\\0' {command}"],
                capture_output=True,
                text=True,
                check=True,
            )
            words = shlex.split(command.replace("\\\n", ""))
            assert echoed.stdout.split("\0")[:-1] == words
            assert not any(word == name for word in words if name.startswith("-"))
            if words[1] in ("to-gguf", "serve"):
                assert words[2].removeprefix("./") == name
    assert not (tmp_path / "PWNED").exists()


def test_a_recipe_and_its_profile_of_ones_own_are_named_to_the_converter(tiny_qwq, tmp_path):
    mine = tmp_path / "my recipe.toml"
    mine.write_text(recipe_text("qwq-32b").replace("[profiles.unsloth]", "[profiles.mine]"))
    convert, _ = launch(tiny_qwq, "llama.cpp", recipe=str(mine), profile="mine").commands
    words = shlex.split(convert)
    assert words[-4:] == ["--recipe", str(mine), "--sampling", "mine"]
    result = CliRunner().invoke(
        cli_to_gguf.command, [*words[2:], "--dry-run"], standalone_mode=False
    )
    assert result.exception is None, result.exception


def test_every_setting_of_a_profile_has_a_flag():
    settings = Profile.model_fields.keys() - {"about", "sequence"}
    assert settings == FLAGS.keys()


# --- vLLM and transformers --------------------------------------------------------------------


def test_vllm_gets_all_four_fields_of_yarn(releases):
    made = launch(releases["QwQ-32B"], "vllm", context=131072)
    given = options_of(made.commands[0])
    overrides = json.loads(given["--hf-overrides"])
    assert overrides["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    }
    assert overrides["max_position_embeddings"] == 131072 == int(given["--max-model-len"])
    defaults = json.loads(given["--override-generation-config"])
    assert defaults["temperature"] == 0.6 and defaults["min_p"] == 0.0
    assert given["--reasoning-parser"] == "deepseek_r1"
    assert "--hf-overrides" not in launch(releases["QwQ-32B"], "vllm").commands[0]


def test_a_quantized_folder_runs_but_is_not_converted(tiny_qwq, tmp_path):
    folder = shutil.copytree(tiny_qwq, tmp_path / "tiny-qwq-4bit")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit(folder, "config.json", quantization_config=settings)
    for engine in ("vllm", "transformers"):
        assert ENGINES[engine](settle(open_to_run(str(folder)), str(folder))).commands
    for engine in ("llama.cpp", "ollama"):
        with pytest.raises(BadInput, match="already quantized"):
            ENGINES[engine](settle(open_to_run(str(folder)), str(folder)))


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_what_runs_checkpoints_refuses_a_gguf(engine, gguf):
    with pytest.raises(UsageError, match="is for llama"):
        launch(gguf, engine)


def test_the_program_for_transformers_runs(tiny_qwq, tmp_path):
    made = launch(tiny_qwq, "transformers", profile="unsloth", context=4096)
    program = made.files["run.py"]
    assert "max_new_tokens=3072" in program and "min_p=0.01" in program
    path = tmp_path / "run.py"
    program = program.replace("max_new_tokens=3072", "max_new_tokens=400")
    path.write_text("import torch\ntorch.manual_seed(0)\n" + program)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.strip()


def test_its_yarn_is_what_transformers_keeps(tiny_qwq):
    from transformers import AutoConfig

    program = launch(tiny_qwq, "transformers", context=8192).files["run.py"]
    config = AutoConfig.from_pretrained(tiny_qwq)
    lines = [line for line in program.splitlines() if line.startswith("config.")]
    exec("\n".join(lines), {"config": config})
    assert config.rope_parameters["rope_theta"] == 1000000.0
    assert config.rope_parameters["factor"] == 4.0 and config.max_position_embeddings == 8192


# --- Ollama -----------------------------------------------------------------------------------


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Ollama's grammar: INSTRUCTION value; a value in quotes may go over several lines.

    # ref: https://docs.ollama.com/modelfile; ollama, parser/parser.go, ParseFile
    """
    words = ("from", "license", "template", "system", "adapter", "parameter", "message", "requires")
    commands, rest = [], text
    while rest := rest.lstrip(" \t\r\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        name, _, rest = rest.partition(" ")
        assert name.lower() in words, name
        if name.lower() == "parameter":
            name, _, rest = rest.partition(" ")
            assert re.fullmatch("[A-Za-z0-9_]+", name)
        value = ""
        for line in rest.splitlines(keepends=True):
            value += line
            if (whole := unquoted(value.strip())) is not None:
                break
        assert whole is not None, value
        commands.append((name, whole))
        rest = rest[len(value) :]
    assert any(name == "FROM" for name, _ in commands)
    return commands


def unquoted(text: str) -> str | None:
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            whole = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if whole else None
    return text


DOCUMENTED = {
    "num_ctx": int, "repeat_last_n": int, "repeat_penalty": float, "temperature": float,
    "seed": int, "stop": str, "num_predict": int, "draft_num_predict": int, "top_k": int,
    "top_p": float, "min_p": float,
}  # fmt: skip
"""PARAMETERs of Ollama's manual and their types."""


@pytest.mark.parametrize("profile", ["qwen-official", "unsloth", "unsloth-with-penalties"])
def test_the_modelfile_is_one(profile, tiny_qwq):
    made = launch(tiny_qwq, "ollama", profile=profile)
    commands = parse_modelfile(made.files["Modelfile"])
    assert commands[0] == ("FROM", "./tiny-qwq-Q4_K_M.gguf")
    assert dict(commands)["TEMPLATE"] == made.files["template"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", dict(commands)["REQUIRES"])
    given: dict = {}
    for name, value in commands:
        if name in DOCUMENTED:
            given.setdefault(name, []).append(DOCUMENTED[name](value))
        else:
            assert name in ("FROM", "TEMPLATE", "REQUIRES", "SYSTEM")
    params = json.loads(made.files["params"])
    assert given == {k: v if isinstance(v, list) else [v] for k, v in params.items()}
    assert params["stop"] == ["<|im_end|>", "<|im_start|>"]
    assert params["repeat_penalty"] == (1.1 if profile.endswith("penalties") else 1.0)
    settings = find_profile(profile).settings()
    assert params["min_p"] == settings["min_p"] and params["num_ctx"] == 2048
    if profile == "unsloth":
        assert "dry_multiplier" in made.files["Modelfile"]


def test_every_parameter_has_a_setting():
    settings = Profile.model_fields.keys()
    assert PARAMETERS.keys() <= settings
    assert set(PARAMETERS.values()) - DOCUMENTED.keys() == {"presence_penalty", "frequency_penalty"}


def test_a_default_system_message_is_kept(releases):
    commands = dict(
        parse_modelfile(launch(releases["Qwen2.5-7B-Instruct"], "ollama").files["Modelfile"])
    )
    assert commands["SYSTEM"].startswith("You are Qwen, created by Alibaba Cloud.")
    assert "SYSTEM" not in launch(releases["QwQ-32B"], "ollama").files["Modelfile"]


def test_a_default_system_message_may_hold_quotes(tiny_qwq, tmp_path):
    folder = shutil.copytree(tiny_qwq, tmp_path / "qwq")
    said = 'You are "QwQ".\nSay "hi"'
    template = f"{{{{- '<|im_start|>system\\n' }}}}{said}{{{{- '<|im_end|>\\n' }}}}" + QWQ
    edit(folder, "tokenizer_config.json", chat_template=template)
    commands = dict(parse_modelfile(launch(folder, "ollama").files["Modelfile"]))
    assert commands["SYSTEM"] == said


def test_deepseek_s_stops_and_form(releases):
    made = launch(releases["DeepSeek-R1-Distill-Qwen-32B"], "ollama")
    stops = json.loads(made.files["params"])["stop"]
    assert set(stops) == {"<｜Assistant｜>", "<｜User｜>", "<｜end▁of▁sentence｜>"}
    assert "<｜Assistant｜><think>" in made.files["template"]


HOSTILE = 'x"""\nPARAMETER temperature 9\nSYSTEM """'


def test_hostile_texts_add_no_instruction(tiny_qwq, tmp_path):
    """A template's own system message, a token and a name that try to end a quote early."""
    folder = shutil.copytree(tiny_qwq, tmp_path / "qwq")
    template = f"{{{{- '<|im_start|>system\\n' }}}}{HOSTILE}{{{{- '<|im_end|>\\n' }}}}" + QWQ
    edit(folder, "tokenizer_config.json", chat_template=template, pad_token=HOSTILE)
    edit(folder, "config.json", _name_or_path=HOSTILE)
    made = launch(folder, "ollama")
    commands = parse_modelfile(made.files["Modelfile"])
    assert ("temperature", "9") not in commands and "SYSTEM" not in dict(commands)


def test_an_unknown_form_gets_no_template(tiny_qwq, tmp_path):
    folder = shutil.copytree(tiny_qwq, tmp_path / "qwq")
    text = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    edit(folder, "tokenizer_config.json", chat_template=text)
    made = launch(folder, "ollama")
    assert "template" not in made.files and "TEMPLATE" not in made.files["Modelfile"]
    assert any("form of its own" in note for note in made.notes)


GO = """
package main

import ("encoding/json"; "os"; "text/template")

type call struct{ Function struct{ Name string; Arguments arguments } }
type arguments map[string]any
type message struct{ Role, Content, Thinking string; ToolCalls []call }
type tool struct{ Type string; Function function }
type function map[string]any

func (a arguments) String() string { b, _ := json.Marshal(a); return string(b) }
func (f function) String() string { b, _ := json.Marshal(f); return string(b) }

type request struct {
	Template, System string
	Messages []*message
	Tools []tool
	Think, IsThinkSet bool
}

func main() {
	var requests []request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil { panic(err) }
	for _, r := range requests {
		made, err := template.New("").Option("missingkey=zero").Parse(r.Template)
		if err != nil { panic(err) }
		values := map[string]any{"System": r.System, "Messages": r.Messages, "Tools": r.Tools,
			"Response": "", "Think": r.Think, "IsThinkSet": r.IsThinkSet}
		if err := made.Execute(os.Stdout, values); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""
"""Go's own text/template with the values that Ollama gives. # ref: template/template.go, Execute"""

TALKS = [
    [{"role": "user", "content": "Größe?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three {{ .System }}"},
    ],
]


def test_go_renders_what_jinja_renders(tmp_path):
    go = shutil.which("go")
    if go is None:
        pytest.skip("there is no Go on this machine")
    (tmp_path / "main.go").write_text(GO)
    (tmp_path / "go.mod").write_text("module render\n")
    cases = [
        (QWQ, go_template("<|im_start|>", True, True), {}),
        (QWEN3, go_template("<|im_start|>", True, False), {}),
        (QWEN3, go_template("<|im_start|>", True, False), {"enable_thinking": False}),
        (QWEN25, go_template("<|im_start|>", False, False), {}),
        (DEEPSEEK, go_template("<｜Assistant｜>", True, True), {"bos_token": ""}),
    ]
    requests, expected = [], []
    for jinja, template, more in cases:
        for talk in TALKS:
            if jinja == DEEPSEEK and talk[0]["role"] == "system":
                continue  # the card wants none, and this short template prints none
            variables = {"messages": talk, "add_generation_prompt": True, **more}
            expected.append(render(jinja, [variables])[0].text)
            system = talk[0]["content"] if talk[0]["role"] == "system" else ""
            if jinja == QWEN25 and not system:
                system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
            messages = [{k.title(): v for k, v in m.items()} for m in talk if m["role"] != "system"]
            requests.append(
                {"Template": template, "System": system, "Messages": messages,
                 "Think": False, "IsThinkSet": "enable_thinking" in more}
            )  # fmt: skip
    call = {"Function": {"Name": "add", "Arguments": {"a": 1}}}
    with_tools = [
        {"Role": "user", "Content": "sum"},
        {"Role": "assistant", "Content": "", "ToolCalls": [call]},
        {"Role": "tool", "Content": "2"},
    ]
    tools = [{"Type": "function", "Function": {"name": "add"}}]
    requests.append({"Template": cases[0][1], "Messages": with_tools, "Tools": tools})
    done = subprocess.run(
        [go, "run", "."], input=json.dumps(requests), capture_output=True, text=True, cwd=tmp_path,
        timeout=300, env={**os.environ, "GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local",
                          "GOCACHE": str(tmp_path / "cache"), "GOPATH": str(tmp_path / "path")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *found, tool_prompt, _ = done.stdout.split("\0")
    assert found == expected
    assert '{"type": "function", "function": {"name":"add"}}\n</tools>' in tool_prompt
    assert (
        '<|im_start|>assistant\n\n<tool_call>\n{"name": "add", "arguments": {"a":1}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    ) in tool_prompt


# --- the command ------------------------------------------------------------------------------


def runtime(*args):
    result = CliRunner().invoke(cli_runtime.command, list(map(str, args)), standalone_mode=False)
    assert result.exception is None, result.exception
    return result


def test_files_are_written_beside_the_model(gguf, tmp_path):
    runtime(gguf, "--engine", "ollama", "-o", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"Modelfile", "params", "template"}
    commands = parse_modelfile((tmp_path / "Modelfile").read_text())
    assert commands[0] == ("FROM", str(gguf))
    again = CliRunner().invoke(
        cli_runtime.command, [str(gguf), "--engine", "ollama", "-o", str(tmp_path)]
    )
    assert again.exception is not None


def test_files_in_another_folder_find_the_model(gguf, tmp_path, monkeypatch):
    monkeypatch.chdir(gguf.parent)
    out = os.path.relpath(tmp_path / "run it", gguf.parent)
    answer = json.loads(
        runtime(gguf.name, "--engine", "ollama", "-o", out, "--format", "json").stdout
    )
    create = shlex.split(answer["commands"][0])
    modelfile = gguf.parent / create[-1]
    from_ = dict(parse_modelfile(modelfile.read_text()))["FROM"]
    assert create[3] == "-f" and (modelfile.parent / from_).samefile(gguf)
    done = CliRunner().invoke(cli_runtime.command, [gguf.name, "--engine", "llama.cpp", "-o", out])
    assert isinstance(done.exception, UsageError)  # it has no files


def test_a_hub_model_s_weights_are_not_wanted_and_its_revision_is_told(tiny_qwq, tmp_path):
    """The cache as huggingface_hub lays it out, without weights; no network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--acme--QwQ-tune"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v2").write_text(commit)
    snapshot = cached / "snapshots" / commit
    shutil.copytree(tiny_qwq, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))

    def asked(engine, model, *more):
        answer = runtime(model, "--engine", engine, "--format", "json", "--offline",
                         "--cache-dir", tmp_path, *more).stdout  # fmt: skip
        return json.loads(answer)

    for words in (["acme/QwQ-tune@v2"], ["hf://acme/QwQ-tune", "--revision", "v2"]):
        given = options_of(asked("vllm", *words)["commands"][0])
        assert given["--revision"] == "v2"
        assert asked("vllm", *words)["commands"][0].startswith("vllm serve acme/QwQ-tune ")
        assert "to-gguf acme/QwQ-tune@v2 " in asked("llama.cpp", *words)["commands"][0]
        program = asked("transformers", *words)["files"]["run.py"]
        assert "MODEL = 'acme/QwQ-tune'" in program and program.count("MODEL, revision='v2'") == 3


def test_json_and_the_names_of_what_was_chosen(tiny_qwq):
    answer = json.loads(runtime(tiny_qwq, "--engine", "llama.cpp", "--format", "json").stdout)
    assert answer["recipe"] == "qwq-32b" and answer["profile"] == "qwen-official"
    assert len(answer["commands"]) == 2 and answer["files"] == {}
    output = runtime(tiny_qwq, "--engine", "vllm").output
    assert "recipe qwq-32b" in output and "profile qwen-official" in output


def test_the_command_names_every_engine():
    assert tuple(ENGINES) == cli_runtime.ENGINES


MODEL_OF = {
    "deepseek-r1-distill": "DeepSeek-R1-Distill-Qwen-32B",
    "qwen2.5": "Qwen2.5-7B-Instruct",
    "qwen3": "Qwen3-8B",
    "qwen3-instruct-2507": "Qwen3-8B",
    "qwen3-thinking-2507": "Qwen3-8B",
    "qwq-32b": "QwQ-32B",
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_s_profiles_reach_every_engine(name, releases):
    for profile in read_recipe(name).profiles:
        for engine in ENGINES:
            assert launch(releases[MODEL_OF[name]], engine, profile=profile).commands
