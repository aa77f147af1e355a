"""The list of modules that stay 16-bit (llm_int8_skip_modules), and how its readers take it.

A bitsandbytes checkpoint does not say by itself which weights are 4-bit: config.json lists those
that are not, and each loader matches that list in its own way. A list that is read wrongly fails
late (an assertion in the first forward pass) or never: vLLM's loader quantizes a 16-bit weight that
it does not find in the list, and says nothing. So the list is written in the one form that all
loaders take alike, and checked by emulating them.

    full dotted names     no bare "down_proj": it means every layer to some, to others nothing
    "lm_head", always     any list at all switches off transformers' own exception for it, and with
                          tied embeddings no weight of that name shows that the module exists
    the fused name too    vLLM looks for "model.layers.3.self_attn.qkv_proj", never for q_proj
    no whole layers       transformers 5 took "model.layers.1" for layers 10 to 19 as well

Routed experts stand as one entry a layer. vLLM's reader does not ask the list about them and
quantizes them while it loads; transformers 4 asks, transformers 5 holds no linears there.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from quant.display import printable
from quant.errors import QwqQuantError
from quant.groups import KINDS

HEAD = "lm_head"

_FUSED = {member: kind for kind in KINDS if len(kind.members) > 1 for member in kind.members}
_PLAIN = re.compile(r"[A-Za-z0-9_.-]+")
_EXPERTS = re.compile(r"(.+\.experts)\.")
_NEWER, _OLDER = "model.language_model.", "language_model.model."

N_SHOWN = 6  # names in a message


# --- writing ----------------------------------------------------------------------------------


def make_skip_list(linears: Collection[str], kept: Collection[str]) -> list[str]:
    """The entries for modules that stay 16-bit: lm_head first, then in the order of `linears`.

    linears: every module that a loader may hold as a linear layer (`groups.find_linears`);
    kept: those of them that are 16-bit on disk, experts and routers among them.
    Whether all loaders take it alike is for `check_skip_list` to find out.
    """
    kept, spell = set(kept), _speller(linears)
    shards = _fused_shards(linears)
    entries = dict.fromkeys([HEAD])
    for module in linears:
        if module in kept:
            for name in _names(module, shards, kept):
                entries.update(dict.fromkeys(spell(name)))
    return list(entries)


def _names(module: str, shards: dict[str, list[str]], kept: set[str]) -> list[str]:
    """Its own, and the fused one if all of that stays 16-bit; of an expert, what holds them all."""
    if experts := _EXPERTS.match(module):
        return [experts[1]]
    fused = _fused_name(module)
    return [module, fused] if kept.issuperset(shards[fused]) else [module]


def _fused_name(module: str) -> str:
    """vLLM's name of the matrix that holds `module`."""
    parent, _, leaf = module.rpartition(".")
    if leaf not in _FUSED or _EXPERTS.match(module):
        return module
    return f"{parent}.{_FUSED[leaf].fused}"


def _fused_shards(modules: Collection[str]) -> dict[str, list[str]]:
    """vLLM's linear layers and the modules in each; it does not hold routed experts as such."""
    shards: dict[str, list[str]] = {}
    for module in modules:
        if not _EXPERTS.match(module):
            shards.setdefault(_fused_name(module), []).append(module)
    return shards


