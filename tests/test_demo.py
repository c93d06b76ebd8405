"""The demo: the choice of the weight format, the plan, the bars, what is said of each outcome, and the replay."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from specplug import profile as profiles
from specplug.bench import demo_format, other_work
from specplug.bench.demo import (
    FEWEST_RUNS,
    FEWEST_TOKENS,
    Comparison,
    Piece,
    Plan,
    Run,
    median_run,
    planned,
    tokens_per_second,
)
from specplug.bench.demo_format import FormatChoice, PassTimes, best_format
from specplug.bench.demo_prompts import PROMPTS
from specplug.bench.other_work import OtherWork
from specplug.bench.statistics import Interval
from specplug.generation.counters import Counters
from specplug.machine import hardware
from specplug.machine.free_cores import FreeCores
from specplug.profile import CostPoints
from specplug_cli.demo_replay import Column, answer_text, frame, play, replay, speed_line
from specplug_cli.demo_result import bar, cells_of_one, gained, packaged_line, result, sentences

SPECPLUG = str(Path(sys.executable).with_name("specplug"))
CHEAP, DEAR = PassTimes((10.0, 15.0, 20.0, 60.0)), PassTimes((10.0, 40.0, 90.0, 160.0))


def answer(seconds: float, tokens: int = 11, *, accepted: int = 0, drafted: int = 0, text: str = "") -> Run:
    """A run with so many tokens, the first of which takes no time."""
    steps = max(1, tokens - 1 - accepted)
    counters = Counters(steps=steps, draft_tokens=drafted, accepted_tokens=accepted, draft_ns=round(seconds * 1e7))
    return Run(list(range(tokens)), seconds, (Piece(0.0, tokens, text, False),), counters)


def compared(plain: float, drafting: float, *, kind: int = 0, accepted: int = 0, drafted: int = 0) -> Comparison:
    """Two equal pairs of runs of 10 tokens, in so many seconds."""
    found = Comparison(PROMPTS[kind])
    found.plain += [answer(plain)] * 2
    found.drafting += [answer(drafting, accepted=accepted, drafted=drafted)] * 2
    return found


# -- the weight format ------------------------------------------------------------------------------------------------


def test_the_gain_is_that_of_the_better_row_count() -> None:
    """With 0.8: 4 rows emit 1 + 0.8 + 0.64 + 0.512 tokens, and 8 rows (1 - 0.8^8) / 0.2; 16 rows less than 5."""
    assert CHEAP.gain == pytest.approx(max(2.952 / 1.5, 4.1611392 / 2.0))
    assert PassTimes((10.0, 15.0, 40.0, 60.0)).gain == pytest.approx(2.952 / 1.5)
    assert DEAR.gain == 1.0, "plain decoding remains"
    assert DEAR.ratio == 4.0


def test_the_format_with_the_largest_gain_is_taken_not_the_fastest() -> None:
    """Milliseconds from docs/lab-book/first-answers.md."""
    times = {
        "q4_1": PassTimes((6.5, 18.2, 28.0, 44.2)),
        "bf16": PassTimes((8.6, 12.9, 17.2, 21.5)),
        "q4_0": PassTimes((4.8, 9.6, 13.4, 17.8)),
    }
    assert best_format(times, "q4_1") == "bf16"


def test_the_packaged_format_is_kept_where_a_copy_gains_hardly_more_or_nothing_gains() -> None:
    assert (
        best_format({"a": PassTimes((10.0, 15.0, 90.0, 160.0)), "b": PassTimes((10.0, 14.5, 90.0, 160.0))}, "a") == "a"
    )
    assert best_format({"a": DEAR, "b": PassTimes((9.0, 45.0, 90.0, 160.0))}, "a") == "a"


def test_the_reason_names_the_measured_cost_of_every_format() -> None:
    choice = FormatChoice("bf16", Path("b.gguf"), "q4_1", {"q4_1": DEAR, "bf16": CHEAP}, frozenset(("q4_1", "bf16")))
    assert choice.why.endswith(
        "gains most in bf16 on this machine: a pass over 4 tokens costs 1.50 times a pass over one (q4_1 4.00)"
    )
    kept = replace(choice, name="q4_1", times={"q4_1": DEAR, "bf16": DEAR})
    assert kept.why.startswith("drafting pays in no weight format of this model on this machine: ")
    assert replace(choice, name="q4_1").why.startswith(
        "drafting gains clearly more in no other weight format of this model on this "
    )
    assert replace(choice, fresh=frozenset()).now(CHEAP).why.endswith("one (q4_1 4.00, measured earlier)")
    assert replace(kept, times={"q4_1": DEAR}).why == (
        "no other weight format of this model could be tried: a pass over 4 tokens costs 4.00 times a pass over one"
    )


def test_costs_go_on_with_the_time_per_row_of_the_longest_pass() -> None:
    """24 rows take 24 / 16 of 60 ms."""
    assert CHEAP.cost_points(24) == CostPoints((128,), (1, 4, 8, 16, 24), ((10.0, 15.0, 20.0, 60.0, 90.0),))
    assert CHEAP.cost_points(16) == CHEAP.cost_points(5) == CostPoints((128,), (1, 4, 8, 16), (CHEAP.ms,))


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_fast_model_answers_at_full_length_five_times() -> None:
    assert planned(60.0, 0.005, replays=True) == Plan(128, 5)
    assert planned(60.0, 0.005, replays=True, most_tokens=16) == Plan(16, 5)


def test_a_slower_model_gives_fewer_tokens_before_fewer_runs() -> None:
    """Answers have 1, 0.75 and 0.5 of the longest length: 2.25 in all. Three runs of two arms with 10% of slack and
    one replay are 17.1 lengths, two runs 12.15."""
    assert planned(60.0, 0.03, replays=True) == Plan(116, 3)
    assert planned(60.0, 0.06, replays=True) == Plan(82, 2), "three runs would have 58 tokens only"
    assert planned(60.0, 0.04, replays=False) == Plan(101, 3), "14.85 lengths"
    assert planned(60.0, 0.03, replays=True, further=1) == Plan(98, 3), "20.4 lengths"
    assert planned(60.0, 0.025, reading_seconds=1.0, replays=False) == Plan(113, 3), "42 s remain"
    assert planned(60.0, 0.5, replays=True) == Plan(FEWEST_TOKENS, FEWEST_RUNS)
    assert planned(-5.0, 0.5, replays=True) == Plan(FEWEST_TOKENS, FEWEST_RUNS)


def test_text_with_little_to_draft_gets_shorter_answers() -> None:
    assert [Plan(100, 2).tokens(prompt) for prompt in PROMPTS] == [100, 75, 50]


@given(st.floats(5, 80), st.floats(0.001, 1), st.floats(0, 3), st.booleans(), st.integers(0, 1), st.integers(2, 128))
def test_a_plan_fits_into_its_time_or_is_the_smallest(
    seconds: float, token_seconds: float, reading: float, replays: bool, further: int, most: int
) -> None:
    found = planned(seconds, token_seconds, reading_seconds=reading, replays=replays, further=further, most_tokens=most)
    longest = found.max_tokens * token_seconds
    needed = found.runs * ((6 + further) * reading + (4.5 + further) * 1.1 * longest) + 2.25 * replays * longest
    assert needed <= seconds * (1 + 1e-9) or found == Plan(min(most, FEWEST_TOKENS), FEWEST_RUNS)
    assert found.max_tokens <= most and FEWEST_RUNS <= found.runs <= 5


# -- the figures of a prompt ------------------------------------------------------------------------------------------


def test_the_speedup_compares_tokens_per_second() -> None:
    assert compared(2.0, 1.0).speedup == Interval(2.0, 2.0, 2.0)
    found = Comparison(PROMPTS[0], [answer(1.0, 11)], [answer(1.0, 21)])
    assert found.speedup == Interval(2.0, 2.0, 2.0)
    assert not found.same_output and compared(2.0, 1.0).same_output
    assert Comparison(PROMPTS[0], [answer(0.0, 1)], [answer(0.0, 1)]).speedup is None


def test_the_median_run_is_by_speed() -> None:
    runs = [answer(3.0), answer(1.0), answer(2.0)]
    assert median_run(runs).seconds == 2.0
    assert median_run(runs[:2]).seconds == 1.0
    assert tokens_per_second(runs[2]) == 5.0 and tokens_per_second(answer(0.0, 1)) == 0.0


# -- the result -------------------------------------------------------------------------------------------------------


def test_a_bar_has_a_mark_after_the_characters_of_one() -> None:
    assert bar(1.0, 8) == "████████│"
    assert bar(1.5, 8) == "████████│███"
    assert bar(0.5, 8) == "████    │"
    assert bar(1.6875, 8) == "████████│████▌", "13.5 characters"
    assert bar(0.9, 4) == "███▋│", "3.6 characters are 29 eighths, so 5 of the last one"
    assert bar(0.0, 4) == "    │"
    assert bar(1.5, 4, ascii_only=True) == "####|#"


def test_bars_fit_beside_their_figures() -> None:
    assert cells_of_one(1.66, 40) == 16
    assert cells_of_one(5.0, 40) == 8
    assert cells_of_one(0.9, 10) == 10
    assert cells_of_one(20.0, 40) == 4


def printed(comparisons: list[Comparison]) -> str:
    console = Console(width=100, file=StringIO(), highlight=False)
    with console.capture() as capture:
        console.print(result(console, comparisons))
    return capture.get()


def test_the_result_has_a_bar_with_its_figures_for_each_prompt() -> None:
    other = compared(1.0, 0.8, kind=1)
    other.drafting[1] = answer(0.88, 12)
    lines = [line.rstrip() for line in printed([compared(2.0, 1.0, accepted=5, drafted=9), other]).splitlines()]
    assert lines[0] == " " * 11 + " " * 16 + "│ 1.00, plain decoding"
    assert lines[1] == "code edit  " + "█" * 16 + "│" + "█" * 15 + " 2.00 times (2.00-2.00), same output"
    assert lines[2].strip() == "10.0 instead of 5.0 tokens/s, 2.00 tokens per pass, 5 draft tokens accepted"
    assert lines[3].startswith("summary    ") and lines[3].endswith(", other output")
    assert said(other)[-1] == "The output of summary differs by rounding or more: specplug verify explains it."


def said(*found: Comparison, times: PassTimes = CHEAP) -> list[str]:
    return sentences(found, times)


def test_free_text_that_is_as_fast_has_little_to_draft() -> None:
    gain = compared(2.0, 1.0, accepted=5, drafted=6)
    lines = said(gain, compared(1.0, 1.01, kind=2, accepted=1, drafted=3))
    assert len(lines) == 1
    assert lines[0].startswith("Free text stays near 1.00, because hardly any of its tokens occur earlier")
    assert "1 of its 10 tokens came from drafts" in lines[0]
    (line,) = said(gain, compared(1.0, 1.01, kind=2, accepted=3, drafted=9))
    assert "hardly any" not in line and "3 of its 10 tokens came from drafts, which hardly paid for" in line


def test_free_text_that_lost_says_how_much_and_on_what() -> None:
    """1 / 1.0638 is 0.94. Planning took a hundredth of the time."""
    lines = said(compared(2.0, 1.0, accepted=5, drafted=6), compared(1.0, 1.0638, kind=2, accepted=1, drafted=7))
    assert len(lines) == 1 and lines[0].startswith("Free text lost 6%: ")
    assert "took 1.0% of the time, and 6 of 7 draft tokens were verified in vain." in lines[0]
    assert "no draft token was verified" in said(compared(1.0, 1.1, kind=2))[-1]


def test_free_text_that_gained_is_said_to() -> None:
    lines = said(compared(1.2, 1.0, kind=2, accepted=4, drafted=6))
    assert lines == ["Free text gained 20%: 4 of its 10 tokens came from drafts."]
    assert "Free text differs from 1.00 by variation only" in said(compared(1.2, 1.0, kind=2))[-1]


def test_a_loss_within_the_variation_between_runs_is_said_to_be() -> None:
    """One pair lost a fifth and the other gained a tenth: 20 tokens in 2.15 s against 2 s, 0.93."""
    found = Comparison(PROMPTS[2], [answer(1.0), answer(1.0)], [answer(1.25), answer(0.9)])
    assert said(compared(2.0, 1.0, accepted=5, drafted=6), found)[-1].endswith("The runs vary by more than that.")


def test_where_nothing_gained_the_cost_of_passes_is_named() -> None:
    lines = said(compared(1.0, 1.0, accepted=2, drafted=4), compared(1.0, 1.25, kind=1, drafted=4), times=DEAR)
    assert lines[0].startswith("Nothing gained with this model on this machine: a pass over 4 tokens costs 4.00 times ")
    assert lines[0].endswith("The answers had at most 1.25 tokens per pass."), "8 passes gave 10 tokens"
    assert lines[1].startswith("Summary lost 20%: ") and len(lines) == 2


def test_other_work_meanwhile_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a quarter of the cores."""
    monkeypatch.setattr(hardware, "usable_cores", lambda: 2)
    busy, free = compared(2.0, 1.0, accepted=5, drafted=6), compared(2.0, 1.0, kind=1, accepted=5, drafted=6)
    busy.busy_cores = 0.5
    assert said(busy, free) == []
    busy.busy_cores = 0.8
    assert said(busy, free)[0].startswith("Other programs kept 0.8 of 2 cores busy meanwhile")


