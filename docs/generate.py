"""Write docs/reference/profile-keys.md and docs/reference/commands.md from the code.

    python docs/generate.py            # writes both pages
    python docs/generate.py --check    # writes nothing; exit code 1 when a page is not what this would write

Types and defaults come from the dataclasses of specplug.profile, and ranges from trying which values a profile takes.
Options of methods come from the proposers' constructors, and commands from click. Only the meanings of keys and options
are written here: a key without a meaning and a meaning without a key are errors.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from specplug import profile, registry
from specplug.errors import SpecplugError
from specplug_cli.main import app

REFERENCE = Path(__file__).parent / "reference"
GENERATED = "<!-- Written by docs/generate.py. Change the code or that script, then run it again. -->\n"

CHOICES = {
    "engine": (*profile.ENGINES, profile.SERVER),
    "planner.mode": ("measured", "static"),
    "runtime.kv_type": profile.KV_TYPES,
    "vllm.dtype": profile.DTYPES,
}
"""Keys that take one of a few strings."""

SECTIONS = {
    "": (profile.Profile, "Top level"),
    "planner": (profile.PlannerSettings, "`planner`: how many draft tokens to verify"),
    "runtime": (profile.Runtime, "`runtime`: how llama.cpp opens the model"),
    "vllm": (profile.VllmSettings, "`vllm`: how vLLM opens the model"),
    "server": (profile.ServerSettings, "`server`: the command that engine `server` starts"),
    "remember": (profile.Remember, "`remember`: what `run` and `serve` remember from one process to the next"),
    "measured": (profile.Measured, "`measured`: measurements on one machine"),
    "measured.cost_curve": (profile.CostPoints, "`measured.cost_curve` and each of `measured.batch_curves`"),
}
"""Dataclass and heading of each part of a profile."""

REQUIRED = {"remember": "corpus: a, "}
"""What a part cannot be without."""

INTRODUCTIONS = {
    "vllm": "These keys are vLLM's own flags of the same names, except those from `runner` to `tokens_per_batch_size`. "
    "`null` leaves the choice to vLLM.",
    "server": "`specplug serve --profile NAME` prints this command, and starts it, where the profile is your own: it "
    "is in the folder of your own profiles, or given as a path. Read a profile from somebody else before you start it: "
    "it can name any program. `--print-command` prints the command and starts nothing. `specplug tune --server` writes "
    "such profiles ([how](../how-to/serve.md#start-the-server-of-another-program)). Besides `name` and `description`, "
    "no other key has an effect.",
    "measured": "`specplug tune` writes this part. Without it the engine measures the cost of a pass when it starts.",
    "measured.cost_curve": "`ms[i][j]` is the time of a target pass over `rows[j]` rows with `contexts[i]` tokens per "
    "sequence in the cache.",
}

MEANINGS = {
    "schema": "Version of this format. Required.",
    "name": "Name of the profile: a-z, 0-9, `.`, `_` and `-`, 100 characters at most. Required.",
    "description": "One line for `specplug profiles list`.",
    "engine": "The engine that runs the model. `server` starts a command.",
    "model": "The model that the profile is for, so that commands need no `--model`: a "
    "[model reference](../how-to/models.md).",
    "proposers": "The methods that draft, each a name or a mapping with `method` and its options (below). The drafts "
    "of several methods are merged into one. `[none]` is plain decoding.",
    "planner": "See below.",
    "own_heads": "Let layers that the model's file brings to draft for it (an MTP layer) draft as well, on llama.cpp.",
    "exact": "Run every pass so that it rounds as plain decoding does on this machine: the same tokens are then "
    "certain, at a measured cost ([rounding](../explanation/rounding.md)).",
    "runtime": "See below.",
    "vllm": "See below.",
    "server": "See below. Required for engine `server`, and refused for others.",
    "remember": "See below. A text is the name of the corpus alone. Other commands ignore it.",
    "measured": "See below.",
    "evidence": "The measurements from which `specplug tune` chose the settings. `specplug profiles plot` draws them.",
    "planner.mode": "`measured` verifies the draft tokens that save time by the measured costs. `static` always "
    "verifies the `max_nodes` likeliest ones; it is meant for comparisons.",
    "planner.max_nodes": "Draft tokens that one pass verifies at most, over all sequences.",
    "planner.trees": "Verify token trees. With `false`, each draft is cut to its likeliest chain. vLLM always verifies "
    "chains.",
    "planner.prune_top_k": "Where a draft model has drafted, drop the drafts of other methods whose first token is not "
    "among so many of its likeliest ones; tokens that its trimmed head lacks are kept. `null` drops none: how far such "
    "tokens are trusted is then learned. llama.cpp only.",
    "runtime.threads": "CPU threads of passes over one row: a token without drafts. `null` uses all usable cores.",
    "runtime.threads_batch": "CPU threads of passes over several rows: prompts and drafts. `null` uses as many as "
    "`threads`.",
    "runtime.context": "Tokens of context per sequence.",
    "runtime.batch": "Prompt tokens that one pass reads at most.",
    "runtime.ubatch": "Tokens of a pass that llama.cpp computes at a time. `null` computes all of them at once.",
    "runtime.gpu_layers": "Layers to offload to the GPU; -1 is all of them. It has an effect only where llama.cpp was "
    "built with GPU support.",
    "runtime.flash_attention": "Compute attention with the flash attention kernel. `null`: the kernels are compared "
    "on this machine with a tiny model of the same weight formats and heads; the cache folder keeps the result. Flash "
    "attention and a bf16 cache are used where all passes then round alike, so that verified text is plain decoding's "
    "to the last bit, and otherwise the fastest combination of 16 bits. `null` is on for several sequences in one "
    "cache, where layers attend to a window, for `exact` and for a q8_0 cache, and off for an f32 cache.",
    "runtime.kv_type": "Number format of the KV cache. `null` is chosen together with `flash_attention`, and is bf16 "
    "for `exact`. A q8_0 cache takes about half the memory of 16 bits, keeps less of keys and values, and needs flash "
    "attention.",
    "runtime.repack": "Give the CPU's kernels a copy of the weights in a layout of their own. The copy takes memory "
    "and is meant to make passes over many rows faster, which can then round otherwise than passes over few rows.",
    "runtime.mmap": "Map the model's file into memory, instead of reading all of it when it is opened.",
    "runtime.coupled": "Above temperature 0, draw tokens with random numbers that a draft model can share, so that "
    "more of its draft tokens are accepted. A seed then gives another text than llama.cpp's own sampler, and the same "
    "text with and without drafts.",
    "runtime.snapshot_mib": "MiB at most for snapshots of the states of a recurrent or hybrid model, which its drafts "
    "need to be taken back: one for each token of the longest draft and each sequence.",
    "vllm.num_speculative_tokens": "Draft tokens for one sequence at most.",
    "vllm.runner": "The model runner of vLLM in which specplug's proposers draft. `auto`: V2 where vLLM without "
    "specplug would use it and all proposers can draft on the device, else V1.",
    "vllm.uniform": "On V1, verify the same number of draft tokens for every sequence of a batch, or none. GPUs where "
    "vLLM captures full CUDA graphs need this to use them.",
    "vllm.adaptive_verification": "On V2, let vLLM choose in every step which draft tokens to verify, from what its "
    "passes cost and from specplug's probabilities. `null`: where the GPU's attention kernels allow it.",
    "vllm.tokens_per_batch_size": "On V2, draft tokens per sequence by the number of running sequences: a list of "
    "`[first, last, tokens]` from 1 on; 0 drafts nothing. Empty: always `num_speculative_tokens`.",
    "vllm.max_model_len": "Tokens of context per sequence.",
    "vllm.max_num_seqs": "Sequences in one pass at most.",
    "vllm.gpu_memory_utilization": "Share of the GPU's memory, above 0 and up to 1. Commands that open several engines "
    "at once divide it among them.",
    "vllm.dtype": "Number format of weights and activations.",
    "vllm.enforce_eager": "Run without compilation and without CUDA graphs.",
    "remember.corpus": "Name of the corpus that gets the answers; it is drafted from as soon as it holds some "
    "([corpora](../how-to/corpora.md#memory-between-runs)). Required.",
    "remember.prompts": "Add the prompts, too. Otherwise the corpus gets the last 8 tokens of each.",
    "remember.max_tokens": "Tokens that the corpus holds at most; the oldest answers are dropped.",
    "server.command": "The program and its arguments, as you type them, one item each. Required. Characters that "
    "cannot be printed, such as line breaks, are refused.",
    "server.flags": "Flags that follow them.",
    "measured.hardware": "Fingerprint of the machine and of the versions.",
    "measured.cost_curve": "Cost of a pass for one sequence. See below.",
    "measured.acceptance": "For each bucket, how many draft tokens were accepted and rejected: `[hits, misses]`.",
    "measured.batch_curves": "Cost curves for several sequences in a pass, ascending. See below.",
    "measured.cost_curve.contexts": "Tokens per sequence in the cache, ascending.",
    "measured.cost_curve.rows": "Row counts, ascending, starting at 1.",
    "measured.cost_curve.ms": "Milliseconds, one list per context.",
    "measured.cost_curve.sequences": "Sequences that share the pass.",
    "measured.cost_curve.change_ms": "Milliseconds that a pass costs more after a pass with another row count.",
}

MODEL_DRAFT = "Longest chain of draft tokens, 1 to 64. On llama.cpp the drafter stops earlier where one more does not "
MODEL_DRAFT += "pay; on vLLM `vllm.num_speculative_tokens` applies instead."
WINDOW = (
    "llama.cpp only: `{first: 64, recent: 512}` reads only the first and the recent tokens of a text; with `retrieved: "
    "2048` also the chunks, of `chunk: 256` tokens, that match its end ([more](../how-to/short-context.md)). Without "
    "it the drafter reads all."
)
BRANCHES = "`1` drafts a chain. `2` adds the second most likely token at every depth, where the engine verifies trees."

METHODS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "none": ("Plain decoding.", {}),
    "ngram": (
        "The tokens that followed the last n tokens where they occurred before in this text (prompt lookup decoding).",
        {
            "max_match": "Longest n-gram that is looked up. Longer matches are still measured, for the acceptance.",
            "min_match": "Shortest n-gram that is looked up, >= 1.",
            "max_draft": "Longest chain of draft tokens, >= 1.",
        },
    ),
    "suffix": (
        "A tree of the tokens that followed the longest matching suffix, in this text and in finished answers "
        "(SuffixDecoding, SAM decoding).",
        {
            "max_draft": "Longest path of a draft.",
            "min_prob": "Paths that are less probable by the bucket priors are left out.",
            "occurrences": "Occurrences that are considered in the text and in finished answers, the latest first.",
            "shared_tokens": "Tokens of finished answers that are kept; 0 keeps none.",
        },
    ),
    "token_recycling": (
        "A tree grown from the target's most likely tokens at earlier positions (Token Recycling).",
        {
            "k": "Ids per row of the matrix.",
            "shape": "`best_first` grows the tree by counted probabilities; `paper` is the static tree of 80 nodes.",
            "warm": "A saved matrix to start from.",
            "tokenizer_hash": "Hash of the tokenizer that `warm` must have been made for.",
        },
    ),
    "grammar": (
        "A chain of the tokens that a request's schema or grammar forces, and of what followed in the text between "
        "them ([how it drafts](../how-to/grammar.md)). It drafts nothing for other requests.",
        {
            "max_draft": "Longest chain of draft tokens, >= 1.",
            "min_prob": "A chain ends where its path is less probable by the bucket priors.",
        },
    ),
    "datastore": (
        "A tree of what followed the end of the text in corpora on disk (REST; [how to build "
        "one](../how-to/corpora.md)).",
        {
            "corpora": "Names of corpora; one with a slash is the path of its folder. `[]` opens none: `serve` can add "
            "some while it runs.",
            "max_draft": "Longest path of a draft.",
            "min_match": "Fewest tokens at the end of the text that have to occur in a corpus.",
            "min_prob": "Paths that are less probable by the bucket priors are left out.",
            "lookups": "In vLLM's V1 runner, most requests that look up in one step; they take turns.",
            "device_memory": "In vLLM's V2 runner, MiB of the device's memory for corpora, at 16 bytes per token; "
            "shards that do not fit are left out.",
            "corpora_for": "`all`: a request that names no corpora drafts from all that are open. `asking`: it drafts "
            "from none, for a server that several tenants share, and in `bench`, `verify` and `tune`. `run` drafts "
            "from all.",
            "request_corpora": "Names of corpora that requests may ask for. `null`: those that are open.",
        },
    ),
    "draft_model": (
        "Another model with the target's tokenizer ([how to use it](../how-to/draft-model.md)).",
        {
            "model": "A [model reference](../how-to/models.md): a `.gguf` file for llama.cpp, a checkpoint for vLLM.",
            "max_draft": MODEL_DRAFT,
            "branches": BRANCHES,
            "context": WINDOW,
        },
    ),
    "vocab_trim": (
        "A draft model with a trimmed head ([how to build one](../how-to/trim-a-vocabulary.md)).",
        {
            "model": "`drafter:NAME`, or the drafter's folder.",
            "build": "Arguments of `specplug build vocab-trim`: a missing drafter is built once the user agrees.",
            "max_draft": MODEL_DRAFT,
            "branches": BRANCHES,
            "context": WINDOW,
        },
    ),
    "short_context": (
        "The target's own weights, with a second KV cache that holds a part of the text (RAPID; [when to use "
        "it](../how-to/short-context.md)). On vLLM in the V2 runner only.",
        {
            "first": "Tokens that are kept at the beginning of the text, >= 1.",
            "recent": "Tokens that are kept at its end, >= 32.",
            "retrieved": "Tokens of chunks between them that match the end of the text; a multiple of `chunk`, or 0.",
            "chunk": "Tokens of a chunk, >= 16.",
            "kv_share": "vLLM: the share of the memory that is free once the weights are loaded, which the second "
            "caches of all requests take at most; up to 0.5.",
            "max_draft": MODEL_DRAFT,
            "branches": BRANCHES,
        },
    ),
    "early_exit": (
        "The target's own first layers ([which models](../how-to/early-exit.md)): on llama.cpp files with a trimmed "
        "head, on vLLM's V2 runner the layers of the loaded model. Give `model` or `exits`.",
        {
            "model": "llama.cpp: `drafter:NAME`, or the folder.",
            "exits": "vLLM: the exits, as numbers of layers in ascending order, such as `[4, 8]`.",
            "exit": "`auto` chooses among the exits and plain decoding; a number of layers uses that exit alone.",
            "rule": "llama.cpp: `layers` follows the rules of DEL instead of measured time; for comparisons.",
            "max_draft": MODEL_DRAFT,
            "branches": BRANCHES,
        },
    ),
    "mtp": (
        "The MTP layer of the model's own file, or of a file beside it ([for which models](../how-to/heads.md)). On "
        "vLLM it is vLLM's own method of this name; the options are llama.cpp's.",
        {
            "model": "A GGUF file with the layer, where the model's own lacks it.",
            "head": "A folder or `drafter:NAME` with some rows of the output matrix, which `build vocab-trim` writes.",
            "max_draft": MODEL_DRAFT,
            "branches": BRANCHES,
        },
    ),
    "eagle3": (
        "An EAGLE-3 head that was trained for the model ([for which models](../how-to/heads.md)). On vLLM it is vLLM's "
        "own method of this name. Heads that `build vocab-trim` made are named under `vocab_trim`.",
        {
            "model": "The head: a GGUF file for llama.cpp, a Hugging Face folder or id for vLLM.",
            "max_draft": MODEL_DRAFT,
            "branches": BRANCHES,
        },
    ),
    "builtin": (
        "A method of vLLM's own. Its draft length is `vllm.num_speculative_tokens`.",
        {
            "name": "`suffix` needs the package `arctic-inference`.",
            "model": "Of `draft_model`: a Hugging Face folder or id.",
            "prompt_lookup_min": "Of `ngram`: shortest match.",
            "prompt_lookup_max": "Of `ngram`: longest match.",
        },
    ),
}
"""What a method drafts, and the meanings of its options."""

PROFILE_HEAD = """# Profile keys

