"""Sampling settings: from generation_config.json, from profiles, and what cancels what."""

import json
from pathlib import Path

import pytest

from quant.errors import BadInput, BadRecipe
from quant.gguf_file import Value
from quant.metadata_keys import SAMPLING
from quant.sampling import (
    DEFAULT_SEQUENCE,
    GENERATE_DEFAULTS,
    SAMPLERS,
    check_sampling,
    check_sequence,
    sampling_from_generation_config,
)

ROOT = Path(__file__).parents[1]
P = "general.sampling."


def plain(metadata) -> dict:
    return {key.removeprefix(P): value.data for key, value in metadata.items()}


# --- generation_config.json -------------------------------------------------------------------


def test_tiny_qwq_gets_its_own_settings_with_min_p_off():
    config = json.loads((ROOT / "examples/tiny-qwq/generation_config.json").read_text())
    metadata = sampling_from_generation_config(config)
    assert metadata == {
        P + "temp": Value("f32", 0.6),
        P + "top_k": Value("i32", 40),
        P + "top_p": Value("f32", 0.95),
        P + "min_p": Value("f32", 0.0),
        P + "penalty_repeat": Value("f32", 1.0),
    }
    assert check_sampling(metadata) == []


def test_left_out_fields_are_what_generate_takes():
    from transformers import GenerationConfig

    theirs = GenerationConfig._get_default_generation_params()
    assert theirs.get("min_p") is None
    assert {n: theirs.get(n) or 0.0 for n in GENERATE_DEFAULTS} == GENERATE_DEFAULTS
    got = plain(sampling_from_generation_config({"do_sample": True, "temperature": 0.7}))
    assert got == {"temp": 0.7, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "penalty_repeat": 1.0}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {}),
        ({"eos_token_id": 2}, {}),
        ({"do_sample": False}, {"temp": 0.0}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {"temp": 0.0}),
        (
            {"do_sample": False, "repetition_penalty": 1.05},
            {"temp": 0.0, "penalty_repeat": 1.05},
        ),
        ({"repetition_penalty": 1.05}, {"penalty_repeat": 1.05}),
        ({"temperature": None, "do_sample": None}, {}),
        (
            {"top_k": 20, "temperature": 1},
            {"temp": 1.0, "top_k": 20, "top_p": 1.0, "min_p": 0.0, "penalty_repeat": 1.0},
        ),
        (
            {"do_sample": True, "min_p": 0.1, "top_k": 20.0, "top_p": 1},
            {"temp": 1.0, "top_k": 20, "top_p": 1.0, "min_p": 0.1, "penalty_repeat": 1.0},
        ),
    ],
)
def test_do_sample_decides(config, settings):
    metadata = sampling_from_generation_config(config)
    assert plain(metadata) == settings
    for key, value in metadata.items():
        assert value.type == SAMPLING[key.removeprefix(P)].types[0]
        assert type(value.data) is {"f32": float, "i32": int}[value.type]


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": "yes"},
        {"do_sample": 1},
        {"temperature": "0.6"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 10**400},
        {"temperature": True},
        {"top_p": 1.5},
        {"top_k": 40.5},
        {"top_k": 2**31},
        {"top_k": [40]},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
    ],
)
def test_bad_generation_config(config):
    with pytest.raises(BadInput) as error:
        sampling_from_generation_config(config)
    assert f'"{next(iter(config))}"' in error.value.what


# --- the sequence -----------------------------------------------------------------------------


def test_sequence_in_llama_cpps_names():
    assert check_sequence(DEFAULT_SEQUENCE) == (DEFAULT_SEQUENCE, [])
    assert check_sequence("Top-K;topp;NUCLEUS;temp;typ;MinP;top-n-sigma;xtc;infill;adaptive-p")[
        0
    ] == ("top_k;top_p;top_p;temperature;typ_p;min_p;top_n_sigma;xtc;infill;adaptive_p")
    for name in SAMPLERS:
        assert check_sequence(f"{name};temp")[0] == f"{name};temperature"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ";",
        "top_k;",
        "top_k;;temperature",
        "top_k,top_p,temperature",
        "top_k;top_p,temperature",
        "top_k; top_p;temperature",
        "top_k top_p",
        "top_k:temperature",
        "top_k|temperature",
        "kpt",  # the letters of --sampler-seq
        "top_k;temperatur",
        "top_k;temperature\n",
        "top_k;temperature\x1b[2J",
        "top_\u212a;temperature",  # the Kelvin sign, whose lower case is k
    ],
)
def test_sequences_llama_cpp_would_not_follow(text):
    with pytest.raises(BadRecipe) as error:
        check_sequence(text)
    assert error.value.exit_code == 78
    assert "\x1b" not in str(error.value)


def test_misspelt_sampler_names_the_nearest():
    with pytest.raises(BadRecipe, match="Did you mean temperature"):
        check_sequence("top_k;temprature")
    with pytest.raises(BadRecipe, match="separated by ';' alone"):
        check_sequence("top_k,temperature")


def test_sequence_length():
    names = ";".join(["temperature"] * 42)
    assert len(names) == 503
    check_sequence(names + ";temp")  # 508
    with pytest.raises(BadRecipe, match="513 bytes"):
        check_sequence(names + ";dry;top_k")


def test_sequence_warnings():
    assert "no temperature" in check_sequence("top_k;top_p")[1][0]
    assert check_sequence("dry;temperature;DRY")[1] == ["The sampler sequence names dry twice."]


# --- settings against each other --------------------------------------------------------------


def settings(**values):
    return {
        P + name: Value({int: "i32", float: "f32", str: "str"}[type(v)], v)
        for name, v in values.items()
    }


@pytest.mark.parametrize(
    ("given", "warning"),
    [
        ({"sequence": "top_k;temperature", "penalty_repeat": 1.1}, "penalty_repeat 1.1 has no"),
        ({"sequence": "top_k;temperature", "min_p": 0.1}, "min_p has no effect"),
        ({"sequence": "top_k;temperature", "xtc_probability": 0.5}, "xtc_probability has no"),
        ({"sequence": "top_k", "temp": 0.5}, "no temperature"),
        ({"mirostat": 2, "top_k": 5}, "Mirostat replaces the sequence: top_k unused"),
    ],
)
def test_settings_that_do_nothing(given, warning):
    assert warning in check_sampling(settings(**given))[0]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"penalty_repeat": 1.1},  # llama.cpp's default sequence has penalties
        {"sequence": "penalties;temperature", "penalty_repeat": 1.1},
        {"sequence": "top_k;temperature", "penalty_repeat": 1.0},
        {"mirostat": 0, "top_k": 5},
        {"mirostat": 2, "temp": 0.5},
    ],
)
def test_settings_that_agree(given):
    assert check_sampling(settings(**given)) == []


def test_check_sampling_refuses_a_bad_sequence():
    with pytest.raises(BadRecipe):
        check_sampling(settings(sequence="top_k,temperature"))
    with pytest.raises(BadRecipe):
        check_sampling(settings(sequence="top_k\udcff"))  # as a damaged file's text is read