def test_other_work_is_what_is_neither_idle_nor_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10 s two CPUs gave this process 12 s and were idle for 3 s, so others had 5 s: half a CPU, which is a
    quarter of a core where a core has two CPUs."""
    monkeypatch.setattr(other_work, "allowed_cpus", lambda: {0, 1})
    for share, cores in ((1.0, 0.5), (0.5, 0.25)):
        clock, own, idle = (iter(values) for values in ((0.0, 10.0), (0.0, 12.0), (0.0, 3.0)))
        monkeypatch.setattr(other_work, "core_limit", lambda share=share: SimpleNamespace(share=share))
        times = {"clock": clock.__next__, "own_seconds": own.__next__, "idle_seconds": idle.__next__}
        assert OtherWork(FreeCores(**times, waiting=lambda: 0)).cores() == pytest.approx(cores)


def test_a_gain_has_to_be_larger_than_the_variation() -> None:
    found = compared(2.0, 1.0, accepted=1, drafted=1)
    assert gained(found, Interval(1.1, 1.05, 1.2))
    assert not gained(found, Interval(1.1, 0.9, 1.3)) and not gained(found, Interval(1.02, 1.01, 1.03))
    assert not gained(compared(2.0, 1.0), Interval(1.1, 1.05, 1.2)), "no draft token was accepted"


def test_a_copy_is_not_said_to_be_the_fastest_format() -> None:
    """The copy gives 5 tokens/s, and 10 with drafts."""
    found = compared(2.0, 1.0)
    found.packaged += [answer(1.25)] * 2
    assert "packaged q4_1 file gave 8.0 tokens/s" in packaged_line(found, "bf16", "q4_1")
    assert "not the fastest format of this model for plain decoding" in packaged_line(found, "bf16", "q4_1")
    found.packaged[:] = [answer(0.5)] * 2
    assert "not the fastest format of this model even with specplug" in packaged_line(found, "bf16", "q4_1")
    found.packaged[:] = [answer(4.0)] * 2
    assert "not the fastest" not in packaged_line(found, "bf16", "q4_1")


# -- the replay -------------------------------------------------------------------------------------------------------

PIECES = (Piece(0.0, 1, "one ", False), Piece(0.5, 3, "two\x1b[2J three ", True), Piece(1.0, 4, "four\r\n", False))
RUN = Run([0, 1, 2, 3, 4], 1.25, PIECES, Counters())


class Clock:
    """Passes only while something sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_replay_draws_twenty_times_a_second_and_at_the_end() -> None:
    clock, shown = Clock(), list[float]()
    play(0.12, shown.append, clock=clock, sleep=clock.sleep)
    assert shown == pytest.approx([0.0, 0.05, 0.10, 0.12])


