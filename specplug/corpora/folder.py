"""The folder of a corpus: where it is, its manifest, and the check that its files are unchanged.

A folder is untrusted input, so everything read from it is checked. Nothing here depends on an engine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Literal

from specplug.corpora.shard import ORDER, STARTS, TOKENS, Shard
from specplug.errors import UsageError
from specplug.machine.folders import data_folder, expanded

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
MANIFEST = "corpus.json"
SCHEMA = 1
SIZE_LIMIT = 1 << 24
"""Bytes of a manifest."""

JOURNAL = "corpus.building.json"
"""The manifest of the complete shards of an unfinished build."""

ENDINGS = (TOKENS, ORDER, STARTS)
DOCUMENTS = "documents"
"""Ending of the list of a shard's documents."""

LEARNED = "learned.json"
"""What was learned from the answers in a memory (`answer_memory`)."""

STEM = re.compile(r"[0-9a-f]{16}")
SHARD_FILE = re.compile(rf"{STEM.pattern}\.({'|'.join((*ENDINGS, DOCUMENTS))})")
HASH = re.compile(r"[0-9a-f]{64}")

AGAIN = "build the corpus again"


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A shard in the manifest.

    stem    the name of its files, without their endings
    tokens  with one separator per document
    hashes  SHA-256 of each file, by its ending
    """

    stem: str
    tokens: int
    documents: int
    hashes: Mapping[str, str]

    def file_names(self) -> list[str]:
        return [f"{self.stem}.{ending}" for ending in self.hashes]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a corpus.

    tokenizer   `references.tokenizer_hash` of the model
    num_tokens  size of its vocabulary
    model       its name, for people
    sources     what the documents were read from, for people
    licence     of the documents, for people
    settings    how the corpus was built
    """

    tokenizer: str
    num_tokens: int
    model: str
    sources: tuple[str, ...]
    licence: str
    settings: Mapping[str, Any]
    shards: tuple[ShardEntry, ...] = field(default=())

    @property
    def size(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def digest(self) -> str:
        """Of the contents."""
        return sha256(" ".join(shard.hashes[TOKENS] for shard in self.shards).encode()).hexdigest()

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus that is open for searching.

    name      of its folder
    folder    an absolute path
    manifest  as it was when the corpus was opened
    """

    name: str
    folder: Path
    manifest: Manifest
    shards: tuple[Shard, ...]


def corpora_folder() -> Path:
    return data_folder() / "corpora"


def place(ref: str) -> Path:
    """The folder of a corpus: a name in the user's data folder, or, with a slash, a path. UsageError for neither."""
    if "/" in ref or ref in (".", "..", "~"):
        return expanded(ref)
    if not NAME.fullmatch(ref):
        raise UsageError(f"{ref}: no name of a corpus; use a-z, 0-9, '.', '_' and '-', or a path, such as ./{ref}")
    return corpora_folder() / ref


def names() -> list[str]:
    """The corpora in the user's data folder, in alphabetical order, and builds that were interrupted."""
    try:
        folders = [path for path in corpora_folder().iterdir() if not path.name.startswith(".")]
    except OSError:
        return []
    named = (path for path in folders if NAME.fullmatch(path.name))
    return sorted(path.name for path in named if exists(path) or is_file(path / JOURNAL))


def check_tokenizer(
    manifest: Manifest,
    ref: str,
    tokenizer: str,
    num_tokens: int | None,
    model: object,
    advice: str = "build a corpus with this model",
) -> None:
    """UsageError unless a corpus was made with this tokenizer, and holds ids of the vocabulary alone.

    num_tokens  size of the vocabulary; None where it is not known
    model       how the message names the model
    """
    if manifest.tokenizer != tokenizer:
        raise UsageError(
            f"corpus {ref}: its tokenizer is {manifest.tokenizer[:12]}, that of {model} {tokenizer[:12]}; {advice}"
        )
    if num_tokens is not None and manifest.num_tokens > num_tokens:
        raise UsageError(
            f"corpus {ref}: its vocabulary has {manifest.num_tokens} tokens, that of {model} {num_tokens}; {advice}"
        )


def exists(folder: Path) -> bool:
    return is_file(folder / MANIFEST)


def is_file(path: Path) -> bool:
    """Whether this is a regular file that can be seen."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_manifest(folder: Path, ref: str | None = None, *, file_name: str = MANIFEST) -> Manifest:
    """UsageError where there is no corpus, or its manifest is damaged.

    ref  how the user named the corpus, for the message
    """
    path = folder / file_name
    if not is_file(path):
        ref = ref or f"{folder}/"
        raise UsageError(
            f"corpus {ref}: no corpus is there; build it with: specplug build corpus MODEL FILES... --out "
            f"{shlex.quote(ref)}"
        )
    try:
        with open(path, "rb") as file:
            content = file.read(SIZE_LIMIT + 1)
        data = json.loads(content) if len(content) <= SIZE_LIMIT else None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); {AGAIN}") from None
    problem = _problem(data)
    if problem or data is None:
        raise UsageError(f"{path}: {problem or 'too large'}; {AGAIN}")
    shards = tuple(ShardEntry(**entry) for entry in data["shards"])
    values = {key: data[key] for key in ("tokenizer", "num_tokens", "model", "licence", "settings")}
    return Manifest(**values, sources=tuple(data["sources"]), shards=shards)


def manifest_text(manifest: Manifest) -> bytes:
    return (json.dumps({"schema": SCHEMA, **asdict(manifest)}, indent=1) + "\n").encode()


def described(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Plain data about a corpus, for `--json`; `bytes` are those of its files."""
    num_bytes = 0
    for name in (MANIFEST, LEARNED, *(name for entry in manifest.shards for name in entry.file_names())):
        with suppress(OSError):
            num_bytes += (folder / name).stat().st_size
    plain = asdict(manifest)
    return {"path": str(folder), **plain, "tokens": manifest.size, "documents": manifest.documents, "bytes": num_bytes}


def open_corpus(ref: str, *, check: bool = False) -> Corpus:
    """Map a corpus, and have its files read (`Shard.load`).

    check  compare all files with their hashes, which reads them
    UsageError where there is none, its files do not fit one another, or one differs from its hash.
    """
    folder = place(ref)
    manifest = read_manifest(folder, ref)
    while True:
        try:
            if check:
                _check_hashes(folder, manifest)
            shards = _open_shards(folder, manifest)
            break
        except UsageError:
            again = read_manifest(folder, ref)
            if again == manifest:
                raise
            manifest = again  # it was replaced just now
    for shard in shards:
        shard.load()
    folder = Path(os.path.abspath(folder))
    return Corpus(folder.name, folder, manifest, tuple(shards))


def on_disk(corpus: Corpus) -> Literal["same", "changed", "deleted"]:
    """What has become of the files of an open corpus, which keeps the contents that it was opened with."""
    if not exists(corpus.folder):
        return "deleted"
    try:
        return "same" if read_manifest(corpus.folder) == corpus.manifest else "changed"
    except UsageError:
        return "changed"


def _open_shards(folder: Path, manifest: Manifest) -> list[Shard]:
    shards = []
    for entry in manifest.shards:
        try:
            shard = Shard(folder / entry.stem, manifest.num_tokens)
            if len(shard) != entry.tokens:
                raise ValueError(f"{len(shard)} tokens, the manifest says {entry.tokens}")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise UsageError(f"{folder / entry.stem}: damaged ({reason}); {AGAIN}") from None
        shards.append(shard)
    return shards


def check_files(folder: Path, ref: str | None = None) -> Manifest:
    """Compare every file with its hash, which reads all of them. UsageError names the first one that differs."""
    manifest = read_manifest(folder, ref)
    _check_hashes(folder, manifest)
    return manifest


def _check_hashes(folder: Path, manifest: Manifest) -> None:
    for entry in manifest.shards:
        for ending, expected in entry.hashes.items():
            _check_hash(folder / f"{entry.stem}.{ending}", expected)


def read_checked(folder: Path, entry: ShardEntry, ending: str) -> bytes:
    """A file of a shard. UsageError where its hash is not that of the manifest."""
    path = folder / f"{entry.stem}.{ending}"
    _check_hash(path, entry.hashes[ending])
    return path.read_bytes()


def _check_hash(path: Path, expected: str) -> None:
    actual = _file_hash(path)
    if actual != expected:
        raise UsageError(f"{path}: its SHA-256 is {actual[:12]}, the manifest says {expected[:12]}; {AGAIN}")


def _file_hash(path: Path) -> str:
    if not is_file(path):  # a pipe would be waited for
        raise UsageError(f"{path}: no such file; {AGAIN}")
    try:
        with open(path, "rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); {AGAIN}") from None


def own_files(folder: Path) -> list[Path]:
    """All files in the folder that have names of a corpus's files, those of interrupted writing included."""
    names = (MANIFEST, JOURNAL, LEARNED)
    return [
        path
        for path in folder.iterdir()
        if SHARD_FILE.fullmatch(path.name)
        or path.name in names
        or any(path.name.startswith(f".{name}.") for name in names)
    ]


def _problem(data: object) -> str | None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return f"not a manifest of schema {SCHEMA}"
    types: dict[str, type] = {
        "tokenizer": str, "num_tokens": int, "model": str, "sources": list, "licence": str, "settings": dict,
        "shards": list,
    }  # fmt: skip
    for key, expected in types.items():
        if not isinstance(data.get(key), expected) or isinstance(data[key], bool):
            return f"{key} is missing or has the wrong type"
    if not 0 < data["num_tokens"] <= 1 << 31:
        return f"num_tokens {data['num_tokens']} is no size of a vocabulary"
    if not all(map(_is_text, data["sources"])):
        return "sources are not texts"
    if not all(_is_text(data[key]) for key in ("tokenizer", "model", "licence")):
        return "a text cannot be printed"
    problem = _settings_problem(data["settings"])
    if problem:
        return problem
    stems = set()
    for entry in data["shards"]:
        if not isinstance(entry, dict) or entry.keys() != {"stem", "tokens", "documents", "hashes"}:
            return "a shard has other keys"
        stem, hashes = entry["stem"], entry["hashes"]
        if not isinstance(stem, str) or not STEM.fullmatch(stem) or stem in stems:
            return f"{stem!r} is no name of a shard"
        stems.add(stem)
        if not all(isinstance(entry[key], int) and 0 < entry[key] < 1 << 31 for key in ("tokens", "documents")):
            return f"shard {stem}: its numbers are wrong"
        if not isinstance(hashes, dict) or hashes.keys() != {*ENDINGS, DOCUMENTS}:
            return f"shard {stem}: its hashes are missing"
        if not all(isinstance(value, str) and HASH.fullmatch(value) for value in hashes.values()):
            return f"shard {stem}: a hash is not one of SHA-256"
    return None


def _settings_problem(settings: Mapping[str, Any]) -> str | None:
    for key in ("include", "exclude"):
        value = settings.get(key, [])
        if not isinstance(value, list) or not all(map(_is_text, value)):
            return f"settings: {key} is no list of texts"
    for key in ("max_tokens", "shard_tokens"):
        value = settings.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            return f"settings: {key} is no number of tokens"
    return None


def _is_text(value: object) -> bool:
    """Whether this is a text that can be written as UTF-8, without zero bytes."""
    try:
        return isinstance(value, str) and b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False
