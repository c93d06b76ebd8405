"""`specplug run`: generate text with a profile."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from specplug.bench.workloads import load_workload
from specplug.engines.open_profile import open_engine
from specplug.engines.remembering import remembering
from specplug.errors import UsageError
from specplug.generation.answers import Answer, Sampling
from specplug.generation.answers import Request as AnswerRequest
from specplug.generation.text import Segment
from specplug.profile.with_corpora import for_one_user

from .constraint_options import check_constraint, constraint_options, taken_constraint
from .corpus_options import remember_options, with_remember
from .options import Request, model_path, note, shared_options
from .preparation import prepare
from .terminal_text import for_terminal

VLLM_SAMPLING = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""vLLM's defaults; those of Sampling are llama.cpp's."""

SILENCE = 5.0
"""Seconds without text on a pipe after which stderr says that it is read."""

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class _Utf8(click.types.StringParamType):
    """Text in UTF-8. UsageError for an argument with other bytes, which Python turns into half surrogates."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = super().convert(value, param, ctx)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            what = param.opts[0] if isinstance(param, click.Option) else "the prompt"
            at = len(text[: error.start].encode())
            raise UsageError(f"{what} is not UTF-8 text (byte {at}); convert it first") from None
        return text


def _one_prompt(ctx: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> str | None:
    """The argument PROMPT. UsageError where a prompt was written without quotes."""
    if len(words) > 1:
        text = " ".join(words)
        raise UsageError(f'one prompt is expected, {len(words)} were given; put it in quotes: specplug run "{text}"')
    return words[0] if words else None


@click.command(epilog='\b\nExample: specplug run --model some.gguf --stats "Why is the sky blue?"')
@click.argument("prompt", nargs=-1, type=_Utf8(), metavar="[PROMPT]", callback=_one_prompt)
@shared_options(max_tokens=512, draft="one")
@remember_options
@click.option(
    "--input", "input_file", type=_FILE, help="Answer every line of a JSONL file, an object with `prompt` or `turns`."
)
@click.option("--system", type=_Utf8(), help="System message to put before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without a chat template.")
@click.option("--stop", type=_Utf8(), multiple=True, help="Stop before this text. Repeat it for several texts.")
@constraint_options
@click.option("--top-k", type=click.IntRange(0), help="Keep the K likeliest tokens (default: 40; vLLM: all).")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1),
    help="Keep the likeliest tokens up to this total probability (default: 0.95; vLLM: 1).",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    help="Drop tokens below this share of the likeliest token's probability (default: 0.05; vLLM: 0).",
)
@click.option(
    "--repeat-penalty", type=float, default=1.0, show_default=True, help="Penalty for repeated tokens; 1 is none."
)
@click.option(
    "--frequency-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Penalty for each earlier occurrence of a token; 0 is none.",
)
@click.option(
    "--presence-penalty",
    type=float,
    default=0.0,
    show_default=True,
    help="Penalty for tokens that occurred before; 0 is none.",
)
@click.option(
    "--logit-bias",
    multiple=True,
    metavar="ID=VALUE",
    help="Add VALUE to the logit of token ID. Repeat it for several.",
)
@click.option(
    "--logprobs",
    type=click.IntRange(0, 100),
    metavar="N",
    help="With --json or --jsonl: log probabilities, with N alternatives per token.",
)
@click.option("--stats", is_flag=True, help="Print speed and accepted draft tokens on stderr after each answer.")
@click.option("--show-drafts", is_flag=True, help="Colour text that came from accepted draft tokens.")
@click.option("--jsonl", is_flag=True, help="Print one JSON document per prompt, as soon as its answer is complete.")
def run(
    request: Request,
    prompt: str | None,
    input_file: Path | None,
    system: str | None,
    raw: bool,
    stats: bool,
    show_drafts: bool,
    jsonl: bool,
    stop: tuple[str, ...],
    logit_bias: tuple[str, ...],
    remember: str | None,
    private: bool,
    **sampling: Any,
) -> None:
    """Answer PROMPT, the text on stdin, or every prompt of a file.

    Text that is piped in follows PROMPT after a blank line; with -, it is the prompt alone.
    """
    if prompt is not None and input_file is not None:
        raise UsageError("a prompt and --input were both given; use one of them")
    if raw and system is not None:
        raise UsageError("--raw and --system were both given: a raw prompt has no messages; use one of them")
    if request.json and jsonl:
        raise UsageError("--json and --jsonl were both given; use one of them")
    if input_file is not None:
        conversations = [entry.turns for entry in load_workload(input_file, category="all")]
    else:
        conversations = [(_stdin() if prompt is None or prompt == "-" else _with_piped_text(prompt),)]
    for number, turns in enumerate(conversations, start=1):
        if not all(turn.strip() for turn in turns):
            which = "the prompt" if len(conversations) == 1 else f"prompt {number}"
            raise UsageError(f"{which} is empty; give some text")
        if raw and len(turns) > 1:
            raise UsageError(f"prompt {number} has {len(turns)} turns, but --raw continues one text; drop --raw")
    constraint = taken_constraint(sampling)
    settings = Sampling(
        temperature=request.temperature,
        seed=request.seed,
        logit_bias=_biases(logit_bias),
        **(VLLM_SAMPLING if request.profile.engine == "vllm" else {})
        | {name: value for name, value in (constraint | sampling).items() if value is not None},
    )
    check_constraint(settings)
    prints_text = not (request.json or jsonl)
    terminal = Console()
    coloured = show_drafts and terminal.is_terminal and not terminal.no_color
    several = sum(map(len, conversations)) > 1
    documents = []
    answer_number = 0
    prepare(request.profiles, yes=request.yes)
    chosen = with_remember(for_one_user(request.profile), remember, private=private)
    with (
        remembering(chosen, lambda: model_path(chosen), note) as remembered,
        open_engine(remembered.profile, note, learned=remembered.learned()) as engine,
    ):
        stops = stop if raw else (*stop, *engine.chat_stops)
        for turns in conversations:
            messages = [{"role": "system", "content": system}] if system else []
            for turn in turns:
                messages.append({"role": "user", "content": turn})
                tokens = engine.raw_prompt(turn) if raw else engine.chat_prompt(messages)
                answer = Answer()
                answer_number += 1
                if prints_text and answer_number > 1:
                    click.echo()
                asked = AnswerRequest(tokens, request.max_tokens, settings, stops, private)
                for released in engine.stream(asked, answer):
                    if prints_text:
                        _print(released, terminal.is_terminal, coloured)
                if prints_text:
                    click.echo()
                messages.append({"role": "assistant", "content": answer.text})
                named = {"model": request.profile.model, "profile": request.profile.name}
                document = ({"answer": answer_number} if several else {}) | named | _document(turn, len(tokens), answer)
                if jsonl:
                    click.echo(json.dumps(document))
                elif request.json:
                    documents.append(document)
                if stats:
                    note(_stats(answer))
                remembered.take(tokens, answer.tokens, engine.learned())
                remembered.write_now_and_then()
    if request.json:
        click.echo(json.dumps(documents[0] if len(documents) == 1 else documents))


def _with_piped_text(prompt: str) -> str:
    """The prompt, then a blank line and the text on stdin, if stdin is a pipe, a socket or a file and not empty.

    A pipe without a writer that closes it is waited for, as every reader of pipes does; stderr says so.
    """
    try:
        descriptor = sys.stdin.fileno()
        kind = os.fstat(descriptor).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return prompt
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or stat.S_ISREG(kind)):
        return prompt
    if not select.select([descriptor], [], [], SILENCE)[0]:
        note("waiting for the end of stdin, whose text is added to the prompt (none is added with < /dev/null)")
    return "\n\n".join(text for text in (prompt, _stdin()) if text.strip()) or prompt


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("no prompt; give one as an argument, on stdin, or with --input FILE")
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text (byte {error.start}); convert it first") from None


def _biases(pairs: Sequence[str]) -> dict[int, float]:
    biases = {}
    for pair in pairs:
        token, _, value = pair.partition("=")
        try:
            biases[int(token)] = float(value)
            if isnan(biases[int(token)]):
                raise ValueError("not a number")
        except ValueError:
            raise UsageError(f"--logit-bias {pair!r}: write ID=VALUE, such as 42=-5") from None
    return biases


def _print(released: Sequence[Segment], terminal: bool, coloured: bool) -> None:
    """Write the model's text unchanged; on a terminal, without control characters."""
    for segment in released:
        text = for_terminal(segment.text) if terminal else segment.text
        sys.stdout.write(click.style(text, fg="green", bold=True) if coloured and segment.drafted else text)
    sys.stdout.flush()


