"""resolve() against a stand-in for the hub on 127.0.0.1: downloads, refusals, offline, and paths.

huggingface_hub reads HF_ENDPOINT when it is imported, so the calls run in a child process.
"""

import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save

from quant.checkpoint import Checkpoint
from quant.errors import BadInput, InputMissing, UsageError
from quant.hub import Resolved, download_command, resolve, snapshot_root

ROOT = Path(__file__).resolve().parents[1]
COMMITS = {"main": "a" * 40, "v2": "b" * 40, "refs/pr/4": "c" * 40}
TOKEN = "hf_secretSECRETsecret"
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."}


def shard(name: str) -> bytes:
    return save({name: torch.full((2, 3), 7.0)})


TINY = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.model": b"\n\0",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"---\nlicense: mit\n---\n",
    "model-00001-of-00002.safetensors": shard("a"),
    "model-00002-of-00002.safetensors": shard("b"),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {n: f"model-0000{i}-of-00002.safetensors" for n, i in [("a", 1), ("b", 2)]}}
    ).encode(),
}
UNNEEDED = {
    "consolidated.safetensors": b"the same again",
    "original/params.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"onnx",
    "training.log": b"log",
}
REPOSITORIES = {
    "acme/tiny": TINY | UNNEEDED,
    "acme/notes": {"notes.txt": b"no model"},
    "acme/gated-files": TINY,
    "acme/big": {"config.json": b"{}", "model.safetensors": bytes(100_000)},
    **dict.fromkeys(["acme/hurries", "acme/stalls", "acme/moves"], TINY),
    "acme/breaks-off": {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 400},
    "acme/damaged": TINY,
}


class Hub(BaseHTTPRequestHandler):
    """Three calls of the hub's protocol: a repository's commit, its tree, and its files."""

    protocol_version = "HTTP/1.1"
    fetched: list[str] = []  # noqa: RUF012 (shared on purpose)
    troubles: dict[str, int] = {}  # noqa: RUF012
    """Repository -> how often it still does what its name says."""
    commits: set[str] = set()  # noqa: RUF012
    """Of acme/moves: what files were asked for at."""

    def log_message(self, *args):
        pass

    def answer(self, status: int, headers: dict, body: bytes = b""):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def json(self, content: object):
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def do_GET(self):
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if api else parts[:2])
        kind, rest = (parts[4:5], parts[5:]) if api else (parts[2:3], parts[3:])
        if self.refuse(repository, is_file=not api):
            return
        files = REPOSITORIES[repository]
        if kind == ["revision"]:
            commit = COMMITS.get("/".join(rest))
            if repository == "acme/moves" and commit and Hub.commits:
                commit = COMMITS["v2"]
            if commit is None:
                self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            else:
                self.json({"id": repository, "sha": commit, "siblings": []})
        elif kind == ["tree"]:
            self.json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": name}
                    for name, content in files.items()
                ]
            )
        else:
            commit, name = rest[0], "/".join(rest[1:])
            if self.command == "GET":
                Hub.fetched.append(f"{repository}/{name}")
            etag = hashlib.sha256(files[name]).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "none"}
            if repository == "acme/moves":
                Hub.commits.add(commit)
            if self.command == "GET" and name.endswith(".safetensors") and self.trouble(repository):
                self.misbehave(repository, headers, files[name])
            else:
                self.answer(200, headers, files[name])

    def trouble(self, repository: str) -> bool:
        """Whether it is to misbehave once more."""
        n = Hub.troubles.get(repository, 0)
        Hub.troubles[repository] = max(0, n - 1)
        return n > 0

    def misbehave(self, repository: str, headers: dict, content: bytes):
        if repository == "acme/hurries":
            self.answer(429, {"Retry-After": "1"})
        elif repository == "acme/damaged":
            self.answer(200, headers, content[:-1] + bytes([content[-1] ^ 1]))
        else:  # half of it; then the line is dead, or says nothing
            self.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if repository == "acme/stalls":
                time.sleep(2)
            self.close_connection = True

    do_HEAD = do_GET

    def refuse(self, repository: str, is_file: bool) -> bool:
        """The hub's refusals, by the repository's name."""
        sent = self.headers.get("Authorization", "")
        refusals = {
            "acme/gated": (403, GATED),
            "acme/private": (401, {"X-Error-Message": f"Invalid credentials {sent}"}),
            "acme/forbidden": (403, {"X-Error-Message": f"Forbidden for {sent}"}),
            "acme/none": (404, {"X-Error-Code": "RepoNotFound"}),
            "acme/broken": (500, {"X-Error-Message": f"Out of order {sent}"}),
            "acme/busy": (429, {"X-Error-Message": "Slow down"}),
            "api/agent-harnesses": (404, {}),  # huggingface_hub asks for it by itself
        }
        if is_file:
            refusals["acme/gated-files"] = (403, GATED)
        if repository in refusals:
            self.answer(*refusals[repository])
        return repository in refusals


