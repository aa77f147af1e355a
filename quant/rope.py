"""Rotary settings: from config.json, and from `--rope-scaling` and its companions, to GGUF keys.

Rotary scaling has one trap worth the space: YaRN multiplies cos and sin by m = 1 + 0.1 ln(factor),
and llama.cpp does so by itself. `rope.scaling.attn_factor` is a factor on top of m, so a file that
says attn_factor = m, as circulated recipes do, has m twice.
"""

import math

import numpy as np

from quant.display import printable
from quant.errors import BadInput, UsageError
from quant.gguf_file import Metadata, Value
from quant.overrides import check_override, number


def yarn_magnitude(factor: float) -> float:
    """YaRN's own factor on cos and sin: 1 + 0.1 ln(factor).

    # ref: YaRN, https://arxiv.org/abs/2309.00071, section 3.4; ggml-cpu/ops.cpp, rope_yarn
    """
    return 1 + 0.1 * math.log(factor)


def rope_overrides(
    arch: str,
    scaling: str | None,
    factor: float | None,
    original_context: int | None,
    theta: float | None,
    context_length: int | None,
    current: Metadata,
    force: bool = False,
) -> Metadata:
    """A copy of `current` with `--rope-scaling`, `--rope-theta` and `--context-length` applied.

    A new scaling replaces all of the old one. "yarn" raises context_length to original_context *
    factor unless it is given, and writes no attn_factor: llama.cpp multiplies by YaRN's magnitude
    itself. "none" removes scaling (Llama 3's way, a tensor rope_freqs, is no metadata and stays).

    Raises UsageError for options that do not go together, BadRecipe for values out of range.
    """
    metadata, prefix = dict(current), f"{arch}.rope."
    new: Metadata = {}
    if scaling is not None:
        for key in current:
            if key.startswith(f"{prefix}scaling.") or key == f"{prefix}scale_linear":
                del metadata[key]
        new.update(_scaling(arch, scaling, factor, original_context))
        if scaling == "yarn" and context_length is None:
            had = number(current, f"{arch}.context_length") or 0
            context_length = max(had, round(original_context * factor))
    elif factor is not None or original_context is not None:
        raise UsageError(
            "--rope-factor and --rope-original-context need --rope-scaling.",
            "A factor can mean YaRN or linear interpolation.",
            "Add --rope-scaling yarn or --rope-scaling linear.",
        )
    if theta is not None:
        new[f"{prefix}freq_base"] = Value("f32", float(theta))
    if context_length is not None:
        new[f"{arch}.context_length"] = Value("u32", context_length)
    for key, value in new.items():
        check_override(key, value, f"{value.data}", arch, metadata, force=force)
    return metadata | new


def _scaling(
    arch: str, scaling: str, factor: float | None, original_context: int | None
) -> Metadata:
    prefix = f"{arch}.rope.scaling."
    if scaling not in ("none", "linear", "yarn"):
        raise UsageError(
            f'--rope-scaling "{printable(scaling, 40)}" is unknown.',
            "It is one of none, linear and yarn.",
        )
    if scaling == "none":
        if factor is not None or original_context is not None:
            raise UsageError("--rope-scaling none takes no factor and no original context.")
        return {}
    if factor is None or not math.isfinite(factor):
        raise UsageError(
            f"--rope-scaling {scaling} needs --rope-factor, a finite number of at least 1.",
            "It says how many times longer the context becomes.",
        )
    if scaling == "linear":
        if original_context is not None:
            raise UsageError(
                "--rope-original-context is read for YaRN only.",
                "Linear scaling stretches every position alike.",
                "Leave it out, or choose --rope-scaling yarn.",
            )
        return {
            prefix + "type": Value("str", "linear"),
            prefix + "factor": Value("f32", float(factor)),
        }
    if original_context is None:
        raise UsageError(
            "--rope-scaling yarn needs --rope-original-context.",
            "It is the context length the model was trained at (32768 for QwQ-32B), which is not "
            "always what config.json gives.",
        )
    return {
        prefix + "type": Value("str", "yarn"),
        prefix + "factor": Value("f32", float(factor)),
        prefix + "original_context_length": Value("u32", original_context),
    }


# --- from config.json ---------------------------------------------------------------------------

DEFAULT_THETA = {"mixtral": 1e6}
"""What transformers takes where config.json has no rope_theta, if it is not 10000, by model_type.

# ref: transformers, RotaryEmbeddingConfigMixin.default_theta and its overrides
"""

UNSUPPORTED_SCALING = "It is one of default, linear, yarn, llama3 and dynamic."


