import os

from hypothesis import settings

# A busy machine is slow without being wrong; in CI every run draws the same examples.
settings.register_profile("specplug", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("specplug")
