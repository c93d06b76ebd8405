"""Builds a corpus: reads documents, tokenizes them with a model's tokenizer, and writes sorted shards.

Documents that the folder holds already, from an interrupted build or an earlier version, are not tokenized again.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

from specplug.build.documents import STANDARD_INPUT, Skipped, Text, reads_ignore_files, texts
from specplug.core import IntArray
from specplug.corpora.answer_memory import answer_document, is_memory
from specplug.corpora.folder import Manifest, ShardEntry, described, exists, read_manifest
from specplug.corpora.suffix_order import LIBRARY, has_library
from specplug.corpora.writing import (
    CorpusWriter,
    Document,
    Key,
    check_out,
    documents_of,
    folder_lock,
    listed_documents,
    unfinished,
    writing,
)
from specplug.errors import UsageError
from specplug.machine import fingerprint
from specplug.machine.folders import cache_folder
from specplug.models.references import tokenizer_hash, vocabulary_size
from specplug.tune import trace as traces

SHARD_TOKENS = 32 << 20
"""Tokens of a shard at most. Sorting one takes 0.7 GB of memory, or 1.7 GB without `pydivsufsort`."""

BATCH_CHARACTERS = 1 << 20
"""Characters of the documents that are tokenized at once."""

ANSWERS = "recorded answers"
"""What the manifest's sources say of answers that `tune` recorded."""

Progress = Callable[[str, float], None]
Tokenize = Callable[[Sequence[str]], list[IntArray]]


@dataclass(frozen=True, slots=True)
class Request:
    """What to build.

    model_name    for people
    sources       files, folders and `-`; with `update` none stands for those of the earlier version, whose settings an
                  update keeps where it names no other
    ref           how the user named `out`
    answers       also the answers of this model that `tune` has recorded
    max_tokens    documents beyond so many tokens are left out
    update        make an earlier version of the corpus equal to what the sources hold now
    resume        go on with an interrupted build
    """

    model: Path
    model_name: str
    sources: tuple[str, ...]
    out: Path
    ref: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    licence: str = ""
    answers: bool = False
    max_tokens: int | None = None
    update: bool = False
    resume: bool = False
    shard_tokens: int = SHARD_TOKENS


def build(
    request: Request,
    *,
    notify: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda stage, share: None,
) -> dict[str, Any]:
    """Build the corpus and publish it; returns the document of `--json`.

    UsageError for sources without text, a corpus that exists, or one of another tokenizer.
    """
    with folder_lock(request.out, lambda: notify(f"waiting for another process that changes {request.ref}")):
        began = perf_counter()
        tokenizer = tokenizer_hash(request.model)
        earlier = _earlier(request, tokenizer)
        request = _with_settings(request, earlier)
        skipped = Skipped()
        published = _Build(request, earlier, tokenizer, skipped, notify, progress).run()
    if skipped.count:
        notify(f"skipped: {skipped.in_words()}")
    seconds = round(perf_counter() - began, 1)
    return {**described(published, request.out), "skipped": skipped.by_reason, "seconds": seconds}


def _earlier(request: Request, tokenizer: str) -> Manifest | None:
    """The corpus that is updated. UsageError where there is one and no update is asked for, or none."""
    check_out(request.out)
    if not request.update:
        if exists(request.out):
            raise UsageError(
                f"corpus {request.ref}: exists already; --update adds, replaces and removes documents, and specplug "
                f"corpus remove {shlex.quote(request.ref)} removes it"
            )
        return None
    manifest = read_manifest(request.out, request.ref)
    if is_memory(manifest):
        raise UsageError(f"corpus {request.ref}: it holds remembered answers, not documents; name another corpus")
    if manifest.tokenizer != tokenizer:
        raise UsageError(
            f"corpus {request.ref}: its tokenizer is {manifest.tokenizer[:12]}, that of {request.model} "
            f"{tokenizer[:12]}; build another corpus with this model"
        )
    return manifest


