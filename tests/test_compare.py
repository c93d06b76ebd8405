"""The comparisons that `bench` refuses before it opens a model."""

import pytest

from specplug.bench.compare import check
from specplug.errors import SpecplugError, UsageError
from specplug.profile import Profile, Runtime
from specplug.registry import ProposerSpec

PLAIN = Profile("none", proposers=(ProposerSpec("none"),))
REFERENCE = "llama-cpp-python:prompt-lookup"


@pytest.mark.parametrize(
    ("profiles", "reference_engines", "concurrency", "error", "message"),
    [
        (
            [Profile("a", engine="vllm"), Profile("b")],
            [],
            1,
            UsageError,
            "arms on llama-cpp and vllm: a run compares on one engine",
        ),
        (
            [Profile("a", engine="vllm")],
            [REFERENCE],
            1,
            UsageError,
            "runs on llama.cpp only; for vLLM's own methods use a profile",
        ),
        ([Profile("a"), Profile("a")], [], 1, UsageError, "arm a is named twice"),
        ([Profile("a")], [REFERENCE, REFERENCE], 1, UsageError, "is named twice"),
        ([Profile("none")], [], 1, UsageError, "rename the profile"),
        ([Profile("a"), Profile("b", exact=True)], [], 1, UsageError, "profile b: exact changes plain decoding too"),
        ([Profile("a")], ["llama-server"], 1, UsageError, "--peer 'llama-server': unknown; use one of"),
        ([Profile("a")], [REFERENCE], 4, UsageError, "use --concurrency 1"),
    ],
)
def test_impossible_comparisons_are_refused(
    profiles: list[Profile], reference_engines: list[str], concurrency: int, error: type[SpecplugError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(profiles, reference_engines, concurrency, 0.0)


def test_coupled_sampling_cannot_be_compared_with_reference_engines() -> None:
    coupled = Profile("a", runtime=Runtime(coupled=True))
    message = f"profile a: --peer {REFERENCE} has no coupled sampling; use --temperature 0"
    with pytest.raises(UsageError, match=message):
        check([coupled, PLAIN], [REFERENCE], 1, 0.8)
    check([coupled, PLAIN], [REFERENCE], 1, 0.0)
    check([coupled, PLAIN], [], 1, 0.8)
    check([PLAIN, coupled], [REFERENCE], 1, 0.8)  # all arms run with the first profile's settings


def test_possible_comparisons_are_not_refused() -> None:
    check([PLAIN, Profile("a"), Profile("b")], [REFERENCE], 1, 0.0)
    check([PLAIN, Profile("a")], [], 8, 0.8)
    check([Profile("a", engine="vllm"), Profile("b", engine="vllm")], [], 4, 0.0)
    check([Profile("a", exact=True), Profile("b", exact=True)], [], 1, 0.0)
