"""Which of the words after `vllm serve` is its model, and which ones are values of flags.

vLLM's help reports both, but takes seconds to print. Source: arg_utils.py in vllm/engine and
cli_args.py in vllm/entrypoints, of version 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from specplug.subjects.drafting_flags import flag_name

SEVERAL_VALUES = frozenset(
    "--allowed-media-domains --api-key --collect-detailed-traces --cpu-offload-params --cudagraph-capture-sizes "
    "--ignore-patterns --kv-cache-dtype-skip-layers --logits-processors --lora-modules --lora-target-modules "
    "--numa-bind-cpus --numa-bind-nodes --offload-params --served-model-name --sleep-preserve-parameter-names".split()
)
"""Flags that take all words up to the next flag."""

WITHOUT_VALUE = frozenset(
    "--aggregate-engine-logging --allow-credentials --allow-deprecated-quantization --async-scheduling "
    "--cohere-is-reasoning-model --cudagraph-metrics --data-parallel-external-lb --data-parallel-hybrid-lb "
    "--data-parallel-multi-port-external-lb --dcp-q-replicate --enforce-eager --exclude-tools-when-tool-choice-none "
    "--fail-on-environ-validation --fully-sharded-loras --grpc --headless --interleave-mm-strings "
    "--jit-monitor-verbose --kv-cache-metrics --kv-sharing-fast-prefill --language-model-only --log-error-stack "
    "--long-prefill-token-threshold-adaptive --mm-device-do-normalize --mm-encoder-only --numa-bind "
    "--ray-workers-use-nsight --return-sampling-mask --return-tokens-as-token-ids --scheduler-reserve-full-isl "
    "--skip-mm-profiling --skip-tokenizer-init --sleep-mode-offload-cudagraph --specialize-active-lora "
    "--swa-bounded-replay --tokens-only --trust-remote-code --trust-request-chat-template --trust-request-mm-kwargs "
    "--use-fp64-gumbel --use-replayssm --use-tqdm-on-load -dpe -dph -dpm -ep".split()
)
"""Flags that take no value, beside those of SWITCH. One that is in neither counts as taking one, as most do."""

SWITCH = re.compile(r"--(no|enable)-|--disable-(?!access-log-for-endpoints$)|-O\d$")
"""What such flags look like, also in other versions; `-O3` has its value within."""

NEGATIVE = re.compile(r"-\.?\d")
"""How a negative number begins, which is a value: no flag has a digit behind its `-`."""


def positional(words: Sequence[str]) -> str | None:
    """The first of the words after `serve` that is neither a flag nor the value of one; None where there is none."""
    flag = ""  # whose values may follow
    for word in words:
        if word.startswith("-") and not NEGATIVE.match(word):
            name = flag_name("vllm", word)
            flag = "" if "=" in word or name in WITHOUT_VALUE or SWITCH.match(name) else name
        elif not flag:
            return word
        elif flag not in SEVERAL_VALUES:
            flag = ""
    return None