def rope_metadata(config: dict, arch: str) -> tuple[Metadata, list[str]]:
    """The `{arch}.rope.*` keys for config.json's rotary settings, and warnings.

    Reads transformers 4's `rope_theta` with `rope_scaling` and transformers 5's `rope_parameters`.
    With YaRN, context_length is among the keys when max_position_embeddings is less than what the
    scaling reaches. `llama3` needs no keys but a tensor: llama3_rope_factors().

    Raises BadInput for scaling llama.cpp cannot do with this architecture, and for contradictions.
    """
    parameters, warnings = _rope_parameters(config)
    theta = _positive(parameters, "rope_theta")
    metadata = {f"{arch}.rope.freq_base": Value("f32", theta)}
    kind = parameters["rope_type"]
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (
        None,
        1,
    ):
        raise _bad_rope(
            "partial_rotary_factor is not 1", f"llama.cpp's {arch} rotates whole heads."
        )
    if kind == "default" or (kind == "llama3" and arch == "llama"):
        return metadata, warnings
    if kind == "dynamic":
        length = printable(config.get("max_position_embeddings"), 40)
        warnings.append(
            f"rope_type dynamic is left out: llama.cpp has none. Up to {length} tokens there is no "
            "difference; do not go beyond."
        )
        return metadata, warnings
    if kind == "linear":
        factor = _positive(parameters, "factor", at_least=1)
        metadata[f"{arch}.rope.scaling.type"] = Value("str", "linear")
        metadata[f"{arch}.rope.scaling.factor"] = Value("f32", factor)
        return metadata, warnings
    if kind == "yarn":
        yarn, more = _yarn_metadata(config, parameters)
        metadata.update({f"{arch}.{name}": value for name, value in yarn.items()})
        return metadata, warnings + more
    if kind == "llama3":
        raise _bad_rope("rope_type is llama3", f"llama.cpp's {arch} has no such factors.")
    raise _bad_rope(f"rope_type is {printable(kind, 40)}", UNSUPPORTED_SCALING)


def without_scaling(config: dict) -> dict:
    """config.json without its rotary scaling: what is left when it is set by hand."""
    config = {key: value for key, value in config.items() if key != "rope_scaling"}
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        theta = {k: v for k, v in parameters.items() if k == "rope_theta"}
        config["rope_parameters"] = {"rope_type": "default", **theta}
    return config


def _yarn_metadata(config: dict, parameters: dict) -> tuple[Metadata, list[str]]:
    """YaRN's keys without their architecture, and warnings for what they cannot say.

    HF multiplies cos and sin by `attention_factor`, llama.cpp by attn_factor * m with
    m = 1 + 0.1 ln(factor); so attn_factor = attention_factor / m. HF's default attention_factor is
    m itself: then attn_factor is 1, which is llama.cpp's default, and is not written.
    # ref: transformers, _compute_yarn_parameters; llama-context.cpp, the constructor
    """
    warnings = []
    factor = _positive(parameters, "factor", at_least=1)
    longest = config.get("max_position_embeddings")
    original = config.get(
        "original_max_position_embeddings", parameters.get("original_max_position_embeddings")
    )
    if original is None:
        original = longest
        warnings.append(
            "YaRN has no original_max_position_embeddings; max_position_embeddings "
            f"({printable(longest, 40)}) is taken for it, as transformers does."
        )
    for name, value in (("max_position", longest), ("original_max_position", original)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise _bad_rope(f"{name}_embeddings is {printable(value, 40)}", "It must be a count.")
    metadata = {
        "rope.scaling.type": Value("str", "yarn"),
        "rope.scaling.factor": Value("f32", factor),
        "rope.scaling.original_context_length": Value("u32", original),
    }
    magnitude = yarn_magnitude(factor)
    attention_factor = _attention_factor(parameters, factor)
    if not math.isclose(attention_factor, magnitude, rel_tol=1e-6):
        metadata["rope.scaling.attn_factor"] = Value("f32", attention_factor / magnitude)
    for name, fixed in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
        value = parameters.get(name)
        if value is not None and value != fixed:
            raise BadInput(
                f"YaRN's {name} is {printable(value, 40)} in config.json; llama.cpp takes {fixed}.",
                "Its graph of this architecture reads no key for it, so positions would be wrong.",
                "To go on without it, set the scaling by hand: --rope-scaling yarn "
                f"--rope-factor {factor:g} --rope-original-context {original}",
            )
    reach = round(original * factor)
    if reach >= 2**31:
        raise _bad_rope(
            f"YaRN stretches {original} tokens by {factor:g}", "No context can be that long."
        )
    if reach > longest:
        metadata["context_length"] = Value("u32", reach)
        warnings.append(
            f"context_length is {reach}, YaRN's {original} x {factor:g}; config.json's "
            f"max_position_embeddings is {longest}."
        )
    return metadata, warnings


def _attention_factor(parameters: dict, factor: float) -> float:
    """What HF multiplies cos and sin by. # ref: transformers, _compute_yarn_parameters"""
    if "attention_factor" in parameters:
        return _positive(parameters, "attention_factor")
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        log = 0.1 * math.log(factor)
        mscale, all_dim = _positive(parameters, "mscale"), _positive(parameters, "mscale_all_dim")
        return (mscale * log + 1) / (all_dim * log + 1)
    return yarn_magnitude(factor)


def llama3_rope_factors(config: dict) -> np.ndarray | None:
    """Llama 3.1's divisor of each rotary frequency, float32 (head_dim / 2,); None if not llama3.

    With wavelength l = 2 pi / frequency, the trained context L, and b, a = low_freq_factor,
    high_freq_factor: 1 where l < L / a, `factor` where l > L / b, and between them
    1 / ((1 - s) / factor + s) with s = (L / l - b) / (a - b). It is the tensor rope_freqs.weight.
    # ref: transformers, _compute_llama3_parameters; llama.cpp, conversion/llama.py
    """
    parameters, _ = _rope_parameters(config)
    if parameters["rope_type"] != "llama3":
        return None
    theta, factor = _positive(parameters, "rope_theta"), _positive(parameters, "factor")
    low, high = _positive(parameters, "low_freq_factor"), _positive(parameters, "high_freq_factor")
    if high <= low:
        raise _bad_rope("high_freq_factor is not above low_freq_factor", "It must be.")
    parameters.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    context = _positive(parameters, "original_max_position_embeddings")
    head_dim = _head_dim(config)
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)  # (head_dim / 2,)
    turns = context * frequency / (2 * np.pi)  # rotations within the trained context: L / l
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def _head_dim(config: dict) -> int:
    if config.get("head_dim") is not None:
        head_dim = _positive(config, "head_dim", at_least=2)
    else:
        head_dim = _positive(config, "hidden_size") // _positive(config, "num_attention_heads")
    if head_dim % 2 or not 2 <= head_dim <= 65536:
        raise _bad_rope(f"the size of a head is {head_dim:g}", "An even size is needed.")
    return int(head_dim)