CHILD = """
import json, sys, traceback
from quant.errors import QwqQuantError
from quant.hub import resolve

for call in json.loads(sys.argv[1]):
    try:
        found = resolve(**call)
        result = {"path": str(found.path), "name": found.name, "revision": found.revision}
    except QwqQuantError as error:
        result = {"error": type(error).__name__, "text": str(error), "next": error.next_step}
        result["trace"] = "".join(traceback.format_exception(error))  # as --debug shows it
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(
    endpoint: str, home: Path, *calls: dict, how: dict | None = None, **environment: str
) -> list[dict]:
    """The results of resolve(**call) in one child process; the caller's HF_* stay out of it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(calls)],
        cwd=ROOT,
        env=clean
        | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
        **(how or {}),
    )
    assert child.returncode == 0, child.stderr
    assert TOKEN not in child.stdout + child.stderr
    assert "%|" not in child.stderr, "a progress bar, though stderr is no terminal"
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.fixture(scope="module")
def downloaded(endpoint, tmp_path_factory) -> tuple[Path, dict]:
    """HF_HOME after acme/tiny was downloaded, and what resolve() said."""
    home = tmp_path_factory.mktemp("home")
    Hub.fetched.clear()
    (result,) = ask(endpoint, home, {"model": "acme/tiny"})
    return home, result


def test_a_sharded_checkpoint_is_downloaded_and_opens_through_the_caches_links(downloaded):
    home, result = downloaded
    assert result["name"] == "acme/tiny"
    assert result["revision"] == COMMITS["main"]
    folder = Path(result["path"])
    assert folder == home / "hub" / "models--acme--tiny" / "snapshots" / COMMITS["main"]
    assert (folder / "model-00001-of-00002.safetensors").is_symlink()
    checkpoint = Checkpoint.open(folder, result["name"], result["revision"])
    assert {n: i.shape for n, i in checkpoint.tensors.items()} == {"a": (2, 3), "b": (2, 3)}
    assert checkpoint.read_text("chat_template.jinja") == "{{ messages }}"


def test_only_what_a_conversion_reads_is_fetched(downloaded):
    assert sorted(Hub.fetched) == sorted(f"acme/tiny/{name}" for name in TINY)


