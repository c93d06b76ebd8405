"""Building a drafter from the demo model, with llama.cpp."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from specplug.build.llama_cpp import GgufSource
from specplug.engines.llama_cpp.context import open_context
from specplug.engines.llama_cpp.model import open_model
from specplug.tune.trace import Answer


@pytest.mark.llama
def test_expected_counts_are_the_sums_of_the_targets_probabilities(demo_path: Path) -> None:
    """The same sums from passes of one row each differ only by the rounding of other pass shapes."""
    source = GgufSource(demo_path, demo_path, quantize=None, threads=2)
    prompt, tokens = source.tokenize(["The capital of France", " is Paris, and that of Spain is Madrid."])
    answer = Answer("p", 0, "any", prompt, tokens, np.zeros((len(tokens) - 1, 0), dtype=np.int32))
    found = source.expected_counts([answer], lambda share: None)
    source.close()
    expected = np.zeros_like(found)
    text = np.concatenate((prompt, tokens))
    with (
        open_model(demo_path) as model,
        open_context(model, source.profile.runtime, cells=256, num_ids=1, max_rows=1) as context,
    ):
        for position, token in enumerate(text[:-1].tolist()):
            context.clear_batch()
            context.add(token, position, (0,))
            context.decode()
            if position >= len(prompt) - 1:
                likelihoods = np.exp(context.logits(1)[0].astype(np.float64))
                expected += likelihoods / likelihoods.sum()
    assert found.sum() == pytest.approx(len(tokens), rel=1e-5)
    assert np.abs(found - expected).max() < 0.02 < expected.max()
