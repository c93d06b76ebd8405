"""llama-server's flags for servers that are played by Python: their help in llama.cpp's layout, and a parser for them.

Standard library only. Source of the layout: `common_arg::to_string` in common/arg.cpp of github.com/ggml-org/llama.cpp.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

SPEC_TYPES = "none,draft-simple,draft-eagle3,draft-mtp,ngram-simple,ngram-map-k,ngram-map-k4v,ngram-mod,ngram-cache"

FLAGS: list[tuple[str, str, str, Any]] = [
    ("-h, --help, --usage", "", "print usage and exit", None),
    ("--version", "", "show version and build info", None),
    ("-t, --threads", "N", "number of CPU threads to use during generation", -1),
    ("-c, --ctx-size", "N", "size of the prompt context", 4096),
    ("-np, --parallel", "N", "number of server slots", 1),
    ("-ngl, --gpu-layers, --n-gpu-layers", "N", "layers to store in VRAM", "auto"),
    ("-fit, --fit", "[on|off]", "whether to adjust unset arguments to device memory (env: LLAMA_ARG_FIT)", "on"),
    ("-m, --model", "FNAME", "model path to load", "models/stub.gguf"),
    ("-hf, -hfr, --hf-repo", "<user>/<model>", "Hugging Face model repository (env: LLAMA_ARG_HF_REPO)", None),
    ("-a, --alias", "STRING", "set model name aliases", None),
    ("--host", "HOST", "IP addresses to listen on", "127.0.0.1"),
    ("--port", "PORT", "port to listen", 8080),
    ("--api-prefix", "PREFIX", "prefix path the server serves from, without the trailing slash", ""),
    ("--api-key", "KEY", "API key to use for authentication", ""),
    ("--ssl-key-file", "FNAME", "path to file a PEM-encoded SSL private key", None),
    ("--ssl-cert-file", "FNAME", "path to file a PEM-encoded SSL certificate", None),
    ("--metrics", "", "enable prometheus compatible metrics endpoint", None),
    ("--spec-draft-model, -md, --model-draft", "FNAME", "draft model for speculative decoding", None),
    ("--spec-draft-n-max", "N", "number of tokens to draft for speculative decoding", 3),
    ("--spec-draft-n-min", "N", "minimum number of draft tokens to use for speculative decoding", 0),
    ("--spec-draft-p-min, --draft-p-min", "P", "minimum speculative decoding probability (greedy)", 0.0),
    ("--spec-type", SPEC_TYPES, "comma-separated list of types of speculative decoding to use", "none"),
    ("--spec-ngram-mod-n-min", "N", "minimum number of ngram tokens to use", 48),
    ("--spec-ngram-mod-n-max", "N", "maximum number of ngram tokens to use", 64),
    ("--spec-ngram-mod-n-match", "N", "ngram-mod lookup length", 24),
    *(
        (f"--spec-ngram-{kind}-{name}", "N", f"ngram {name} for {kind}", default)
        for kind in ("simple", "map-k", "map-k4v")
        for name, default in (("size-n", 12), ("size-m", 48), ("min-hits", 1))
    ),
]
"""llama-server's own, in the order of its help: all spellings, the value, the description, the default."""

REMOVED = ("--draft, --draft-n, --draft-max", "N", "the argument has been removed. use --spec-draft-n-max", None)

HELP_COLUMN = 40


def llama_parser() -> argparse.ArgumentParser:
    """A parser of FLAGS. A value is under the first long spelling, with `_` for `-`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names, value, _, default in FLAGS:
        spellings = names.split(", ")
        long = next(one for one in spellings if one.startswith("--"))
        more: dict[str, Any] = {"default": default} if value else {"action": "store_true"}
        if isinstance(default, int | float):
            more["type"] = type(default)
        parser.add_argument(*spellings, dest=long.strip("-").replace("-", "_"), **more)
    return parser


def print_what_is_asked(arguments: Sequence[str]) -> None:
    """Print help or version and exit where that is asked for; exit with llama.cpp's message for a removed flag."""
    if {"-h", "--help", "--usage"} & set(arguments):
        print(help_text())
        sys.exit()
    if "--version" in arguments:
        print("version: 9999 (stub)", file=sys.stderr)
        sys.exit()
    if removed := set(REMOVED[0].split(", ")) & set(arguments):
        sys.exit(f'error while handling argument "{removed.pop()}": {REMOVED[2]}')


def help_text() -> str:
    lines = ["----- common params -----", ""]
    for names, value, description, default in [*FLAGS, REMOVED]:
        first, _, rest = names.partition(", ")
        head = (f"{first + ',':<7}{rest}" if rest else first) + (f" {value}" if value else "")
        described = description + (f" (default: {default})" if default is not None else "")
        if len(head) > HELP_COLUMN - 3:
            lines += [head, " " * HELP_COLUMN + described]
        else:
            lines.append(f"{head:<{HELP_COLUMN}}{described}")
    return "\n".join(lines)