A profile is a YAML file with every setting of a run. A command finds it by name or by path (`--profile`):

1. A name is looked up among your own profiles, in the folder that `specplug doctor` prints (`SPECPLUG_PROFILES` names
   another one), and then among the shipped ones (`specplug profiles list`).
2. A reference that ends in `.yaml` or holds a slash is a path.

Keys that are left out have their default. An unknown key is an error that names the nearest valid one.
`specplug profiles validate FILE` checks a file, and `specplug profiles show NAME` prints one with every default written
out. Flags such as `--model` and `--threads` win over the profile.

The shortest useful file:

```yaml
schema: 1
name: mine
model: path/to/some.gguf
proposers: [suffix, token_recycling]
```
"""

COMMANDS_HEAD = """# Commands

Results go to stdout. Progress and messages go to stderr. `--json` prints one JSON document. A flag wins over its
environment variable, the variable over the profile, and the profile over the default. Colours follow `NO_COLOR`.

| exit code | meaning |
|---|---|
| 0 | The command did what was asked. |
| 1 | It failed; the last line says why. |
| 2 | The input is wrong: a flag, a profile, a prompt, a workload or a model file. |
| 3 | `tune`: nothing beats plain decoding. The profile written says `none`. With `--ok-if-plain`, the code is 0. |
| 4 | `verify`: outputs differ by more than rounding. |
| 5 | An engine is missing or cannot do what was asked. |
| 130 | The command was interrupted (Ctrl-C). |
| 141 | The reader of stdout has exited, as `head` does: 128 + SIGPIPE, with no message. |

