"""The tutorial is run as it stands: its files are taken out of the text and used like a stranger's package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "how-to" / "add-a-proposer.md"
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the tutorial's files, installed as pip would leave them."""
    for name, text in FILE.findall(TUTORIAL.read_text(encoding="utf-8")):
        folder = tmp_path / "echo_proposer-1.0.dist-info" if name == "entry_points.txt" else tmp_path
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        if name == "entry_points.txt":
            (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-proposer\nVersion: 1.0\n")
    return tmp_path


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(package), "SPECPLUG_PROFILES": str(package / "none")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=package, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_tutorials_tests_pass(package: Path) -> None:
    done = run(package, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_echo.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_proposer_is_listed_and_its_profile_is_valid(package: Path) -> None:
    listed = run(package, "-c", "from specplug import registry; print(registry.names())")
    assert "'echo'" in listed.stdout, listed.stderr
    done = run(package, "-m", "specplug_cli.main", "profiles", "validate", "echo.yaml")
    assert (done.returncode, done.stdout) == (0, "echo.yaml: valid\n"), done.stderr


def test_its_options_are_checked_by_type_and_by_range(package: Path) -> None:
    (package / "type.yaml").write_text("schema: 1\nname: a\nproposers: [{method: echo, longest: eight}]\n")
    done = run(package, "-m", "specplug_cli.main", "profiles", "validate", "type.yaml")
    assert done.returncode == 2
    assert "proposers[0].longest: 'eight' is not a whole number" in done.stderr
    build = "from specplug.registry import *; build([ProposerSpec('echo', {'longest': 0})])"
    assert "UsageError: proposer echo: longest is 0; use >= 1" in run(package, "-c", build).stderr
