"""One chat over OpenAI's interface, streamed, as a Reply.

It knows the bodies of /v1/chat/completions, with the fields that vLLM, llama-server and specplug add to them.
"""

from __future__ import annotations

from specplug.subjects.connection import Connection, Json
from specplug.subjects.heard import Extras, Heard, timings_of, top_of
from specplug.subjects.subject import Question, Reply

CHAT = "/v1/chat/completions"


def ask_chat(connection: Connection, name: str, model: str, question: Question, extras: Extras) -> Reply:
    """Ask over CHAT and wait for the whole answer.

    name    what messages call the server
    model   the name that the request carries
    extras  what the answer must have
    """
    heard = hear_chat(connection, name, model, question, extras)
    heard.check(extras)
    return heard.reply(ids=extras.ids)


def hear_chat(connection: Connection, name: str, model: str, question: Question, extras: Extras) -> Heard:
    """What arrives of one answer; parameters as for `ask_chat`, but that nothing is demanded of it."""
    heard = Heard(name)
    for event in connection.stream(CHAT, _chat_body(model, question, extras), ends_with_done=True):
        body = event.data
        heard.prompt_ids = body.wholes("prompt_token_ids") or heard.prompt_ids
        tokens = body.part("usage").whole("completion_tokens")
        heard.tokens = heard.tokens if tokens is None else tokens
        heard.timings = timings_of(body) or heard.timings
        for choice in body.parts("choices"):
            delta = choice.part("delta")
            # Some versions of vLLM send the same text under both names.
            reasoning = delta.text("reasoning") or delta.text("reasoning_content")
            heard.hear(event.seconds, reasoning + delta.text("content"), choice.wholes("token_ids"))
            heard.top += [top_of(one) for one in choice.part("logprobs").parts("content")]
            heard.finish = choice.text("finish_reason") or heard.finish
    return heard


def _chat_body(model: str, question: Question, extras: Extras) -> Json:
    body: Json = {
        "model": model,
        "messages": [dict(message) for message in question.messages],
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if question.top:
        body |= {"logprobs": True, "top_logprobs": question.top}
    if extras.ids:
        body["return_token_ids"] = True
    if extras.switching:
        body["specplug"] = {"mode": "auto" if question.drafting else "off"}
    return body