def test_text_appears_when_it_was_generated_without_control_characters() -> None:
    assert answer_text(RUN, 0.49, coloured=True).plain == "one "
    assert answer_text(RUN, 0.5, coloured=True).plain == "one two[2J three "
    assert answer_text(RUN, None, coloured=True).plain == "one two[2J three four\n"


@pytest.mark.parametrize(("coloured", "style"), [(True, "bold green"), (False, "underline")])
def test_accepted_draft_tokens_are_marked_with_and_without_colours(coloured: bool, style: str) -> None:
    (span,) = answer_text(RUN, None, coloured=coloured).spans
    assert (span.start, span.end, str(span.style)) == (4, 17, style)


def test_the_speed_is_that_until_now_and_at_the_end_of_the_run() -> None:
    assert speed_line(RUN, 0.0) == "..."
    assert speed_line(RUN, 0.5) == "4.0 tokens/s", "two tokens after the first"
    assert speed_line(RUN, 1.2) == "2.5 tokens/s"
    assert speed_line(RUN, 1.25) == speed_line(RUN, None) == "3.2 tokens/s, 1.2 s"


def test_answers_are_side_by_side_where_the_terminal_is_wide_enough() -> None:
    columns = [Column("plain decoding", RUN), Column("specplug", RUN)]
    for width, together in ((60, True), (59, False)):
        console = Console(width=width, height=24, force_terminal=True, color_system=None)
        with console.capture() as capture:
            console.print(frame(console, columns, None))
        first = capture.get().splitlines()[0]
        assert ("plain decoding" in first and "specplug" in first) == together