def _with_settings(request: Request, earlier: Manifest | None) -> Request:
    """The request with absolute sources. An update without sources has those of the earlier version, and keeps its
    settings where it names no other."""
    sources = tuple(s if s == STANDARD_INPUT else str(Path(s).absolute()) for s in request.sources)
    if earlier is not None:
        known = earlier.settings
        if not sources:
            sources = tuple(source for source in earlier.sources if source != ANSWERS)
            if STANDARD_INPUT in sources:
                raise UsageError(f"corpus {request.ref}: it was built from standard input; name what it is to hold now")
            request = replace(request, answers=request.answers or ANSWERS in earlier.sources)
        request = replace(
            request,
            include=request.include or tuple(known.get("include", ())),
            exclude=request.exclude or tuple(known.get("exclude", ())),
            max_tokens=request.max_tokens or known.get("max_tokens"),
        )
    if not sources and not request.answers:
        raise UsageError("no documents: name files or folders, - for standard input, or pass --answers")
    licence = request.licence or (earlier.licence if earlier else "")
    return replace(request, sources=sources, licence=licence)


class _Build:
    """One build, whose lock is held."""

    def __init__(
        self,
        request: Request,
        earlier: Manifest | None,
        tokenizer: str,
        skipped: Skipped,
        notify: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self._request = request
        self._earlier = earlier
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._notify = notify
        self._progress = progress
        self._standard_input = _remembering_input()

    def run(self) -> Manifest:
        request, notify = self._request, self._notify
        if not has_library():
            notify(f"{LIBRARY} is not installed: sorting takes several times as long; pip install 'specplug[corpus]'")
        if not reads_ignore_files() and any(Path(source).is_dir() for source in request.sources):
            notify("pathspec is not installed: .gitignore files are not read; pip install 'specplug[corpus]'")
        self._progress("reading", 0.0)
        wanted = {_key(text): len(text.text) for text in self._read(self._skipped)}
        answers = _recorded_answers(request.model, notify) if request.answers else ()
        recorded = {document.key: document for document in answers}
        tokenize, num_tokens = _open_tokenizer(request.model)
        settings = {key: getattr(request, key) for key in ("shard_tokens", "include", "exclude", "max_tokens")}
        manifest = Manifest(self._tokenizer, num_tokens, request.model_name, (), request.licence, settings)
        kept, rewritten, present = self._reusable(manifest, wanted.keys() | recorded.keys())
        with writing(request.out, manifest, shard_tokens=request.shard_tokens, kept=kept) as writer:
            for entry in rewritten:
                for document in documents_of(request.out, entry, num_tokens):
                    if document.key in present.get(entry.stem, ()):
                        self._add(writer, document)
            done = {key for keys in present.values() for key in keys}
            self._add_texts(writer, tokenize, wanted, done)
            for key, document in recorded.items():
                if key not in done:
                    self._add(writer, document)
            self._progress("sorting", 0.0)
            return writer.publish([*request.sources, *([ANSWERS] if request.answers else [])])

    def _reusable(
        self, manifest: Manifest, wanted: set[Key]
    ) -> tuple[list[ShardEntry], list[ShardEntry], dict[str, set[Key]]]:
        """Shards that stay as they are, shards that are written again, and the documents of each that stay.

        A shard is written again if one of its documents is gone or not complete; and small ones, if documents are
        added, so that they do not become many.
        """
        request = self._request
        known = [manifest for manifest in (unfinished(request.out), self._earlier) if manifest is not None]
        if not (request.resume or request.update):
            known = []
        entries: dict[str, ShardEntry] = {}
        for one in known:
            limit = one.settings.get("max_tokens")
            same = one.tokenizer == manifest.tokenizer and one.num_tokens == manifest.num_tokens
            if same and limit == request.max_tokens:
                entries |= {entry.stem: entry for entry in one.shards}
        listed = {stem: listed_documents(request.out, entry) for stem, entry in entries.items()}
        keys_of = {stem: {(name, digest) for name, digest, *_ in lines} for stem, lines in listed.items()}
        present: dict[str, set[Key]] = {}
        taken: set[Key] = set()
        published = {entry.stem for entry in self._earlier.shards} if self._earlier else set()
        for stems in (entries.keys() - published, entries.keys() & published):  # an interrupted update knows more
            complete = _complete(lines for stem, lines in listed.items() if stem in stems)
            for stem in stems:
                present[stem] = keys_of[stem] & complete & wanted - taken
            taken |= complete
        adds = bool(wanted - taken)
        kept: list[ShardEntry] = []
        rewritten: list[ShardEntry] = []
        for stem, entry in entries.items():
            small = adds and entry.tokens < request.shard_tokens // 2
            (kept if present[stem] == keys_of[stem] and not small else rewritten).append(entry)
        return kept, rewritten, present

    def _add_texts(self, writer: CorpusWriter, tokenize: Tokenize, wanted: Mapping[Key, int], done: set[Key]) -> None:
        """Tokenize and add the documents that are not there yet."""
        missing = sum(size for key, size in wanted.items() if key not in done)
        batch: list[Text] = []
        read = waiting = 0

        def add_batch() -> None:
            nonlocal read, waiting
            for text, tokens in zip(batch, tokenize([one.text for one in batch]), strict=True):
                self._add(writer, Document.complete(*_key(text), tokens))
            read += waiting
            batch.clear()
            waiting = 0
            self._progress("tokenizing", read / max(1, missing))

        for text in self._read(Skipped()):
            if not self._room(writer):
                break
            if _key(text) in done:
                continue
            done.add(_key(text))
            batch.append(text)
            waiting += len(text.text)
            if waiting >= BATCH_CHARACTERS:
                add_batch()
        if batch:
            add_batch()

    def _add(self, writer: CorpusWriter, document: Document) -> None:
        """Add what fits into `max_tokens`."""
        writer.add(replace(document, tokens=document.tokens[: self._room(writer)]))

    def _room(self, writer: CorpusWriter) -> int:
        """Tokens of the next document, without its separators, that `max_tokens` has room for."""
        if self._request.max_tokens is None:
            return 1 << 31
        left = self._request.max_tokens - writer.size
        return max(0, left - -(-left // self._request.shard_tokens))

    def _read(self, skipped: Skipped) -> Iterator[Text]:
        request = self._request
        return texts(
            request.sources,
            skipped,
            include=request.include,
            exclude=request.exclude,
            standard_input=self._standard_input,
        )


def _complete(shards: Iterable[Sequence[tuple[str, str, int, int, int]]]) -> set[Key]:
    """Documents of which these shards hold all tokens."""
    missing: dict[Key, int] = {}
    for lines in shards:
        for name, digest, _, length, total in lines:
            missing[name, digest] = missing.get((name, digest), total) - length
    return {key for key, left in missing.items() if not left}


def _key(text: Text) -> Key:
    return text.name, sha256(text.text.encode()).hexdigest()[:32]


def _remembering_input() -> Callable[[], bytes]:
    """Standard input, which can be read once, as often as it is asked for."""
    content: list[bytes] = []

    def read() -> bytes:
        if not content:
            content.append(sys.stdin.buffer.read())
        return content[0]

    return read


def _recorded_answers(model: Path, notify: Callable[[str], None]) -> Iterator[Document]:
    """The answers of exactly this model that `tune` has recorded on this machine. Damaged files are named."""
    identity = {key: fingerprint.model_identity(model)[key] for key in ("bytes", "sample_sha256")}
    folder = cache_folder() / traces.TRACES
    for path in sorted(folder.glob("*.npz")) if folder.is_dir() else ():
        try:
            trace = traces.load(path)
        except traces.Damaged as error:
            notify(f"left out: {error}")
            continue
        if trace is None or trace.about.get("model") != identity:
            continue
        for answer in trace.answers:
            tokens = answer_document(answer.prompt, answer.tokens.tolist(), prompts=False)
            digest = sha256(tokens.tobytes()).hexdigest()[:32]
            yield Document.complete(f"answer:{answer.prompt_id}:{answer.turn}", digest, tokens)


def _open_tokenizer(model: Path) -> tuple[Tokenize, int]:
    """The tokenizer of a model, without special tokens around texts, and the size of its vocabulary."""
    if model.is_dir():
        from specplug.transforms.checkpoint_text import open_tokenizer

        num_tokens = vocabulary_size(model)
        if num_tokens is None:
            raise UsageError(f"{model / 'config.json'}: names no vocab_size; use a language model")
        return open_tokenizer(model), num_tokens
    from specplug.engines.llama_cpp import require

    require()
    from specplug.engines.llama_cpp.model import open_model

    opened = open_model(model)
    return (lambda several: [opened.tokenize(text, add_special=False) for text in several]), opened.num_tokens
