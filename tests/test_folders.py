"""The user's folders: where they are, and what happens where there are none or they cannot be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specplug import profile
from specplug.errors import SpecplugError, UsageError
from specplug.machine import folders
from specplug.machine.files import keep, write_atomically
from specplug.models import drafter_folders, references

NO_HOME = ["env", "-u", "HOME", *(f"-uXDG_{name}_HOME" for name in ("CACHE", "CONFIG", "DATA", "STATE"))]
STRANGER = [*NO_HOME, "setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
ROOT = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")


def as_stranger(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python without a home and with a user id that the system does not know, in a folder that it may write to."""
    folder.chmod(0o777)
    if subprocess.run([*STRANGER, sys.executable, "-c", "import specplug.errors"], capture_output=True).returncode:
        pytest.skip("other users cannot read Python or the checkout")
    command = [*STRANGER, sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)


def test_the_folders_follow_the_variables_of_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.cache_folder() == tmp_path / "cache" / "specplug"
    others = [folders.config_folder(), folders.data_folder(), folders.state_folder()]
    assert all(folder.name == "specplug" for folder in others) and not any(folder.exists() for folder in others)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.expanded("~/a") == tmp_path / "a" and folders.expanded("a~") == Path("a~")


@pytest.mark.parametrize(
    "use", [references.resolve, profile.load, drafter_folders.place, folders.expanded], ids=lambda use: use.__name__
)
def test_an_unknown_home_is_one_line(use: object) -> None:
    assert callable(use)
    with pytest.raises(UsageError, match=r"^~nobody-has-this-name/a\.yaml: ~ cannot be expanded: no home directory"):
        use("~nobody-has-this-name/a.yaml")


@ROOT
def test_without_a_home_nothing_is_found_and_nothing_is_kept(tmp_path: Path) -> None:
    program = """
from pathlib import Path
from specplug import profile
from specplug.machine import folders
from specplug.machine.files import keep, write_atomically
from specplug.machine.remembered import measurement_path
assert [listed.source for listed in profile.list_profiles() if listed.source != "shipped"] == []
for name in ("a", "b"):
    path = folders.cache_folder() / name
    keep(path, b"x")
    assert not path.exists() and not path.is_file()
try:
    profile.save(profile.load("default"), profile.user_folder() / "mine.yaml")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = as_stranger(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SpecplugError ") and done.stdout.endswith(
        "mine.yaml: cannot be written (there is no home directory that can be used; set HOME); nothing was changed\n"
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith("specplug: nothing is kept (there is no home directory that can be used; set HOME)")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    for path in (tmp_path / "specplug", other):
        path.write_text("a file, where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("a", "b"):
        keep(folders.cache_folder() / name / "c", b"x")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"specplug: {tmp_path / 'specplug' / 'a' / 'c'}: cannot be written (")
    assert line.endswith("; what is measured now is measured again next time")
    with pytest.raises(SpecplugError, match="cannot be written"):
        write_atomically(other / "mine.yaml", b"x")


@ROOT
def test_a_home_that_cannot_be_entered_is_none(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    program = f"""
import os
os.environ["HOME"] = {str(home)!r}
from specplug import profile
from specplug.machine import folders
print(folders.config_folder() == folders.NOWHERE / "config", profile.load("default").name)
"""
    done = as_stranger(program, tmp_path)
    assert (done.returncode, done.stdout) == (0, "True default\n"), done.stderr
