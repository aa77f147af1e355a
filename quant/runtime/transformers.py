"""transformers: a short program to run or to copy from."""

from quant.display import printable
from quant.errors import UsageError
from quant.runtime.llama_cpp import as_word
from quant.runtime.run import Launch, Run
from quant.runtime.vllm import GENERATION_NAMES, yarn_overrides

PROGRAM = '''\
"""{slug} in transformers, with the sampling settings of {profile}. Made by qwq-quant runtime."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

MODEL = {model!r}

config = AutoConfig.from_pretrained(MODEL{revision})
{overrides}tokenizer = AutoTokenizer.from_pretrained(MODEL{revision})
model = AutoModelForCausalLM.from_pretrained(
    MODEL{revision}, config=config, dtype="auto", device_map="auto"
)

messages = [{{"role": "user", "content": "How many r's are in the word \\"strawberry\\"?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
output = model.generate(
    **inputs,
    max_new_tokens={max_new_tokens},
    do_sample={do_sample},
{settings})
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer.rpartition("</think>")[2].strip())  # what comes before it is the thought
'''


def launch(run: Run) -> Launch:
    """run.py, and the command that runs it."""
    if run.is_gguf:
        raise UsageError(
            "transformers runs checkpoints; a .gguf file is for llama.cpp and Ollama.",
            "",
            "Name the folder or the repository that the file was made from.",
        )
    settings = run.profile.settings()
    given = {t: settings[o] for o, t in GENERATION_NAMES.items() if o in settings}
    do_sample = given.get("temperature", 1.0) > 0
    if not do_sample:
        given = {n: value for n, value in given.items() if n == "repetition_penalty"}
    overrides = ""
    if run.yarn is not None:
        for name, value in yarn_overrides(run).items():
            overrides += f"config.{name} = {value!r}\n"
    program = PROGRAM.format(
        slug=run.slug,
        profile=printable(run.profile_name).replace("\\", "").replace('"', ""),
        model=run.model,
        revision="" if run.revision is None else f", revision={run.revision!r}",
        overrides=overrides,
        max_new_tokens=run.reasoning_budget,
        do_sample=do_sample,
        settings="".join(f"    {name}={value!r},\n" for name, value in given.items()),
    )
    notes = []
    lost = sorted(settings.keys() - GENERATION_NAMES.keys())
    if lost:
        notes.append(
            f"generate() has nothing for: {', '.join(lost)}. Its order is fixed: the repetition "
            "penalty, temperature, top-k, top-p, min-p."
        )
    path = as_word(str(run.folder / "run.py"))
    return Launch((f"python {path}",), {"run.py": program}, tuple(notes))
