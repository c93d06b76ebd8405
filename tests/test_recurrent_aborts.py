"""What would end the process in llama.cpp with recurrent memory, tried in child processes.

Each works, or one line says what is wrong.
"""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_architectures import ARCHITECTURES

SPECPLUG = str(Path(sys.executable).with_name("specplug"))

FEW_ROWS = """
import sys
from pathlib import Path
import numpy as np
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.model import open_model
from specplug.profile import Runtime

runtime = Runtime(threads=1, context=256, batch=4, flash_attention=True, kv_type="f16")
with open_model(Path(sys.argv[1]), runtime) as model:
    with open_context(model, runtime, cells=256, num_ids=1, max_rows=3, snapshots=8) as context:
        context.read(np.arange(300, 320, dtype=np.int32))
        context.clear_batch()
        context.add_span([5, 6, 7], 20, 0, wanted=True)
        context.decode()
        context.drop(0, 21)
        print(context.num_batch)
"""


def test_a_batch_has_room_for_the_rows_of_all_snapshots(tmp_path: Path) -> None:
    """llama.cpp aborts in the first pass where n_ubatch <= n_rs_seq + 1."""
    model = ARCHITECTURES["qwen35"](tmp_path / "tiny.gguf")
    done = subprocess.run([sys.executable, "-c", FEW_ROWS, model], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr


@pytest.mark.parametrize("name", ["granitehybrid", "jamba"])
def test_a_file_whose_widths_do_not_fit_is_one_clear_error(tmp_path: Path, name: str) -> None:
    model = ARCHITECTURES[name](tmp_path / "tiny.gguf")
    data, key = bytearray(model.read_bytes()), f"{name}.ssm.inner_size".encode()
    at = data.index(key) + len(key)
    kind, size = struct.unpack_from("<II", data, at)
    assert kind == 4, "not a number of 32 bits"
    struct.pack_into("<I", data, at + 4, size + 32)
    model.write_bytes(data)
    done = subprocess.run(
        [SPECPLUG, "run", "--model", str(model), "--raw", "hello", "--max-tokens", "4", "--threads", "1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("specplug: error:")]
    assert done.returncode in (1, 2, 5) and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
