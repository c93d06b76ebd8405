"""Converts a GGUF file (by default the demo model) to a Hugging Face checkpoint, for engines that load no GGUF.

    python benchmarks/make_checkpoint.py OUT_DIR [--source FILE] [--dtype float32]

Prints the folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specplug.models.references import resolve
from specplug.transforms.dequantise import DTYPES, dequantise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", default="demo:smollm2", help="a .gguf path or a demo model")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args()
    dequantise(resolve(args.source), args.out, args.dtype)
    print(args.out)


if __name__ == "__main__":
    main()
