"""Converts a GGUF file (by default the demo model) to other weight formats.

    python benchmarks/make_formats.py OUT_DIR [--source FILE] [--formats f32 bf16 q8_0 q4_0]

Prints the path of every file it writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specplug.models.references import resolve
from specplug.transforms.requantise import FORMATS, requantise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default="demo:smollm2", help="a .gguf path or a demo model")
    parser.add_argument("--formats", nargs="+", choices=sorted(FORMATS), default=["f32", "bf16", "q8_0", "q4_0"])
    args = parser.parse_args()
    source = resolve(args.source)
    stem = args.source.removeprefix("demo:") if args.source.startswith("demo:") else source.stem
    for fmt in args.formats:
        print(requantise(source, args.out / f"{stem}-{fmt}.gguf", fmt))


if __name__ == "__main__":
    main()
