"""adapter_config.json of a PEFT adapter: each module's rank and scaling, and which modules it has.

PEFT keeps some forty settings there, and a LoRA becomes another thing by many of them (DoRA, aLoRA,
PiSSA's changed base weights). What is known not to change a merge is taken; any other setting that
is set is refused by its name, never passed over.

# ref: peft 0.21, tuners/lora/config.py (LoraConfig), tuners/lora/model.py (_create_and_replace),
# tuners/tuners_utils.py (check_target_module_exists), utils/other.py (get_pattern_key)
"""

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from pathlib import Path

import regex  # unlike re, it can be told when to give up: the patterns are a stranger's

from quant.display import printable
from quant.errors import BadInput
from quant.strict_files import parse_json

NAME = "adapter_config.json"
MAX_NBYTES = 1_000_000
"""A rank of its own for each of 500 matrices takes 30,000."""

MAX_RANK = 65536
PATTERN_SECONDS = 1
"""For one pattern on one module's name; an honest one takes microseconds."""

ALL_LINEAR = "all-linear"
HEADS = ("embed_tokens", "lm_head")
"""Matrices that are no "linear layers" to PEFT: the embedding and the output."""

USED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "init_lora_weights", "base_model_name_or_path",
}  # fmt: skip
HARMLESS = {
    "auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Of training, or of no effect on a merge. Trained biases are tensors of the adapter's own."""

VARIANTS = {
    "use_dora": "DoRA, which also scales each row to a learned length",
    "alora_invocation_tokens": "an activated LoRA, which is on for some tokens only",
    "trainable_token_indices": "trained single tokens",
    "target_parameters": "a LoRA on parameters that are no linear layers (fused experts)",
    "lora_bias": "a LoRA with biases of its own",
    "layer_replication": "a LoRA on a model with repeated layers",
    "use_qalora": "a QA-LoRA",
    "fan_in_fan_out": "a LoRA on transposed weights",
}

PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Of init_lora_weights: ways to begin that leave the model's weights alone. PiSSA, OLoRA, CorDA,
LoftQ and LoRA-GA move a part of them into the adapter, and PEFT does so again when it loads one."""

MERGE_WITH_PEFT = "Merge it with PEFT (merge_and_unload, save_pretrained), and give that folder."


@dataclass(frozen=True)
class LoraConfig:
    """What adapter_config.json says; module names are PEFT's: model.layers.0.self_attn.q_proj."""

    path: Path
    r: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    targets: str | list[str] | None  # a regular expression, names that modules end in, or unsaid
    excluded: str | list[str] | None
    saved: list[str]  # patterns of modules that were trained whole
    layers: list[int]  # all of them if empty
    layers_patterns: list[str]
    base_model: str  # as its maker's machine named it

    def rank(self, module: str) -> int:
        return self.rank_pattern.get(self._key(self.rank_pattern, module), self.r)

    def scaling(self, module: str) -> float:
        """alpha / r; rank-stabilized: alpha / sqrt(r)."""
        alpha = self.alpha_pattern.get(self._key(self.alpha_pattern, module), self.alpha)
        r = self.rank(module)
        return alpha / (sqrt(r) if self.rank_stabilized else r)

    def is_target(self, module: str) -> bool:
        """Whether PEFT would put a LoRA on this matrix. Raises BadInput for a bad pattern."""
        if self.excluded and self._is_named(self.excluded, module):
            return False
        if any(self._match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if self.targets is None:  # PEFT has a list for each kind of model then
            return True
        if isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR:
            return module.rpartition(".")[2] not in HEADS
        if not self._is_named(self.targets, module):
            return False
        listed = isinstance(self.targets, list) and module not in self.targets
        return not (listed and self.layers) or self._layer(module) in self.layers

    def _is_named(self, names: str | list[str], module: str) -> bool:
        """By a pattern for the whole name, or by names that it ends in."""
        if isinstance(names, str):
            return self._match(rf"(?:{names})\Z", module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _layer(self, module: str) -> int | None:
        """The layer's number: the first one in the name, or the one behind a stated pattern."""
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_patterns]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            if found := self._match(pattern, module):
                return int(found[found.re.groups])
        return None

    def _key(self, patterns: dict, module: str) -> str:
        """The first pattern that the name ends in; the name itself if there is none."""
        return next((p for p in patterns if self._match(rf"(.*\.)?({p})$", module)), module)

    def _match(self, pattern: str, module: str):
        """From the beginning of the name. Raises BadInput."""
        try:
            return _compiled(pattern).match(module, timeout=PATTERN_SECONDS)
        except TimeoutError:
            reason = f"After {PATTERN_SECONDS} s it was still being compared with one name"
        except regex.error as error:
            reason = f"It is no regular expression: {error}"
        raise BadInput(
            f"{printable(self.path)} has a pattern that cannot be used: {printable(pattern)}.",
            f"{printable(reason)}.",
            MERGE_WITH_PEFT,
        )


@lru_cache(maxsize=10_000)
def _compiled(pattern: str):
    return regex.compile(pattern)


def parse_lora_config(raw: bytes, path: Path) -> LoraConfig:
    """The settings, checked. Raises BadInput for other adapters than LoRA, and for its variants."""
    content = parse_json(raw, path)
    _refuse_variants(content, path)
    check = _Checked(content, path)
    ranks, alphas = (check.a(name, dict) or {} for name in ("rank_pattern", "alpha_pattern"))
    return LoraConfig(
        path,
        check.rank("r", content.get("r", 8)),
        check.number("lora_alpha", content.get("lora_alpha", 8)),
        check.a("use_rslora", bool) or False,
        {pattern: check.rank("rank_pattern", r) for pattern, r in ranks.items()},
        {pattern: check.number("alpha_pattern", alpha) for pattern, alpha in alphas.items()},
        check.one_or_list("target_modules", str),
        check.one_or_list("exclude_modules", str),
        _listed(check.one_or_list("modules_to_save", str)),
        _listed(check.one_or_list("layers_to_transform", int)),
        _listed(check.one_or_list("layers_pattern", str)),
        check.a("base_model_name_or_path", str) or "a model that it does not name",
    )


def _listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _refuse_variants(content: dict, path: Path) -> None:
    """Raise BadInput for what is no plain LoRA."""
    kind = content.get("peft_type")
    if kind != "LORA":
        said = printable(kind, 40) if kind else "no kind of adapter"
        raise BadInput(
            f"{printable(path)} names {said}; only LORA can be merged on the way.",
            "Other adapters change a model's weights in other ways, or not its weights at all.",
            MERGE_WITH_PEFT,
        )
    start = content.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise BadInput(
            f"{printable(path)}: the training began with init_lora_weights {printable(start, 40)}.",
            "That moves a part of the model's own weights into the adapter, so it does not fit the "
            "model as it was published.",
            MERGE_WITH_PEFT,
        )
    for name, value in content.items():
        if value and name not in USED | HARMLESS:
            what = VARIANTS.get(name, "a setting whose effect on a merge is not known here")
            raise BadInput(
                f"{printable(path)}: {printable(name, 60)} is set: {what}.",
                "Only a plain LoRA, w + scaling * B @ A, can be merged on the way.",
                MERGE_WITH_PEFT,
            )


@dataclass(frozen=True)
class _Checked:
    """Settings by name, of the type that they must have. All methods raise BadInput."""

    content: dict
    path: Path

    def a(self, name: str, kind: type):
        """Of that type, or None."""
        value = self.content.get(name)
        return value if value is None or type(value) is kind else self.fail(name, value)

    def rank(self, name: str, value: object) -> int:
        return value if type(value) is int and 0 < value <= MAX_RANK else self.fail(name, value)

    def number(self, name: str, value: object) -> float:
        is_number = type(value) in (int, float) and abs(value) < 1e30  # and so no NaN
        return value if is_number else self.fail(name, value)

    def one_or_list(self, name: str, kind: type):
        """One value of that type, or a list of some, or None."""
        value = self.content.get(name)
        each = value if isinstance(value, list) else [value]
        if value is None or all(type(item) is kind for item in each):
            return value
        return self.fail(name, value)

    def fail(self, name: str, value: object):
        raise BadInput(
            f"{printable(self.path)}: {name} is {printable(value, 60)}.",
            "PEFT writes no such value.",
            "Fetch the file again, or ask the adapter's maker.",
        )
