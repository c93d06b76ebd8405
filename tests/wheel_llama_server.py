"""A real llama-server without a compiler: llama.cpp's own server code in the wheel of xllamacpp, under its flag names.

    python tests/wheel_llama_server.py -m model.gguf --port 8081 [-c 4096] [-np 1] [-t 2] [--spec-type ngram-simple]
        [--spec-ngram-simple-size-n 3] [-md draft.gguf] [--spec-draft-n-max 3]

The wheel has no argument parser; the flags are those of llama_flags.py. Its kernels are for any x86-64 with AVX2, so
its speeds are not those of a build for the processor.
"""

import argparse
import signal
import sys
from typing import Any

from llama_flags import llama_parser, print_what_is_asked

LOOKUPS = ("ngram_simple", "ngram_map_k4v", "ngram_map_k", "ngram_mod")
"""The parts of the speculative settings; a name that begins another one stands after it."""


def parameters(xllamacpp: Any, options: argparse.Namespace) -> Any:
    """The wheel's parameters with the values of the flags."""
    found = xllamacpp.CommonParams()
    found.model.path = options.model
    found.model_alias = {options.alias} if options.alias else found.model_alias
    found.n_ctx, found.n_parallel = options.ctx_size, options.parallel
    found.hostnames, found.port, found.api_prefix = [options.host], options.port, options.api_prefix
    found.api_keys = [options.api_key] if options.api_key else []
    found.endpoint_metrics = options.metrics
    found.ui = False
    if options.threads > 0:
        found.cpuparams.n_threads = found.cpuparams_batch.n_threads = options.threads
    drafting = found.speculative
    names = [one.strip().upper().replace("-", "_") for one in options.spec_type.split(",")]
    drafting.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{name}") for name in names]
    if options.spec_draft_model:
        drafting.draft.mparams.path = options.spec_draft_model
        drafting.draft.cpuparams.n_threads = drafting.draft.cpuparams_batch.n_threads = options.threads
    for flag, value in vars(options).items():
        if flag.startswith("spec_draft_") and flag != "spec_draft_model":
            setattr(drafting.draft, flag.removeprefix("spec_draft_"), value)
        for lookup in LOOKUPS:
            if flag.startswith(f"spec_{lookup}_"):
                setattr(getattr(drafting, lookup), flag.removeprefix(f"spec_{lookup}_"), value)
                break
    return found


def main() -> None:
    print_what_is_asked(sys.argv[1:])
    options = llama_parser().parse_args()
    import xllamacpp

    server = xllamacpp.Server(parameters(xllamacpp, options))
    print("listening on", server.listening_address, flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