def _speller(linears: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """From a module's name to every way in which a loader may spell it.

    Multimodal models have two: files and vLLM say "language_model.model.layers", transformers has
    said "model.language_model.layers" since 4.52, and "model.vision_tower" for "vision_tower".
    # ref: "llava" in transformers' conversion_mapping.py
    """
    if any(linear.startswith((_NEWER, _OLDER)) for linear in linears):
        return lambda name: (_older(name), _newer(name))
    return lambda name: (name,)


def _older(name: str) -> str:
    if name == HEAD:
        return "language_model." + HEAD
    if name.startswith(_NEWER):
        return _OLDER + name.removeprefix(_NEWER)
    return name.removeprefix("model.")


def _newer(name: str) -> str:
    name = _older(name)
    if name == "language_model." + HEAD:
        return HEAD
    if name.startswith(_OLDER):
        return _NEWER + name.removeprefix(_OLDER)
    return "model." + name


# --- the readers ------------------------------------------------------------------------------

Matcher = Callable[[str], bool]
"""Whether the module of this name stays 16-bit."""


def _transformers_4(entries: Sequence[str]) -> Matcher:
    """An entry and a dot somewhere in the name, or the whole of it, or its last part.

    # ref: _replace_with_bnb_linear, integrations/bitsandbytes.py of transformers 4
    """
    whole = frozenset(entries)
    inner = [entry + "." for entry in entries]

    def skips(module: str) -> bool:
        last = module.rpartition(".")[2]
        return module in whole or last in whole or any(entry in module for entry in inner)

    return skips


def _transformers_5_before(entries: Sequence[str]) -> Matcher:
    """A regular expression from the start to anywhere, or the end of the name.

    # ref: should_convert_module, quantizers/quantizers_utils.py of transformers 5 until PR 47990
    """
    return _by_pattern(entries, "{}")


def _transformers_5(entries: Sequence[str]) -> Matcher:
    """A regular expression from the start to a dot or the end, or the end of the name.

    # ref: should_convert_module, quantizers/quantizers_utils.py of transformers 5.23
    """
    return _by_pattern(entries, r"(?:{})(?:(?<=\.)|(?=\.|$))")


def _by_pattern(entries: Sequence[str], form: str) -> Matcher:
    patterns = [re.compile(form.format(entry)) for entry in entries]
    ends = tuple(entries)
    return lambda module: module.endswith(ends) or any(p.match(module) for p in patterns)


def _vllm(entries: Sequence[str]) -> Matcher:
    """A part of the name between dots, or its first parts. The name is vLLM's, a fused one.

    # ref: is_layer_skipped_bnb, quantization/utils.py of vllm-bnb-plugin 0.0.2; the same function
    # stood in vLLM itself, model_executor/layers/quantization/bitsandbytes.py
    """
    known = frozenset(entries)

    def skips(module: str) -> bool:
        parts = module.split(".")
        starts = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return not known.isdisjoint(parts) or not known.isdisjoint(starts)

    return skips


@dataclass(frozen=True)
class Reader:
    """A loader of bitsandbytes checkpoints, as far as the list concerns it."""

    name: str
    matcher: Callable[[Sequence[str]], Matcher]
    fuses: bool = False  # has qkv_proj and gate_up_proj, and asks for those


READERS = (
    Reader("transformers 4", _transformers_4),
    Reader("transformers 5 before the boundary fix", _transformers_5_before),
    Reader("transformers 5", _transformers_5),
    Reader("vLLM", _vllm, fuses=True),
)


def skipped_by(reader: Reader, entries: Sequence[str], modules: Collection[str]) -> set[str]:
    """Which of `modules` the reader takes for 16-bit. Raises re.error as transformers 5 does."""
    skips = reader.matcher(entries)
    if not reader.fuses:
        return set(filter(skips, modules))
    shards = _fused_shards(modules)
    return {module for fused, members in shards.items() if skips(fused) for module in members}


# --- checking ---------------------------------------------------------------------------------


def check_skip_list(
    entries: Sequence[str], linears: Collection[str], kept: Collection[str]
) -> None:
    """Raise QwqQuantError unless every reader keeps exactly `kept` of `linears` in 16 bits.

    Meant to be run twice: on the plan, and on what was found on the disk after writing.
    """
    linears = dict.fromkeys(linears)
    kept = set(kept)
    if not any(name.rpartition(".")[2] == HEAD for name in linears):  # tied to the embedding
        linears[HEAD] = None
        kept.add(HEAD)
    _check_characters(entries, linears)
    spell = _speller(linears)
    for names in zip(*map(spell, linears), strict=True):
        stays = {name for name, stored in zip(names, linears, strict=True) if stored in kept}
        for reader in READERS:
            _check_reader(reader, entries, names, stays)
    known = {name for module in _nameable(linears) for name in spell(module)}
    if unknown := [entry for entry in entries if entry not in known]:
        raise _error(
            f"The list of 16-bit modules names too much, or nothing: {_some(unknown)}.",
            "Only full names of linears, or of what directly holds them, mean the same to every "
            "loader.",
        )


def _error(what: str, why: str) -> QwqQuantError:
    return QwqQuantError(
        what, why, "No loader could be told what is 16-bit. Please report it with the model's name."
    )


def _check_characters(entries: Sequence[str], linears: Collection[str]) -> None:
    odd = [name for name in (*entries, *linears) if not _PLAIN.fullmatch(name)]
    if odd:
        raise _error(
            f"The list of 16-bit modules cannot name {_some(odd)}.",
            "transformers takes the entries for regular expressions, in which only letters, "
            "digits, dots, _ and - stand for themselves.",
        )


def _check_reader(
    reader: Reader, entries: Sequence[str], modules: Collection[str], kept: set[str]
) -> None:
    if reader.fuses:
        _check_fused(reader, modules, kept)
        modules = [module for shards in _fused_shards(modules).values() for module in shards]
        kept = kept.intersection(modules)
    found = skipped_by(reader, entries, modules)
    lost, added = kept - found, found - kept
    differences = {
        "16-bit on disk, but 4-bit to it": [module for module in modules if module in lost],
        "4-bit on disk, but 16-bit to it": [module for module in modules if module in added],
    }
    wrong = [f"{what}: {_some(names)}." for what, names in differences.items() if names]
    if wrong:
        raise _error(f"{reader.name} would misread the list of 16-bit modules.", "\n".join(wrong))


def _check_fused(reader: Reader, modules: Collection[str], kept: set[str]) -> None:
    for fused, shards in _fused_shards(modules).items():
        exact = [shard for shard in shards if shard in kept]
        if exact and len(exact) < len(shards):
            raise _error(
                f"{reader.name} could not load {printable(fused)}: it is half 4-bit.",
                f"{_some(exact)} of it would be 16-bit, the rest 4-bit, "
                f"but {reader.name} holds it as one matrix.",
            )


def _nameable(linears: Collection[str]) -> set[str]:
    """What an entry may name: lm_head, a module, its fused name, what directly holds it."""
    names = {HEAD}
    for linear in linears:
        names |= {linear, _fused_name(linear), linear.rpartition(".")[0]}
        if experts := _EXPERTS.match(linear):
            names.add(experts[1])
    return names - {""}


def _some(names: Collection[str]) -> str:
    names = [printable(name) for name in names]
    more = f" and {len(names) - N_SHOWN} more" if len(names) > N_SHOWN else ""
    return ", ".join(names[:N_SHOWN]) + more
