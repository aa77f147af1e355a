"""Shared fixtures: the trained example model, and one tiny model of each architecture."""

import os
from pathlib import Path

import pytest

# Before any import of them: tests use no network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# llama.cpp's and torch's threads wait busily for each other: on shared cores, ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything loads Triton, which transformers does: kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_qwq() -> Path:
    """examples/tiny-qwq: trained, bf16, Qwen2 architecture, 6.8 million weights."""
    return ROOT / "examples" / "tiny-qwq"


@pytest.fixture(scope="session")
def texts() -> Path:
    """The folder of text fixtures."""
    return ROOT / "tests" / "texts"


@pytest.fixture(scope="session")
def made_models(tmp_path_factory):
    """name -> (folder, transformers model in float32), each made once a session."""
    from model_makers import make_model

    made = {}

    def get(name: str):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, make_model(name, folder)
        return made[name]

    return get