Two variables have no flag: `SPECPLUG_PROFILES` names the folder of your own profiles, and `SPECPLUG_DEBUG=1` prints the
traceback of an error. `specplug completion` prints the completion script of a shell.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and say which pages are stale")
    check = parser.parse_args().check
    stale = [name for name, text in pages().items() if check and not _is(REFERENCE / name, text)]
    for name in stale:
        print(f"docs/reference/{name} is stale; run python docs/generate.py", file=sys.stderr)
    if not check:
        REFERENCE.mkdir(exist_ok=True)
        for name, text in pages().items():
            (REFERENCE / name).write_text(text, encoding="utf-8")
    return 1 if stale else 0


def pages() -> dict[str, str]:
    """Text of each page by file name."""
    return {"profile-keys.md": profile_page(), "commands.md": commands_page()}


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


# -- profile keys ----------------------------------------------------------------------------------------------------


def profile_page() -> str:
    found = {f"{part}.{field.name}".lstrip(".") for part, (cls, _) in SECTIONS.items() for field in fields(cls)}
    _require_equal("keys", found | {"schema"}, MEANINGS)
    _require_equal("methods", registry.PROPOSERS, METHODS)
    parts = [GENERATED + PROFILE_HEAD]
    for part, (cls, heading) in SECTIONS.items():
        rows = [_key_row(part, field, get_type_hints(cls)[field.name]) for field in fields(cls)]
        if not part:
            rows.insert(0, ["`schema`", f"`{profile.SCHEMA}`", "", MEANINGS["schema"]])
        introduction = [INTRODUCTIONS[part]] if part in INTRODUCTIONS else []
        table = _table(("key", "value", "default", "meaning"), rows)
        parts.append("\n\n".join([f"## {heading}", *introduction, table]))
        if not part:
            parts.append("\n\n".join(["## Methods and their options", *map(_method, METHODS)]))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _key_row(part: str, field: Field[Any], hint: Any) -> list[str]:
    key = f"{part}.{field.name}".lstrip(".")
    default = field.default if field.default is not MISSING else None
    plain = isinstance(default, bool | int | float | str) or (default is None and type(None) in get_args(hint))
    if key == "proposers":
        shown = "`[suffix, token_recycling]`"
        assert profile.loads(_yaml(key, shown.strip("`")), "generate").proposers == default
    else:
        shown = f"`{_literal(default)}`" if plain else ""
    return [f"`{field.name}`", _value(key, hint), shown, MEANINGS[key]]


