"""Checks that a server's greedy answers are the same with drafting as without, and explains each difference.

Drafting is turned off by a field of requests where the server has one; else a server that specplug starts runs once
without its drafting flags, and once with them. Without drafting, everything is asked twice: a server that answers
differently by itself cannot be checked. The module builds the document of `verify --server --json`; it does not depend
on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from specplug.bench.workloads import Prompt
from specplug.errors import SpecplugError, UsageError
from specplug.subjects.launched import LaunchedServer
from specplug.subjects.remote import RemoteServer
from specplug.subjects.subject import Abilities, Question, RefusedQuestion, Reply

TIE = 0.3
"""Difference of two log probabilities below which rounding can swap two tokens.

The largest of such differences that was measured on this project's own engine is 0.27, with an f16 cache; see
docs/explanation/rounding.md. A server's kernels may round otherwise, so this is a judgement, and the document has both
probabilities."""

TOP = 5
"""Likeliest tokens that are asked for."""

SHOWN = 60
"""Characters of a continuation, and of the text before it, in a difference."""

ANSWERS = 3
"""To each prompt: two without drafting, and one with it."""

VERDICTS = ("identical", "rounding", "different")


@dataclass(frozen=True, slots=True)
class TextDifference:
    """Two answers to one prompt, and where they part.

    setting      `greedy`: plain decoding against drafting; `plain`: plain decoding against itself
    position     characters that are the same
    common       the end of that text
    plain, other the beginning of what follows it
    token        the index of plain decoding's token that holds the first difference; None where it is not known
    plain_top, other_top
                 the likeliest tokens there with their log probabilities; empty where the server does not report them
    gap          difference of the log probabilities of the two tokens, both by one of the answers; None where one of
                 them is not known
    verdict      `rounding` where the gap is at most TIE, else `different`
    """

    setting: str
    prompt: str
    position: int
    common: str
    plain: str
    other: str
    token: int | None
    plain_top: Mapping[str, float]
    other_top: Mapping[str, float]
    gap: float | None
    verdict: str


Server = LaunchedServer | RemoteServer
Progress = Callable[[str, int], None]


def prove_server(
    server: Server,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    notify: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda what, steps: None,
) -> dict[str, Any]:
    """The document of `verify --server --json`. The first turn of every prompt is answered three times.

    A prompt that is refused without drafting is left out. One that is refused later is a fault of the server.

    server  not started yet; it is stopped at the end
    UsageError for a server whose drafting cannot be turned off, or whose command has no drafting; SubjectError for one
    that fails; SpecplugError for one that drafts although its flags for drafting were left out, or refuses all prompts.
    """
    flags = server.command.drafting if isinstance(server, LaunchedServer) else []
    without = server
    if isinstance(server, LaunchedServer) and flags:
        without = LaunchedServer(server.command.without_drafting(), name=server.name)
        notify(f"starting {server.name} without {' '.join(flags)}")
    with _running(without) as able:
        if not flags and not able.per_request:
            raise UsageError(_cannot_switch(server))
        asked = {one.id: Question(({"role": "user", "content": one.turns[0]},), max_tokens) for one in prompts}
        drafting, top = not able.per_request, TOP if able.logprobs else 0
        plainly = {prompt: replace(one, drafting=drafting, top=top) for prompt, one in asked.items()}
        answered, refused = _plain_answers(without, plainly, progress)
        for prompt, why in refused.items():
            notify(f"prompt {prompt} is left out: {why}")
        ids, plain = list(answered), list(answered.values())
        questions = [asked[prompt] for prompt in ids]
        again = _answers(without, [plainly[prompt] for prompt in ids], "plain decoding again", progress)
        if any(reply.draft_tokens for reply in plain):
            raise SpecplugError(
                f"{server.name} drafts without its drafting flags, too, perhaps by an environment variable; take that "
                "out, since there is nothing to compare with"
            )
        if not flags:
            drafted = _drafted(without, questions, plain, able, progress)
    if flags:
        notify(f"starting {server.name} with {' '.join(flags)}")
        with _running(server):
            drafted = _drafted(server, questions, plain, able, progress)
    if all(reply.draft_tokens == 0 for reply in drafted):
        notify(f"{server.name} drafted nothing, so equal texts show nothing; choose other prompts or other flags")
    itself, counts = _compared("plain", ids, plain, again), _compared("greedy", ids, plain, drafted)
    return {
        "schema": 1,
        "model": able.model,
        "server": {"name": server.name, "kind": able.kind, "version": able.version},
        "switch": "restart" if flags else "request",
        "max_tokens": max_tokens,
        "settings": {"greedy": _counts(counts) | {"accepted_tokens": _sum(one.accepted_tokens for one in drafted)}},
        "itself": _counts(itself),
        "deterministic": not _counts(itself)["different"],
        "differences": [asdict(one) for one in (*itself, *counts) if one is not None],
        "same_output": not _counts(counts)["different"],
        "refused": refused,
    }


def difference(setting: str, prompt: str, plain: Reply, other: Reply) -> TextDifference | None:
    """Where two answers to one prompt part; None where their texts are equal."""
    if plain.text == other.text:
        return None
    shorter = min(len(plain.text), len(other.text))
    at = next((n for n in range(shorter) if plain.text[n] != other.text[n]), shorter)
    places = [_place(reply, at) for reply in (plain, other)]
    tops = [reply.top[place[0]] if place else {} for reply, place in zip((plain, other), places, strict=True)]
    gaps = [
        _gap(top, plain.text[place[1] :], other.text[place[1] :])
        for top, place in zip(tops, places, strict=True)
        if place
    ]
    gap = next((one for one in gaps if one is not None), None)
    return TextDifference(
        setting,
        prompt,
        position=at,
        common=plain.text[max(0, at - SHOWN) : at],
        plain=plain.text[at : at + SHOWN],
        other=other.text[at : at + SHOWN],
        token=places[0][0] if places[0] else None,
        plain_top=tops[0],
        other_top=tops[1],
        gap=None if gap is None else round(gap, 4),
        verdict="different" if gap is None or gap > TIE else "rounding",
    )


def _cannot_switch(server: Server) -> str:
    """What to do about a server that drafts always, or never."""
    if isinstance(server, LaunchedServer):
        return (
            f"--server: the command of {server.name} has no flags that draft, so there is nothing to check; add some, "
            "such as --spec-type ngram-simple for llama-server"
        )
    return (
        f"{server.name} was not started by specplug, and cannot turn drafting off for one request; pass the command "
        'that starts it, such as --server "llama-server -m MODEL.gguf --spec-type ngram-simple"'
    )


@contextmanager
def _running(server: Server) -> Iterator[Abilities]:
    try:
        server.start()
        yield server.abilities
    finally:
        server.stop()


def _plain_answers(
    server: Server, questions: Mapping[str, Question], progress: Progress
) -> tuple[dict[str, Reply], dict[str, str]]:
    """The replies, and why prompts are refused, by prompt. SpecplugError where none is answered."""
    answered: dict[str, Reply] = {}
    refused: dict[str, str] = {}
    for prompt, question in questions.items():
        try:
            answered[prompt] = server.ask(question)
        except RefusedQuestion as error:
            refused[prompt] = str(error)
        progress("plain decoding", 1 if prompt in answered else ANSWERS)
    if refused and not answered:
        last = [*refused.values()][-1]
        raise SpecplugError(
            f"{server.name} refuses all {len(refused)} prompts, so there is nothing to check; the last: {last}"
        )
    return answered, refused


def _answers(server: Server, questions: Sequence[Question], what: str, progress: Progress) -> list[Reply]:
    replies = []
    for question in questions:
        replies.append(server.ask(question))
        progress(what, 1)
    return replies


def _drafted(
    server: Server, questions: Sequence[Question], plain: Sequence[Reply], able: Abilities, progress: Progress
) -> list[Reply]:
    """The answers with drafting. One that differs is asked again with its likeliest tokens, where the server has them:
    asking for these can turn drafting off."""
    replies = _answers(server, questions, "drafting", progress)
    for index, (question, one, base) in enumerate(zip(questions, replies, plain, strict=True)):
        if able.logprobs and one.text != base.text:
            again = server.ask(replace(question, top=TOP))
            if again.text == one.text:
                replies[index] = replace(one, top=again.top)
    return replies


def _compared(
    setting: str, ids: Sequence[str], plain: Sequence[Reply], others: Sequence[Reply]
) -> list[TextDifference | None]:
    return [difference(setting, *one) for one in zip(ids, plain, others, strict=True)]


def _counts(compared: Sequence[TextDifference | None]) -> dict[str, int]:
    found = ["identical" if one is None else one.verdict for one in compared]
    return {"answers": len(found)} | {verdict: found.count(verdict) for verdict in VERDICTS}


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where the server did not count."""
    known = [*counts]
    return sum(one for one in known if one is not None) if None not in known else None


