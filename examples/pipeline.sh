#!/bin/sh
# Summarise text files in a shell pipeline: the answers go to stdout, everything else to stderr.
#
#     examples/pipeline.sh notes.txt report.txt > summaries.txt
#
# The variables of specplug apply: SPECPLUG_MODEL (a .gguf file), SPECPLUG_PROFILE, SPECPLUG_MAX_TOKENS.
set -eu

if [ "$#" -eq 0 ]; then
    echo "usage: $0 FILE..." >&2
    exit 2
fi

for file in "$@"; do
    printf '%s: ' "$file"
    { echo "Summarise this text in one sentence."; echo; cat "$file"; } |
        specplug run --stats |
        tr '\n' ' '
    echo
done