def _value(key: str, hint: Any) -> str:
    """What the key holds, in words."""
    or_null = ", or `null`" if type(None) in get_args(hint) else ""
    if key in CHOICES:
        assert all(_accepts(key, choice) for choice in CHOICES[key]) and not _accepts(key, "no-such-choice")
        return _alternatives(CHOICES[key]) + or_null
    if hint in (int, int | None) and not key.startswith("measured"):
        low, high = _range(key)
        return f"{low} to {high:,}{or_null}"
    return {"proposers": "list of methods", "measured.batch_curves": "list of cost curves"}.get(key) or _words(hint)


def _range(key: str) -> tuple[int, int]:
    """The smallest and the largest integer that the key takes, found by trying."""
    inside = next(value for value in (1, 16, 64, 1024) if _accepts(key, value))

    def furthest(sign: int) -> int:
        near, far = inside, inside + sign * 2**40
        assert not _accepts(key, far), f"{key} has no limit"
        while abs(far - near) > 1:
            middle = (near + far) // 2
            near, far = (middle, far) if _accepts(key, middle) else (near, middle)
        return near

    return furthest(-1), furthest(1)


def _accepts(key: str, value: object) -> bool:
    try:
        profile.loads(_yaml(key, value), "generate")
    except SpecplugError:
        return False
    return True