def _place(reply: Reply, at: int) -> tuple[int, int] | None:
    """(index, first character) of the token that holds character `at`, which may be the end of the text.

    A greedy answer's tokens are the likeliest ones. None where these are not reported for every token, or do not make
    the text, as where a character is made of several tokens.
    """
    start = 0
    for index, top in enumerate(reply.top):
        if not top:
            return None
        token = max(top, key=top.__getitem__)
        if start == len(reply.text):  # a control token, which is no part of the text
            return index, start
        if not reply.text.startswith(token, start):
            return None
        if start + len(token) > at:
            return index, start
        start += len(token)
    return None


def _gap(top: Mapping[str, float], plain: str, other: str) -> float | None:
    """Between the tokens with which two texts go on; None where one of them is not among `top`."""
    found = [_likelihood(top, text) for text in (plain, other)]
    return None if found[0] is None or found[1] is None else abs(found[0] - found[1])


def _likelihood(top: Mapping[str, float], text: str) -> float | None:
    """The log probability of the longest token that begins a text, or of a control token where the text has ended."""
    if not text:
        fitting = [token for token in top if not token or (token[0] == "<" and token[-1] == ">")]
    else:
        fitting = [token for token in top if token and text.startswith(token)]
    return top[max(fitting, key=len)] if fitting else None
