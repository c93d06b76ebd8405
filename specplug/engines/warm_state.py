"""Whether what a profile's proposers were warmed with was made for this model's tokenizer.

Knows profiles and tokenizer hashes. Knows no engine.
"""

from __future__ import annotations

from pathlib import Path

from specplug.errors import UsageError
from specplug.models.references import tokenizer_hash
from specplug.profile import Profile


def check_tokenizer(profile: Profile, model: Path) -> None:
    """UsageError where a proposer's `tokenizer_hash` is not that of the model, a GGUF file or a folder."""
    for spec in profile.proposers:
        made_for = spec.options.get("tokenizer_hash")
        if made_for is not None and made_for != tokenizer_hash(model):
            raise UsageError(
                f"profile {profile.name}: {spec.method}: warm: {spec.options.get('warm')} is of another tokenizer than "
                f"{model}; drop warm, or use one made for this model"
            )
