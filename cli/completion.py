"""`specplug completion`: print a shell's completion script. Also the values that options and arguments complete to.

Shells call the program itself for each completion (the protocol is Click's), so no engine is imported here: profiles
are read as text, and models are found by the names of their files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import click
from click.shell_completion import BashComplete, CompletionItem, FishComplete, ShellComplete, ZshComplete

from specplug import profile
from specplug.corpora import folder
from specplug.errors import UsageError
from specplug.models import hub_cache, hub_reference, ollama_store, packaged_models

VARIABLE = "_SPECPLUG_COMPLETE"
"""The variable that Click derives from the program's name."""


class WholeWordBash(BashComplete):
    """Click's completion for bash, with a script that keeps words such as `demo:smollm2` whole.

    Bash splits words at colons, and replaces only the part after the last one.
    """

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' i type value colon_part response words=("${COMP_WORDS[0]}")

    for ((i = 1; i <= COMP_CWORD; i++)); do
        if [[ $COMP_WORDBREAKS == *:* && (${COMP_WORDS[i]} == : || ${words[-1]} == *:) ]]; then
            words[-1]+=${COMP_WORDS[i]}
        else
            words+=("${COMP_WORDS[i]}")
        fi
    done
    colon_part=
    if [[ $COMP_WORDBREAKS == *:* && ${words[-1]} == *:* ]]; then
        colon_part=${words[-1]%%"${words[-1]##*:}"}
    fi

    response=$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) %(complete_var)s=bash_complete "$1")

    for completion in $response; do
        IFS=',' read -r type value <<<"$completion"
        if [[ $type == dir ]]; then
            compopt -o plusdirs
        elif [[ $type == file ]]; then
            compopt -o default
        elif [[ $type == plain ]]; then
            COMPREPLY+=("${value#"$colon_part"}")
        fi
    done
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


SHELLS: dict[str, type[ShellComplete]] = {"bash": WholeWordBash, "zsh": ZshComplete, "fish": FishComplete}


@click.command(epilog="\b\nExample: specplug completion bash")
@click.argument("shell", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    It completes commands, flags, names of profiles, .gguf files and demo models. To use it, add one line to the file
    that your shell reads when it starts:

    \b
    ~/.bashrc                   eval "$(specplug completion bash)"
    ~/.zshrc, after compinit    eval "$(specplug completion zsh)"
    ~/.config/fish/config.fish  specplug completion fish | source
    """
    root = ctx.find_root()
    click.echo(SHELLS[shell](root.command, {}, "specplug", VARIABLE).source(), nl=False)


def corpus_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of corpora."""
    return [CompletionItem(name) for name in folder.names() if name.startswith(incomplete)]


def profile_names(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The usable profiles that begin with `incomplete`; YAML files where it is the beginning of a path."""
    if "/" in incomplete or incomplete.startswith((".", "~")):
        return _files(incomplete, (".yaml", ".yml"))
    return [
        CompletionItem(entry.name, help=entry.description or None)
        for entry in profile.list_profiles()
        if entry.name.startswith(incomplete) and entry.problem is None
    ]


def model_references(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The demo models, the .gguf files and the folders that begin with `incomplete`.

    After `hf:` and `ollama:`, the models that are on this disk. An argument that takes several words names a model in
    the first one only.
    """
    if parameter.nargs == -1 and ctx.params.get(parameter.name or ""):
        return []
    if incomplete.startswith((hub_reference.PREFIX, ollama_store.PREFIX)):
        return [CompletionItem(name) for name in _stored_names(incomplete) if name.startswith(incomplete)]
    demos = [CompletionItem(name) for name in packaged_models.NAMES if name.startswith(incomplete)]
    return demos if incomplete.startswith("demo:") else [*_files(incomplete, (".gguf",)), *demos]


def _stored_names(incomplete: str) -> Sequence[str]:
    """The references of the store that `incomplete` names; none where there is no home folder."""
    try:
        if incomplete.startswith(ollama_store.PREFIX):
            return [model.reference for model in ollama_store.stored() if model.problem is None]
        return [reference for reference, _ in hub_cache.cached_models()]
    except UsageError:
        return []


def _files(incomplete: str, suffixes: tuple[str, ...]) -> list[CompletionItem]:
    """The files with one of the endings, and an item for which the shell adds folders.

    That item comes first: Click's own script for bash forgets the completions before it.
    """
    start = incomplete.rpartition("/")[2]
    typed = incomplete.removesuffix(start)
    names = [name for name in _names(typed) if name.startswith(start) and name.lower().endswith(suffixes)]
    return [CompletionItem(incomplete, type="dir"), *(CompletionItem(typed + name) for name in names)]


def _names(folder: str) -> Sequence[str]:
    """The names in a folder as typed, which may begin with `~`; none where it cannot be read."""
    try:
        return sorted(os.listdir(os.path.expanduser(folder or ".")))
    except OSError:
        return []