def _rope_parameters(config: dict) -> tuple[dict, list[str]]:
    """One dict with rope_type and rope_theta, from either place; and warnings."""
    legacy = _one_dict(config.get("rope_scaling"), "rope_scaling")
    new = _one_dict(config.get("rope_parameters"), "rope_parameters")
    thetas = [p["rope_theta"] for p in (new, legacy, config) if p.get("rope_theta") is not None]
    differing = [theta for theta in thetas if theta != thetas[0]]
    if differing:
        raise _contradiction("rope_theta", thetas[0], differing[0])
    for name in sorted((legacy.keys() | new.keys()) - {"rope_theta"}) if legacy and new else ():
        if legacy.get(name) != new.get(name):
            raise _contradiction(name, new.get(name), legacy.get(name))
    parameters = {"rope_type": "default", **legacy, **new}
    if thetas:
        return {**parameters, "rope_theta": thetas[0]}, []
    model_type = config.get("model_type")
    theta = DEFAULT_THETA.get(str(model_type), 10000.0)
    return {**parameters, "rope_theta": theta}, [
        f"config.json has no rope_theta; {theta:g} is taken, which is transformers' default for "
        f"{printable(model_type, 40)}."
    ]


def _one_dict(parameters: object, place: str) -> dict:
    """Rotary parameters with `rope_type` spelled so and nulls dropped; one dict for all layers."""
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise _bad_rope(f"{place} is {printable(parameters, 40)}", "It must be an object or null.")
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    if nested:
        if any(p != nested[0] for p in nested):
            raise _bad_rope(
                f"{place} differs from layer to layer",
                "The architectures that can be converted have one setting for all.",
            )
        parameters = nested[0]
    parameters = {name: value for name, value in parameters.items() if value is not None}
    legacy = parameters.pop("type", "default")
    if parameters:
        parameters.setdefault("rope_type", legacy)
    elif legacy != "default":
        parameters = {"rope_type": legacy}
    return parameters


def _positive(parameters: dict, name: str, at_least: float = 0) -> float:
    """A number that float32 holds, above 0 and not below `at_least`. Raises BadInput."""
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        what = f"{name} is missing" if value is None else f"{name} is {printable(value, 40)}"
        raise _bad_rope(what, "A number is needed.")
    if not 1e-30 < value < 1e30 or value < at_least:
        limit = f"at least {at_least:g}" if at_least else "above 0 in 32-bit floats"
        raise _bad_rope(f"{name} is {printable(value, 40)}", f"It must be finite and {limit}.")
    return float(value)


def _contradiction(name: str, a: object, b: object) -> BadInput:
    a, b = ("missing" if value is None else printable(value, 40) for value in (a, b))
    return _bad_rope(
        f"{printable(name, 40)} is {a} in one place and {b} in another",
        "It stands in rope_parameters (transformers 5), rope_scaling or the top level (4), and "
        "programs differ in which they read.",
    )


def _bad_rope(what: str, why: str) -> BadInput:
    return BadInput(f"In config.json, {what}.", why, "Correct config.json in a copy of the folder.")