def _yaml(key: str, value: object) -> str:
    section, _, name = key.rpartition(".")
    required = REQUIRED.get(section, "")
    line = f"{section}: {{{required}{name}: {value}}}\n" if section else f"{name}: {value}\n"
    beside = "server: {command: [llama-server]}\n" if (key, value) == ("engine", profile.SERVER) else ""
    return f"schema: 1\nname: a\n{line}{beside}"


def _method(name: str) -> str:
    what, meanings = METHODS[name]
    options = registry.options(name)
    _require_equal(f"options of {name}", options, meanings)
    rows = []
    for key, option in options.items():
        default = "required" if option.required else f"`{_literal(option.default)}`"
        rows.append([f"`{key}`", _words(option.hint), default, meanings[key]])
    table = [_table(("option", "value", "default", "meaning"), rows)] if rows else []
    return "\n\n".join([f"### `{name}`", what, *table])


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return ", or ".join("`null`" if arg is type(None) else _words(arg) for arg in args)
    if origin is Literal:
        return _alternatives(args)
    if origin in (list, tuple, Sequence):
        return {str: "list of strings", int: "list of integers"}.get(args[0], "list of lists of numbers")
    if origin is Mapping or hint in [cls for cls, _ in SECTIONS.values()]:
        return "mapping"
    return {bool: "`true` or `false`", int: "integer", float: "number", str: "string"}[hint]


