"""The documents: the code of a guide runs, links lead to files, and generated pages are not stale."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from specplug_cli.diagnosis import WHEELS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = ROOT / "docs" / "how-to" / "add-a-proposer.md"
FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the guide's files, installed as pip would leave them."""
    for name, text in FILE.findall(GUIDE.read_text(encoding="utf-8")):
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


def test_the_guides_tests_pass(package: Path) -> None:
    done = run(package, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_echo.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_guides_proposer_is_listed_and_its_profile_is_valid(package: Path) -> None:
    listed = run(package, "-c", "from specplug import registry; print(registry.names())")
    assert "'echo'" in listed.stdout, listed.stderr
    done = run(package, "-m", "specplug_cli.main", "profiles", "validate", "echo.yaml")
    assert (done.returncode, done.stdout) == (0, "echo.yaml: valid\n"), done.stderr


def test_the_guides_options_are_checked_by_type_and_by_range(package: Path) -> None:
    (package / "type.yaml").write_text("schema: 1\nname: a\nproposers: [{method: echo, longest: eight}]\n")
    done = run(package, "-m", "specplug_cli.main", "profiles", "validate", "type.yaml")
    assert done.returncode == 2
    assert "proposers[0].longest: 'eight' is not a whole number" in done.stderr
    build = "from specplug.registry import *; build([ProposerSpec('echo', {'longest': 0})])"
    assert "UsageError: proposer echo: longest is 0; use >= 1" in run(package, "-c", build).stderr


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The page without code blocks, in which a bracket is no link and a hash no heading."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page ends in, as GitHub makes it from the heading's text."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The relative links of a page, pictures included, that lead to no file or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    """Without this, a pattern that finds no link would make the test above pass."""
    (tmp_path / "other.md").write_text("# A `code` heading, twice\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#a-code-heading-twice) [b](missing.md) ![c](missing.svg) [d](other.md#missing) [e](#here)\n"
        "[f](https://example.org/missing)\n```\n[g](missing)\n# Here\n```\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["missing.md", "missing.svg", "other.md#missing", "#here"]


def test_every_page_of_docs_is_reached_from_the_index() -> None:
    """From docs/README.md, over any number of links."""
    reached, waiting = set[Path](), [ROOT / "docs" / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.is_file():
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)", prose(page))
        waiting += [(page.parent / link).resolve() for link in links if "://" not in link]
    assert [relative(page) for page in PAGES[1:] if page not in reached] == []


@pytest.mark.parametrize("page", [page for page in PAGES if "lab-book" not in page.parts], ids=relative)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    """`folder/name.py` or `name.py` in running text is a file of this repository; the lab book may name older ones."""
    folders = ("specplug", "cli", "benchmarks", "tests", "docs", "scripts")
    known = {"/" + relative(file) for folder in folders for file in (ROOT / folder).rglob("*.py")}
    named = set(re.findall(r"`([\w./]+\.py)`", prose(page)))
    foreign = {"echo_proposer.py", "specplug/proposers/echo.py", "v1/worker/gpu/model_runner.py"}
    assert {name for name in named - foreign if not any(path.endswith(f"/{name}") for path in known)} == set()


def test_the_generated_reference_is_not_stale() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def readme_commands() -> list[list[str]]:
    """The lines of each block of commands in the README, without comments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [[line.split(" #")[0].strip() for line in block.splitlines()] for block in blocks]


def test_the_make_commands_of_the_readme_begin_with_the_demo_and_the_tests() -> None:
    made = next(lines for lines in readme_commands() if lines[0].startswith("make"))
    assert made[:2] == ["make demo", "make test"]


def test_the_first_command_of_the_readme_needs_no_compiler() -> None:
    """It takes a wheel, from the index that `specplug doctor` names, or fails."""
    first = readme_commands()[0][0]
    assert first.startswith("pip install -e ") and "--only-binary llama-cpp-python" in first
    assert f"--extra-index-url {WHEELS}cpu" in first


def test_the_page_on_installing_names_every_folder_that_is_kept() -> None:
    page = (ROOT / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in ("~/.cache/specplug", "~/.config/specplug", "~/.local/share/specplug", "~/.local/state/specplug"):
        assert f"`{folder}`" in page and folder in readme