def _document(prompt: str, num_prompt_tokens: int, answer: Answer) -> dict[str, Any]:
    document: dict[str, Any] = {"prompt": prompt, "text": answer.text, "finish": answer.finish} | _figures(answer)
    document["prompt_tokens"] = num_prompt_tokens
    if answer.logprobs:
        document["logprobs"] = [
            {"token": token, "logprob": report.logprob, "top": report.top}
            for token, report in zip(answer.tokens, answer.logprobs, strict=True)
        ]
    return document


def _figures(answer: Answer) -> dict[str, Any]:
    c = answer.counters
    return {
        "tokens": len(answer.tokens),
        "seconds": round(answer.seconds, 4),
        "tokens_per_second": round((len(answer.tokens) - 1) / answer.decode_seconds, 2) if c.steps else None,
        "mean_acceptance_length": round(c.mean_acceptance_length, 3),
        "draft_tokens": c.draft_tokens,
        "accepted_tokens": c.accepted_tokens,
        "overhead_us_per_step": round(c.overhead_us_per_step, 1),
    }


def _stats(answer: Answer) -> str:
    f = _figures(answer)
    speed = f"{f['tokens_per_second']} tokens/s after the prompt, " if f["tokens_per_second"] is not None else ""
    return (
        f"{f['tokens']} tokens in {f['seconds']:.2f} s, {speed}"
        f"{f['mean_acceptance_length']:.2f} tokens per pass, {f['accepted_tokens']} of {f['draft_tokens']} draft "
        f"tokens accepted, {f['overhead_us_per_step']:.0f} us overhead per pass"
    )