def test_settings_are_checked_before_weights_are_fetched(endpoint, tmp_path):
    """An unsupported model must not cost its user a download of 65 GB first."""
    code = """
import sys
from quant.errors import BadInput
from quant.source import open_source

def refuse(config):
    assert config["model_type"] == "qwen2"
    raise BadInput("not this one")

try:
    open_source(sys.argv[1], check_config=refuse)
except BadInput as error:
    print(error)
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    child = subprocess.run(
        [sys.executable, "-c", code, "acme/tiny"],
        cwd=ROOT,
        env=clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.stdout == "not this one\n", child.stderr
    assert list(tmp_path.rglob("config.json"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_revisions_by_branch_by_pull_request_and_by_commit(endpoint, tmp_path):
    commit = COMMITS["v2"]
    results = ask(
        endpoint,
        tmp_path,
        {"model": "acme/tiny@v2"},
        {"model": "acme/tiny", "revision": "v2"},
        {"model": "hf://acme/tiny@v2", "revision": "v2"},
        {"model": f"hf://acme/tiny@{commit}"},
        {"model": "acme/tiny@refs/pr/4"},
        {"model": "hf://acme/tiny", "cache_dir": str(tmp_path / "other")},
    )
    assert [r["revision"] for r in results[:4]] == [commit] * 4
    assert results[4]["revision"] == COMMITS["refs/pr/4"]
    assert results[5]["path"].startswith(str(tmp_path / "other" / "models--acme--tiny"))
    assert {r["name"] for r in results} == {"acme/tiny"}


def test_offline_with_the_cache_and_without(downloaded, endpoint, tmp_path):
    home, result = downloaded
    before = list(Hub.fetched)
    offline = {"model": "acme/tiny", "offline": True}
    assert ask(endpoint, home, offline) == [result]
    assert ask(endpoint, home, {"model": "acme/tiny"}, HF_HUB_OFFLINE="1") == [result]
    results = ask(endpoint, tmp_path, offline, {"model": "acme/tiny@v2", "offline": True})
    results += ask(endpoint, tmp_path, {"model": "acme/tiny"}, HF_HUB_OFFLINE="1")
    for result, revision in zip(results, ["", " --revision v2", ""], strict=True):
        assert result["error"] == "Unavailable"
        assert result["next"] == f"With a network: hf download acme/tiny{revision}"
        assert "Offline mode" in result["text"]
    assert Hub.fetched == before


def test_offline_with_half_a_snapshot(downloaded, endpoint, tmp_path):
    """A download that was cut off is not taken for the model."""
    home = tmp_path / "home"
    ask(endpoint, home, {"model": "acme/tiny"})
    snapshot = home / "hub" / "models--acme--tiny" / "snapshots" / COMMITS["main"]
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    (result,) = ask(endpoint, home, {"model": "acme/tiny", "offline": True})
    assert result["error"] == "Unavailable"
    assert "not whole in the local cache" in result["text"]


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("acme/gated", "NotPermitted", ["accept a licence", "{endpoint}/acme/gated", "hf auth"]),
        ("acme/gated-files", "NotPermitted", ["is gated", "{endpoint}/acme/gated-files"]),
        ("acme/private", "NotPermitted", ["(401)", "does not exist, or it is private", "hf auth"]),
        ("acme/forbidden", "NotPermitted", ["(403)", "{endpoint}/acme/forbidden"]),
        ("acme/none", "InputMissing", ["There is no acme/none on the hub"]),
        ("acme/tiny@gone", "InputMissing", ["acme/tiny has no revision gone", "/commits"]),
        ("acme/notes", "BadInput", ["acme/notes holds no file that a conversion reads"]),
        ("acme/broken", "Unavailable", ["could not be downloaded", "500", "hf download"]),
        ("acme/busy", "Unavailable", ["could not be downloaded", "429"]),
        ("acme--x/tiny", "UsageError", ["no name of a repository"]),
    ],
)
def test_what_the_hub_refuses(endpoint, tmp_path, model, error, words):
    (result,) = ask(endpoint, tmp_path, {"model": model, "token": TOKEN})
    assert result["error"] == error, result["text"]
    for word in words:
        assert word.format(endpoint=endpoint) in result["text"]


def test_the_token_of_the_environment_is_not_printed_either(endpoint, tmp_path):
    (result,) = ask(endpoint, tmp_path, {"model": "acme/broken"}, HF_TOKEN=TOKEN)
    assert result["error"] == "Unavailable"
    assert "Out of order Bearer ***" in result["text"]  # the server did get it and repeat it


def test_a_dead_hub_with_the_cache_and_without(downloaded, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{listener.getsockname()[1]}"  # bound, so nobody else answers
        home, result = downloaded
        assert ask(dead, home, {"model": "acme/tiny"}) == [result]
        (result,) = ask(dead, tmp_path, {"model": "acme/tiny"})
    assert result["error"] == "Unavailable"
    assert "refused" in result["text"]
    assert result["next"].endswith("hf download acme/tiny")


def test_a_cache_that_cannot_be_written(endpoint, tmp_path):
    (tmp_path / "file").touch()
    places = ["/proc/none", str(tmp_path / "file" / "x")]
    calls = [{"model": "acme/tiny", "cache_dir": place} for place in places]
    for result in ask(endpoint, tmp_path, *calls):
        assert result["error"] == "CannotCreate", result["text"]
        assert "--cache-dir" in result["next"]


def test_a_disk_that_takes_no_more(endpoint, tmp_path):
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))}
    (result,) = ask(endpoint, tmp_path, {"model": "acme/big"}, how=limit)
    assert result["error"] == "OutputFailed", result["text"]
    assert "File too large" in result["text"]
    assert "hf download acme/big" in result["next"]


def test_a_hub_in_a_hurry_is_given_time(endpoint, tmp_path):
    """429 once: waited as long as it says, and asked again."""
    Hub.troubles["acme/hurries"] = 1
    (result,) = ask(endpoint, tmp_path, {"model": "acme/hurries"})
    assert result.get("revision") == COMMITS["main"], result
    assert Checkpoint.open(Path(result["path"])).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("repository", ["acme/breaks-off", "acme/stalls"])
def test_an_interrupted_download_is_no_model_and_the_next_run_completes_it(
    repository, endpoint, tmp_path
):
    Hub.troubles[repository] = 99
    call, quick = {"model": repository, "token": TOKEN}, {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    (result,) = ask(endpoint, tmp_path, call, **quick)
    assert result["error"] == "Unavailable" and "could not be downloaded" in result["text"]
    assert "files that came whole are kept" in result["text"] and "hf download" in result["next"]
    assert not list(tmp_path.rglob("snapshots/*/*.safetensors"))
    offline = {"model": repository, "offline": True}
    (result,) = ask(endpoint, tmp_path, offline)
    assert result["error"] == "Unavailable", result
    Hub.troubles[repository] = 0
    (result,) = ask(endpoint, tmp_path, call, **quick)
    for name, content in REPOSITORIES[repository].items():
        if name in TINY or name.endswith(".safetensors"):
            assert (Path(result["path"]) / name).read_bytes() == content


def test_weights_that_arrive_damaged_are_not_kept(endpoint, tmp_path):
    """Of the right size, with one bit wrong: huggingface_hub alone would take them."""
    Hub.troubles["acme/damaged"] = 1
    first, second = ask(endpoint, tmp_path, {"model": "acme/damaged"}, {"model": "acme/damaged"})
    assert first["error"] == "Unavailable" and "arrived damaged" in first["text"]
    assert "Run the same command again" in first["next"]
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        assert (Path(second["path"]) / name).read_bytes() == TINY[name]


def test_a_branch_that_moves_meanwhile_gives_one_version(endpoint, tmp_path):
    """Settings and weights are fetched one after the other, at the commit that came first."""
    Hub.commits.clear()
    (result,) = ask(endpoint, tmp_path, {"model": "acme/moves"})
    assert result["revision"] == COMMITS["main"] and Hub.commits == {COMMITS["main"]}
    (again,) = ask(endpoint, tmp_path, {"model": "acme/moves"})
    assert again["revision"] == COMMITS["v2"]


# Paths: nothing here may ask the hub


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)


@pytest.mark.usefixtures("no_hub")
def test_a_path_that_exists_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    (tmp_path / "m.gguf").touch()
    (tmp_path / "sha256-1234").write_bytes(b"GGUF\3\0\0\0")
    monkeypatch.setenv("HOME", str(tmp_path))
    for model in ("acme/tiny", "./acme/tiny", str(tmp_path), ".", "m.gguf", "sha256-1234"):
        assert resolve(model) == Resolved(Path(model), model, None)
    assert resolve("~/acme/tiny").path == tmp_path / "acme" / "tiny"
    with pytest.raises(UsageError, match="hf://acme/tiny"):
        resolve("acme/tiny", revision="main")


@pytest.mark.usefixtures("no_hub")
def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "fifo")
    for name in ("config.json", "fifo"):
        with pytest.raises(BadInput, match=r"neither a folder nor a \.gguf") as caught:
            resolve(str(tmp_path / name))
        assert str(tmp_path) in caught.value.next_step


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "model",
    [
        "./acme/tiny", "../acme/tiny", "./tiny", "../tiny", "/acme/tiny", "~/tiny", "~nobody/tiny",
        "acme/tiny.gguf", "model.gguf", "a/b/c", "C:/tiny", "C:\\tiny", "acme\\tiny", "tiny",
        "acme/tiny@", "acme/ti ny", "acme/", "acme/\x1b[2J", "x" * 5000, "a\0b",
    ],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_asked_of_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputMissing) as caught:
        resolve(model)
    assert "org/name" in caught.value.next_step
    assert "\x1b" not in str(caught.value)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "model", ["", "hf://", "hf://tiny", "hf://../tiny", "hf://a/b/c", "https://hf.co/acme/tiny"]
)
def test_what_is_no_models_name(model):
    with pytest.raises(UsageError, match=r"no model's name"):
        resolve(model)


@pytest.mark.usefixtures("no_hub")
def test_revisions_that_contradict_and_revisions_that_climb():
    with pytest.raises(UsageError, match="Two revisions are asked for: v1 and v2"):
        resolve("acme/none@v1", revision="v2")
    for call in ({"model": "acme/none@../../x"}, {"model": "acme/none", "revision": "a/../b"}):
        with pytest.raises(UsageError, match="is no revision"):
            resolve(**call)


@pytest.mark.usefixtures("no_hub")
def test_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(InputMissing, match="is a link to something that does not exist"):
        resolve(str(tmp_path / "link"))


def test_the_caches_layout():
    snapshot = Path("/c/models--Qwen--QwQ-32B/snapshots/abc")
    for path in (snapshot, snapshot / "a" / "b.json"):
        assert snapshot_root(path) == snapshot
    for path in ("/c/snapshots/abc/x", "/c/models--a--b/blobs/x", "/snapshots/x", "/", "."):
        assert snapshot_root(Path(path)) is None
    assert download_command(snapshot / "a" / "b c.json") == (
        "hf download Qwen/QwQ-32B 'a/b c.json' --revision abc --force-download"
    )
    assert download_command(Path("my model/x.json")) == (
        "hf download ORG/NAME x.json --local-dir 'my model' --force-download"
    )
