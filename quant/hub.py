"""MODEL, as the user typed it, to a path on this disk; the hub's cache and the hub's refusals.

A path that exists wins. What looks like a path and does not exist is a mistake, never a download.
`org/name`, `org/name@revision` and `hf://org/name` are fetched by huggingface_hub, which honours
HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE itself, into its cache:

    models--org--name/snapshots/<commit>/model.safetensors -> ../../blobs/<sha256>

The commit that was fetched is recorded, not the branch: branches move.
"""

import errno
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quant.display import printable
from quant.errors import (
    BadInput,
    CannotCreate,
    InputMissing,
    NotPermitted,
    OutputFailed,
    QwqQuantError,
    Unavailable,
    UsageError,
)

SETTINGS_FILES = ["*.json", "*.jinja", "tokenizer.model", "README.md"]
"""All but the weights; README.md states the licence. fnmatch patterns: * crosses folders."""

WEIGHT_FILES = ["*.safetensors"]

UNNEEDED_FILES = ["consolidated*.safetensors", "original/*", "*.bin"]
"""The same weights a second time, in their maker's own layout."""

_HUB_NAME = re.compile(
    r"(?:hf://)?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./+-]+))?", re.ASCII
)
_PATH_LIKE = re.compile(r"(hf://)?(\.{1,2}/|.*\.gguf$)")
"""./folder, ../folder and org/model.gguf: hub names by their letters, paths by their meaning."""


@dataclass(frozen=True)
class Resolved:
    """Where MODEL lies: a checkpoint's folder, or a .gguf file.

    name: `org/name`, or the path as typed; revision: the commit on the hub, None for a local path.
    """

    path: Path
    name: str
    revision: str | None = None


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    before_weights: Callable[[Path], object] = lambda folder: None,
) -> Resolved:
    """Find MODEL on this disk, or download what a conversion needs of it.

    before_weights: called with the snapshot's folder when all but the weights is there; what it
    raises saves the user from downloading 65 GB in vain.

    Raises UsageError, InputMissing or BadInput; from the hub also NotPermitted (gated, private),
    Unavailable (no network, or offline and not in the cache), OutputFailed and CannotCreate.
    """
    path = Path(os.path.expanduser(model))
    if model and os.path.exists(path):
        return _local(model, path, revision)
    name = _HUB_NAME.fullmatch(model)
    if name is None or _PATH_LIKE.match(model):
        raise _not_found(model, path)
    if revision and name["revision"] and revision != name["revision"]:
        raise UsageError(
            f"Two revisions are asked for: {name['revision']} and {printable(revision)}.",
            next_step="Give one of them.",
        )
    wanted = name["revision"] or revision
    if wanted and ".." in wanted:
        raise UsageError(f"{printable(wanted)} is no revision: git forbids two dots in a name.")
    access = token, cache_dir, offline
    folder = _download(name["repository"], wanted, SETTINGS_FILES, *access)
    before_weights(folder)
    folder = _download(name["repository"], folder.name, WEIGHT_FILES, *access)
    return Resolved(folder, name["repository"], folder.name)


