"""The OpenAI client against `specplug serve`: stream an answer, and count the tokens that came from drafts.

    specplug serve some.gguf                                  # in another terminal
    python examples/openai_client.py [BASE_URL [MAX_TOKENS]]

Install 'specplug[llama-cpp,serve]' and `openai` first. The default BASE_URL is http://127.0.0.1:8000/v1.
"""

import sys

from openai import OpenAI

base_url, max_tokens = [*sys.argv[1:], *("http://127.0.0.1:8000/v1", "128")[len(sys.argv) - 1 :]]

client = OpenAI(base_url=base_url, api_key="none")
stream = client.chat.completions.create(
    model="any",  # the server has one model and accepts every name
    messages=[{"role": "user", "content": "Write a haiku about a river, then write it again."}],
    max_tokens=int(max_tokens),
    temperature=0.0,
    stream=True,
    stream_options={"include_usage": True},
)
for event in stream:
    for choice in event.choices:
        print(choice.delta.content or "", end="", flush=True)
    if event.usage:
        accepted = event.usage.completion_tokens_details.accepted_prediction_tokens
        print(f"\n{event.usage.completion_tokens} tokens, {accepted} of them from drafts")
