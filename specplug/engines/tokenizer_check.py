"""The check that saved proposer state (option `warm`) and corpora fit the tokenizer of the model. It depends on no
engine."""

from __future__ import annotations

from pathlib import Path

from specplug.errors import UsageError
from specplug.models.corpus_fit import check_fits
from specplug.models.references import tokenizer_hash
from specplug.profile import Profile
from specplug.profile.with_corpora import corpora_of


def check_tokenizer(profile: Profile, model: Path) -> None:
    """UsageError where the `tokenizer_hash` of a proposer or a corpus is not that of `model`, a GGUF file or a
    folder."""
    for spec in profile.proposers:
        made_for = spec.options.get("tokenizer_hash")
        if made_for is not None and made_for != tokenizer_hash(model):
            raise UsageError(
                f"profile {profile.name}: {spec.method}: warm: {spec.options.get('warm')} was made with a tokenizer "
                f"other than that of {model}; drop warm, or use state made with this model"
            )
    for ref in corpora_of(profile):
        check_fits(ref, model)