def snapshot_root(path: Path) -> Path | None:
    """The `models--org--name/snapshots/<commit>` folder that holds `path`, or None."""
    for folder in (path, *path.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            return folder
    return None


def download_command(path: Path) -> str:
    """What to type to fetch the file anew; the repository is named where the path tells it."""
    root = snapshot_root(path)
    if root is None:
        folder, file_name = (shlex.quote(printable(p, 4096)) for p in (path.parent, path.name))
        return f"hf download ORG/NAME {file_name} --local-dir {folder} --force-download"
    repository = root.parents[1].name.removeprefix("models--").replace("--", "/")
    words = [repository, path.relative_to(root), "--revision", root.name, "--force-download"]
    return "hf download " + " ".join(shlex.quote(printable(word, 4096)) for word in words)


def _local(model: str, path: Path, revision: str | None) -> Resolved:
    """A path that exists: a folder, or a GGUF file. `open` on a FIFO would wait, so stat first."""
    if revision:
        raise UsageError(
            f"A revision was given, but {printable(model)} is a path on this disk.",
            "A path that exists goes before a repository of the same name.",
            f"Leave the revision out, or write hf://{printable(model)} for the one on the hub.",
        )
    if path.is_dir() or path.suffix == ".gguf" or (path.is_file() and _is_gguf(path)):
        return Resolved(path, model)
    raise BadInput(
        f"{printable(model)} is neither a folder nor a .gguf file.",
        next_step=f"Give the folder that holds config.json: {printable(path.parent)}",
    )


def _is_gguf(path: Path) -> bool:
    """Ollama's and the hub's caches name a file by its hash alone."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _not_found(model: str, path: Path) -> QwqQuantError:
    """The error for a MODEL that is neither a path here nor a name on the hub."""
    if model.startswith(("hf://", "http://", "https://")) or not model:
        return UsageError(
            f"{printable(model) or 'An empty name'} is no model's name.",
            next_step="Write org/name, org/name@revision or hf://org/name@revision.",
        )
    if os.path.islink(path):
        return InputMissing(
            f"{printable(model)} is a link to something that does not exist.",
            next_step=f"See where it leads: ls -l {shlex.quote(printable(path))}",
        )
    return InputMissing(
        f"There is no file or folder {printable(model)}.",
        "It is not written as a model on the hub (org/name) either, so nothing was downloaded.",
        "Check the path, or write org/name, for example Qwen/QwQ-32B.",
    )


def _download(
    repository: str,
    revision: str | None,
    patterns: list[str],
    token: str | None,
    cache_dir: Path | None,
    offline: bool,
) -> Path:
    """The snapshot's folder in huggingface_hub's cache; files like `patterns` are there then."""
    from huggingface_hub import snapshot_download  # 0.3 s to import
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    began = time.time()
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=offline,
            allow_patterns=patterns,
            ignore_patterns=UNNEEDED_FILES,
        )
    except Exception as error:  # hf_xet raises a bare RuntimeError, httpx its own families
        # `from None`: the hub's message may repeat what it was sent, the token too.
        raise _explained(error, repository, revision, token, offline) from None
    if not os.path.isdir(folder):
        raise BadInput(
            f"{repository} holds no file that a conversion reads.",
            "There is no config.json and no .safetensors in it.",
        )
    _check_arrived(Path(folder), repository, began)
    return Path(folder)


_SHA256 = re.compile(r"[0-9a-f]{64}")


def _check_arrived(folder: Path, repository: str, began: float) -> None:
    """Hold the weights that came since `began` against the hash that the hub named them by.

    huggingface_hub looks at their size alone. A damaged one is removed from the cache.
    Raises Unavailable.
    """
    for path in folder.rglob("*.safetensors"):
        blob = path.resolve()
        if not _SHA256.fullmatch(blob.name) or blob.stat().st_mtime < began:
            continue
        digest = hashlib.sha256()
        with open(blob, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        if digest.hexdigest() != blob.name:
            path.unlink()
            blob.unlink()
            raise Unavailable(
                f"{printable(path.name)} of {repository} arrived damaged.",
                f"Its sha256 is {digest.hexdigest()[:16]}..., the hub's is {blob.name[:16]}...",
                "It was removed from the cache. Run the same command again.",
            )


def _explained(
    error: Exception, repository: str, revision: str | None, token: str | None, offline: bool
) -> QwqQuantError:
    """huggingface_hub's exception as one of ours, in the user's words."""
    from huggingface_hub import constants, errors

    causes = list(_chain(error))
    status = next((s for s in map(_http_status, causes) if s is not None), None)
    answers = [cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)]
    origin = (answers or causes)[-1]
    reason = _without_token(f"{type(origin).__name__}: {origin}", token)
    page = f"{constants.ENDPOINT}/{repository}"
    fetch = f"hf download {repository}" + (
        f" --revision {shlex.quote(printable(revision))}" if revision else ""
    )

    def any_is(kind: type) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if any_is(errors.HFValidationError):
        return UsageError(f"{repository} is no name of a repository.", reason)
    if any_is(errors.GatedRepoError):
        return NotPermitted(
            f"{repository} is gated: its makers ask you to accept a licence first.",
            f"The hub said {status}.",
            f"Accept it at {page}, then log in with: hf auth login",
        )
    if any_is(errors.RevisionNotFoundError):
        return InputMissing(
            f"{repository} has no revision {printable(revision or 'main')}.",
            next_step=f"See its branches and commits at {page}/commits",
        )
    if status in (401, 403):
        return NotPermitted(
            f"The hub does not let you read {repository} ({status}).",
            "It does not exist, or it is private, or its makers ask you to accept a licence.",
            f"Check the name at {page}, accept a licence there, then log in with: hf auth login",
        )
    if status == 404:
        return InputMissing(
            f"There is no {repository} on the hub.",
            next_step=f"Check the name at {page}",
        )
    if offline or any_is(errors.OfflineModeIsEnabled):
        return Unavailable(
            f"{repository} at {printable(revision or 'main')} is not whole in the local cache.",
            "Offline mode is on, so nothing was downloaded.",
            f"With a network: {fetch}",
        )
    return _local_or_network_trouble(error, repository, reason, fetch)


def _local_or_network_trouble(
    error: Exception, repository: str, reason: str, fetch: str
) -> QwqQuantError:
    """A full disk, a cache that cannot be written, or else the network."""
    code = getattr(error, "errno", None)
    full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in reason:  # hf_xet raises without an errno
        return OutputFailed(
            f"The disk took no more while {repository} was downloaded.",
            reason,
            f"Free some space, or choose another cache with --cache-dir; then: {fetch}",
        )
    if code is not None and getattr(error, "filename", None) is not None:  # a file of the cache
        return CannotCreate(
            f"The download cache cannot be written, so {repository} was not downloaded.",
            reason,
            "Choose another with --cache-dir, or set HF_HOME.",
        )
    return Unavailable(
        f"{repository} could not be downloaded.",
        reason,
        f"Try again later; files that came whole are kept: {fetch}",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what caused it: the hub's answer is often the cause of the cause."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _http_status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _without_token(text: str, token: str | None) -> str:
    """The text on one line, any token in it blotted out."""
    from huggingface_hub import get_token

    for secret in (token, get_token()):
        if secret:
            text = text.replace(secret, "***")
    return printable(re.sub(r"\s+", " ", text), limit=400)