def test_a_replay_shows_the_last_lines_that_fit() -> None:
    run = Run([0, 1], 1.0, (Piece(0.0, 1, "".join(f"{n}\n" for n in range(40)) + "end", False),), Counters())
    console = Console(width=80, height=12, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(frame(console, [Column("a", run), Column("b", run)], 0.5))
    lines = [line.split()[0] for line in capture.get().splitlines()]
    assert lines == ["a", *(str(n) for n in range(33, 40)), "end", "..."], "8 of 12 lines"


def test_a_replay_ends_with_the_complete_answers() -> None:
    clock = Clock()
    console = Console(width=80, height=12, force_terminal=True, color_system=None)
    with console.capture() as capture:
        replay(console, [Column("a", RUN), Column("b", RUN)], clock=clock, sleep=clock.sleep)
    assert clock.now == pytest.approx(101.25)
    lines = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", capture.get()).split("\n")
    assert [line.split() for line in lines if line.strip()][-1] == ["3.2", "tokens/s,", "1.2", "s"] * 2


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPECPLUG_")]:
        monkeypatch.delenv(name)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("clean_environment")
@pytest.mark.parametrize(("name", "message"), [("none", "drafts nothing"), ("vllm", "runs on vllm")])
def test_profiles_that_show_nothing_are_refused(name: str, message: str) -> None:
    done = subprocess.run([SPECPLUG, "demo", "--profile", name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr


@pytest.mark.llama
def test_the_choice_of_the_format_is_remembered(
    demo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    measured = list[list[str]]()

    def invented(models: dict[str, object], profile: object) -> dict[str, PassTimes]:
        measured.append(list(models))
        return {name: CHEAP if name == "q4_0" else DEAR for name in models}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo_format, "pass_times", invented)
    monkeypatch.setattr(demo_format, "COPIES", ("q4_0",))
    profile = profiles.load("default")
    first = demo_format.chosen_format(demo_path, profile)
    assert measured == [["q4_1", "q4_0"]]
    assert (first.name, first.packaged) == ("q4_0", "q4_1")
    assert first.path.is_file() and first.path.is_relative_to(tmp_path)
    first.path.unlink()
    assert demo_format.chosen_format(demo_path, profile) == replace(first, fresh=frozenset()) and first.path.is_file()
    assert len(measured) == 1
    (kept,) = (path for path in tmp_path.rglob("*.json") if path.parent.name == demo_format.FOLDER)
    demo_format.chosen_format(demo_path, profile, again=True)
    assert len(measured) == 2
    kept.write_text('{"schema": 1, "packaged": "q4_1", "ms": {"q4_1": [1, 0, 1, 1]}}')
    assert demo_format.chosen_format(demo_path, profile) == first and len(measured) == 3


@pytest.mark.llama
@pytest.mark.usefixtures("clean_environment")
def test_the_demo_as_json_compares_three_prompts() -> None:
    pytest.importorskip("llama_cpp")
    command = [SPECPLUG, "demo", "--model", "demo:smollm2", "--max-tokens", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["model"], document["format"]) == (1, "demo:smollm2", "q4_1")
    assert document["packaged_plain"] is None and document["max_tokens"] == 4
    assert document["pass_ms"]["1"] > 0 and set(document["pass_ms"]) == {"1", "4", "8", "16"}
    assert [one["kind"] for one in document["prompts"]] == ["code edit", "summary", "free text"]
    for one in document["prompts"]:
        assert set(one["speedup"]) == {"median", "low", "high"} and isinstance(one["same_output"], bool)
        lengths = {"code edit": 4, "summary": 3, "free text": 2}
        for arm in (one["plain"], one["drafting"]):
            assert FEWEST_RUNS <= len(arm["seconds"]) <= document["runs"]
            assert arm["tokens"] == lengths[one["kind"]] and arm["text"] and arm["tokens_per_second"] > 0
        assert one["plain"]["draft_tokens"] == 0 and one["plain"]["steps"] == lengths[one["kind"]] - 1


def on_a_terminal(command: list[str], interrupt_at: bytes | None = None) -> tuple[int, bytes]:
    """The exit code and the output of a command on a terminal of 80 columns; Ctrl-C once it has printed that text."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"})
    output, deadline = b"", time.monotonic() + 300
    while time.monotonic() < deadline:
        if not select.select([descriptor], [], [], 1)[0]:
            continue
        try:
            output += os.read(descriptor, 1 << 16)
        except OSError:  # the command has ended
            break
        if interrupt_at is not None and interrupt_at in output:
            os.write(descriptor, b"\x03")
            interrupt_at = None
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


@pytest.mark.llama
@pytest.mark.usefixtures("clean_environment")
def test_the_demo_replays_its_answers_on_a_terminal() -> None:
    pytest.importorskip("llama_cpp")
    code, output = on_a_terminal([SPECPLUG, "demo", "--model", "demo:smollm2", "--max-tokens", "4"])
    assert code == 0
    text = output.decode()
    assert "recordings of the runs measured just now" in " ".join(text.split())
    assert "plain decoding" in text and "specplug, default" in text and "1.00, plain decoding" in text
    assert text.rstrip().endswith("--out mine")


@pytest.mark.llama
@pytest.mark.usefixtures("clean_environment")
def test_ctrl_c_ends_a_replay() -> None:
    pytest.importorskip("llama_cpp")
    command = [SPECPLUG, "demo", "--model", "demo:smollm2", "--max-tokens", "8"]
    code, output = on_a_terminal(command, interrupt_at=b"specplug, default")
    assert code == 130
    assert output.rstrip().endswith(b"specplug: interrupted")
