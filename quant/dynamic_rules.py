"""Which linears of a GPTQ checkpoint have other bits than the rest, as its readers are told.

quantization_config says once how many bits there are, and `dynamic` names the exceptions, in the
form that GPTQModel writes: regular expressions, tried in order, the first that matches wins.

    "+:^model\\.layers\\.3\\.mlp\\.down_proj$": {"bits": 8}    other bits
    "-:^model\\.layers\\.0\\.mlp\\.down_proj$": {}             not quantized: 16 bits

GPTQModel asks by the names of the checkpoint. vLLM asks by those of its fused matrices (qkv_proj,
gate_up_proj); newer releases then ask for each part, older ones and SGLang do not. A rule that is
not found is no error to any of them: integers of 8 bits would be read as twice as many of 4. So
every exception is written under both names, whole ones, and the list is checked by emulating its
readers. Whole names between ^ and $ are looked up by the newer readers, not searched.

transformers does not know `dynamic`: optimum gives all linears the same bits. Those of 16 bits it
can be told by modules_in_block_to_quantize, which vLLM takes too.

# ref: get_dynamic_override, vllm/model_executor/layers/quantization/utils/gptq_utils.py, as of
# vLLM 0.8 and of 0.33; _resolve_dynamic_override, gptqmodel/quantization/config.py of 7.6.0;
# convert_model, optimum/gptq/quantizer.py of 2.3.0
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from quant.display import printable
from quant.errors import QwqQuantError
from quant.groups import Group
from quant.tensors import TensorInfo

N_SHOWN = 6  # names in a message
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")


# --- writing ----------------------------------------------------------------------------------


def exceptions(groups: Sequence[Group], bits: Mapping[str, int], base: int) -> dict[str, object]:
    """What quantization_config says of the groups whose bits are not `base`; nothing if all are.

    bits: by group, 16 for what is not quantized.
    Whether all readers take it alike is for `check_rules` to find out.
    """
    changed = {group: bits[group.name] for group in groups if bits[group.name] != base}
    if not changed:
        return {}
    said: dict[str, object] = {
        "dynamic": {
            _rule(name, n): {} if n == 16 else {"bits": n}
            for group, n in changed.items()
            for name in _names(group)
        }
    }
    if set(changed.values()) == {16}:
        integers = [module for g in groups if g not in changed for module in g.modules]
        said["modules_in_block_to_quantize"] = [integers]
    return said


def _rule(name: str, bits: int) -> str:
    sign = "-" if bits == 16 else "+"
    return f"{sign}:^{name}$".replace(".", r"\.")


def _names(group: Group) -> list[str]:
    """The checkpoint's names of its linears, and vLLM's of the whole."""
    return list(dict.fromkeys([*group.modules, group.name]))


# --- the readers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """A quantization_config, as far as bits are concerned."""

    bits: int
    rules: tuple[tuple[re.Pattern[str], int], ...]
    listed: tuple[str, ...] | None  # what alone is quantized

    @classmethod
    def of(cls, config: Mapping[str, object]) -> "Said":
        """Raises re.error as the readers do."""
        base, rules = config["bits"], []
        for pattern, changed in config.get("dynamic", {}).items():
            expression = pattern[2:] if pattern.startswith(("-:", "+:")) else pattern
            bits = 16 if pattern.startswith("-:") else changed.get("bits", base)
            rules.append((re.compile(expression), bits))
        listed = config.get("modules_in_block_to_quantize")
        if listed is not None:
            listed = tuple(name for names in listed for name in names)
        return cls(base, tuple(rules), listed)

    def ruled(self, name: str) -> int | None:
        """The bits that the first matching rule gives; None if there is no such rule."""
        return next((bits for rule, bits in self.rules if rule.match(name)), None)


def _by_own_names(said: Said, group: Group) -> list[int]:
    ruled = [said.ruled(module) for module in group.modules]
    return [said.bits if bits is None else bits for bits in ruled]


def _by_fused_names(said: Said, group: Group) -> list[int]:
    bits = said.ruled(group.name)
    return [said.bits if bits is None else bits] * len(group.modules)


def _by_fused_names_first(said: Said, group: Group) -> list[int]:
    if said.ruled(group.name) is not None:
        return _by_fused_names(said, group)
    return _by_own_names(said, group)


def _by_list(said: Said, group: Group) -> list[int]:
    """A name in the list may be a part of the module's, at its end."""
    if said.listed is None:
        return [said.bits] * len(group.modules)
    return [said.bits if module.endswith(said.listed) else 16 for module in group.modules]


@dataclass(frozen=True)
class Reader:
    """A loader of GPTQ checkpoints, as far as bits are concerned."""

    name: str
    bits: Callable[[Said, Group], list[int]]  # of each of the group's modules
    mixes: bool = True  # knows integers of more than one size
    fuses: bool = False  # holds a group as one matrix


READERS = (
    Reader("GPTQModel", _by_own_names),
    Reader("vLLM", _by_fused_names_first, fuses=True),
    Reader("vLLM before it asked for parts", _by_fused_names, fuses=True),
    Reader("transformers", _by_list, mixes=False),
)


# --- checking ---------------------------------------------------------------------------------


def check_rules(
    config: Mapping[str, object], groups: Sequence[Group], stored: Mapping[str, int]
) -> None:
    """Raise QwqQuantError unless every reader that can gives each module the bits it is stored in.

    config: a quantization_config. stored: bits by module, 16 for what is not quantized.
    Meant to be run twice: on the plan, and on what was found on the disk after writing.
    """
    names = [name for group in groups for name in _names(group)]
    if odd := [name for name in names if not _PLAIN.fullmatch(name)]:
        raise _error(
            f"No rule can name {_some(odd)}.",
            "In a regular expression only letters, digits, _ and - stand for themselves.",
        )
    said = Said.of(config)
    mixed = len({bits for bits in stored.values() if bits < 16}) > 1
    for reader in READERS:
        if reader.mixes or not mixed:
            _check_reader(reader, said, groups, stored)


def _check_reader(
    reader: Reader, said: Said, groups: Sequence[Group], stored: Mapping[str, int]
) -> None:
    for group in groups:
        found = reader.bits(said, group)
        wrong = [
            f"{printable(module)} has {stored[module]} bits on disk, {bits} to it"
            for module, bits in zip(group.modules, found, strict=True)
            if bits != stored[module]
        ]
        if wrong:
            raise _error(f"{reader.name} would misread the bits of some layers.", _some(wrong))
        if reader.fuses and len(set(found)) > 1:
            raise _error(
                f"{reader.name} could not load {printable(group.name)}: its parts differ in bits.",
                f"{reader.name} holds it as one matrix.",
            )


def stored_bits(tensors: Mapping[str, TensorInfo], groups: Sequence[Group]) -> dict[str, int]:
    """The bits of each module as the shapes on the disk have them: qweight int32 (columns * bits /
    32, rows), g_idx (columns,)."""
    found = {}
    for module in (module for group in groups for module in group.modules):
        packed = tensors.get(f"{module}.qweight")
        found[module] = 16
        if packed:
            found[module] = 32 * packed.shape[0] // tensors[f"{module}.g_idx"].shape[0]
    return found


def _error(what: str, why: str) -> QwqQuantError:
    return QwqQuantError(
        what, why, "No loader could be told the bits. Please report it with the model's name."
    )


def _some(texts: Collection[str]) -> str:
    texts = [printable(text, 200) for text in texts]
    more = f" and {len(texts) - N_SHOWN} more" if len(texts) > N_SHOWN else ""
    return ", ".join(texts[:N_SHOWN]) + more