def _alternatives(values: Sequence[str]) -> str:
    *most, last = [f"`{value}`" for value in values]
    return f"{', '.join(most)} or {last}" if most else last


def _literal(value: object) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return '""' if value == "" else "[]" if value == () else str(value)


def _require_equal(what: str, found: Any, written: Any) -> None:
    if set(found) != set(written):
        raise SystemExit(f"docs/generate.py: {what} differ from the code: {sorted(set(found) ^ set(written))}")


# -- commands --------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    context = click.Context(app, info_name="specplug")
    return "\n\n".join([(GENERATED + COMMANDS_HEAD).strip(), *_commands(app, context)]) + "\n"


def _commands(group: click.Group, context: click.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        below = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from _commands(command, below)
        else:
            yield _command(command, below)


def _command(command: click.Command, context: click.Context) -> str:
    arguments = [part for part in command.collect_usage_pieces(context) if part != "[OPTIONS]"]
    rows = [_option_row(option) for option in command.params if isinstance(option, click.Option) and not option.hidden]
    return "\n\n".join(
        [
            f"## `{context.command_path}`",
            f"```\n{' '.join([context.command_path, '[OPTIONS]', *arguments])}\n```",
            *_paragraphs(command.help),
            *([_table(("flag", "variable", "default", "meaning"), rows)] if rows else []),
            *_paragraphs(command.epilog),
        ]
    )


def _paragraphs(text: str | None) -> Iterator[str]:
    """Paragraphs of a help text; those that click is asked not to wrap become code."""
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        lines = paragraph.split("\n")
        if lines[0].strip() == "\b":
            yield "\n".join(["```", *lines[1:], "```"])
        elif paragraph.strip():
            yield _cell(" ".join(line.strip() for line in lines))


def _option_row(option: click.Option) -> list[str]:
    flag = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    if not option.is_flag:
        flag = f"`{max(option.opts, key=len)} {option.metavar or _metavar(option.type)}`"
    variable = f"`{option.envvar}`" if option.envvar else ""
    default = option.default if isinstance(option.default, int | float | str) and not option.is_flag else ""
    meaning = " ".join(filter(None, [option.help, "Required." if option.required else ""]))
    return [_cell(flag), variable, f"`{default}`" if default != "" else "", _cell(meaning)]


def _metavar(kind: Any) -> str:
    if isinstance(kind, click.Choice):
        return "|".join(kind.choices)
    names = {"text": "TEXT", "integer": "N", "integer range": "N", "float": "X", "float range": "X", "file": "FILE"}
    return names.get(kind.name, str(kind.name))


# -- Markdown --------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], *[[row[i] for i in kept] for row in rows]]
    shown = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines]
    return "\n".join([shown[0], "|---" * len(kept) + "|", *shown[1:]])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
