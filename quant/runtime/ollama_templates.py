"""Chat templates in Go's text/template, which is what Ollama renders; it does not read Jinja.

For a GGUF file Ollama looks for a built-in template whose Jinja text is nearly the same, else takes
none, and a changed template easily misses. So an explicit one is written. Each renders the same
text as the model's Jinja template for system, user, assistant and tool messages.

Ollama finds out how thoughts are marked from the text around `.Thinking` in the range over
`.Messages`; that is why it stands there, although old thoughts are left out.
# ref: ollama, template/template.go; thinking/template.go, InferTags
"""

_LAST = "{{- $last := eq (len (slice $.Messages $i)) 1 }}"

_TOOLS = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{{- range .Tools }}
{"type": "function", "function": {{ .Function }}}
{{- end }}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

_CHATML = (
    "{{- if or .System .Tools }}<|im_start|>system\n"
    "{{ .System }}"
    "{{- if .Tools }}" + _TOOLS + "{{ end }}<|im_end|>\n"
    "{{ end }}"
    "{{- range $i, $_ := .Messages }}" + _LAST + '{{- if eq .Role "user" }}<|im_start|>user\n'
    "{{ .Content }}<|im_end|>\n"
    '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
    "@THOUGHT@{{ .Content }}"
    "{{- range .ToolCalls }}\n"
    "<tool_call>\n"
    '{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}\n'
    "</tool_call>"
    "{{- end }}{{ if not $last }}<|im_end|>\n"
    "{{ end }}"
    '{{- else if eq .Role "tool" }}<|im_start|>user\n'
    "<tool_response>\n"
    "{{ .Content }}\n"
    "</tool_response><|im_end|>\n"
    "{{ end }}"
    '{{- if and $last (ne .Role "assistant") }}<|im_start|>assistant\n'
    "@OPENING@{{ end }}"
    "{{- end }}"
)

_DEEPSEEK = (
    "{{- if .System }}{{ .System }}{{ end }}"
    "{{- range $i, $_ := .Messages }}" + _LAST + '{{- if eq .Role "user" }}<｜User｜>{{ .Content }}'
    '{{- else if eq .Role "assistant" }}<｜Assistant｜>'
    "@THOUGHT@{{ .Content }}{{ if not $last }}<｜end▁of▁sentence｜>{{ end }}"
    "{{- end }}"
    '{{- if and $last (ne .Role "assistant") }}<｜Assistant｜>@OPENING@{{ end }}'
    "{{- end }}"
)

_THOUGHT = "{{ if and $last .Thinking }}<think>\n{{ .Thinking }}\n</think>\n\n{{ end }}"
_NO_THOUGHT = "{{ if and $.IsThinkSet (not $.Think) }}<think>\n\n</think>\n\n{{ end }}"
"""Qwen3's way to answer at once: an empty thought, if the user asked for none."""

FORMS = {"<|im_start|>": _CHATML, "<｜Assistant｜>": _DEEPSEEK}
"""What opens a turn in a prompt, and the template of that form."""


def go_template(opener: str, thinks: bool, opens_think: bool) -> str | None:
    """The template for prompts whose answers begin after `opener`; None for an unknown form."""
    form = next((form for mark, form in FORMS.items() if mark in opener), None)
    if form is None:
        return None
    opening = "<think>\n" if opens_think else _NO_THOUGHT if thinks else ""
    return form.replace("@THOUGHT@", _THOUGHT if thinks else "").replace("@OPENING@", opening)
