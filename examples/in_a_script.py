"""SpeculativeLlama in place of llama_cpp.Llama: print an answer, and what drafting saved.

    python examples/in_a_script.py [MODEL [PROFILE [MAX_TOKENS]]]

Install 'specplug[llama-cpp,demo]' first. Without arguments, the demo model and the profile `default` are used.
"""

import sys

from specplug.engines.llama_cpp import SpeculativeLlama
from specplug.models.references import resolve

model, profile, max_tokens = [*sys.argv[1:], *("demo:smollm2", "default", "128")[len(sys.argv) - 1 :]]
question = "Repeat this list, then sort it: pear, apple, fig, plum, pear, apple, fig, plum."

llm = SpeculativeLlama(str(resolve(model)), profile=profile, n_ctx=2048)
messages = [{"role": "user", "content": question}]
answer = llm.create_chat_completion(messages, max_tokens=int(max_tokens), temperature=0.0)
print(answer["choices"][0]["message"]["content"])

done = llm.counters
print(f"{done.emitted_tokens} tokens in {done.steps} passes, {done.mean_acceptance_length:.2f} tokens per pass;")
print(f"{done.accepted_tokens} of {done.draft_tokens} draft tokens were accepted")
llm.close()
