"""CMake and Bazel build the same: what each compiles into the two modules."""

import ast
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).absolute().parent.parent
# By the rules of cuda/BUILD.bazel that they are linked from.
MODULES = {"_extension": "extension", "_interpreter": "interpreter_module"}
# CMake's library that is in both.
SHARED = "handlers"


@pytest.fixture(scope="module")
def cmake_folder(tmp_path_factory) -> pathlib.Path:
    """What CMake has configured."""
    folder = tmp_path_factory.mktemp("cmake")
    subprocess.run(
        [
            "cmake",
            *("-S", ROOT, "-B", folder, "-G", "Unix Makefiles"),
            "-DSKBUILD=1",
            "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        check=True,
        capture_output=True,
        env=os.environ | {"PATH": f"{_programs()}{os.pathsep}{os.environ['PATH']}"},
    )
    return folder


@pytest.fixture(scope="module")
def cmake(cmake_folder) -> dict[str, dict[str, str]]:
    """{target: {source below cuda/: command}}, asked of CMake itself."""
    targets = {name: {} for name in (*MODULES, SHARED)}
    for entry in json.loads((cmake_folder / "compile_commands.json").read_text()):
        # CMakeFiles/_extension.dir/cuda/ffi/module.cc.o
        _, target, *path = pathlib.PurePath(entry["output"]).with_suffix("").parts
        if path[0] == "cuda":
            targets[target.removesuffix(".dir")]["/".join(path[1:])] = entry["command"]
    return targets


def _programs() -> str:
    import cmake

    return cmake.CMAKE_BIN_DIR


def lists() -> dict[str, list[str]]:
    """The lists of cuda/sources.bzl."""
    tree = ast.parse((ROOT / "cuda" / "sources.bzl").read_text())
    return {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in tree.body
        if isinstance(statement, ast.Assign)
    }


def rules() -> dict[str, dict]:
    """The rules of cuda/BUILD.bazel, which is Python but for what Bazel defines."""
    found = {}

    def rule(name="", **attributes):
        found[name] = attributes

    names = {"glob": lambda *_, **__: [], "load": rule_less, "package": rule_less}
    names |= dict.fromkeys(("cc_library", "filegroup"), rule)
    names |= dict.fromkeys(("exports_files", "genrule"), rule_less) | lists()
    exec((ROOT / "cuda" / "BUILD.bazel").read_text(), names)
    return found


def rule_less(*_, **__):
    pass


def bazel(module: str) -> dict[str, set[str]]:
    """{source: definitions} of a module, those of its libraries included."""
    known = rules()

    def visit(rule: str) -> tuple[dict[str, set[str]], set[str]]:
        attributes = known[rule]
        sources, defines = {}, set(attributes.get("defines", ()))
        for name in attributes.get("deps", ()):
            if name[0] != ":":
                continue
            below, defined = visit(name[1:])
            sources |= below
            defines |= defined
        own = [name for name in attributes.get("srcs", ()) if name.endswith(".cc")]
        return sources | dict.fromkeys(own, defines), defines

    return visit(MODULES[module])[0]


@pytest.mark.parametrize("module", MODULES)
def test_both_compile_the_same(module, cmake):
    sources = bazel(module)
    commands = cmake[module] | cmake[SHARED]
    assert len(sources) > 10
    assert sources.keys() == commands.keys()
    for source, command in commands.items():
        given = {word[2:] for word in command.split() if word.startswith("-DTK_")}
        assert given == sources[source], source


def test_nothing_is_compiled_twice(cmake):
    paths = [path for commands in cmake.values() for path in commands]
    assert len(paths) == len(set(paths))


def test_every_source_is_in_one_list():
    listed = [path for paths in lists().values() for path in paths]
    assert len(listed) == len(set(listed))
    headers = lists()["HOST_HEADERS"]
    found = {
        path.relative_to(ROOT / "cuda").as_posix()
        for path in (ROOT / "cuda").rglob("*.cc")
    }
    assert found | set(headers) == set(listed)
    assert all(paths == sorted(paths) for paths in lists().values())


def includes(path: pathlib.Path) -> set[str]:
    """The device headers that a file includes, and that those include."""
    names = re.findall(r'^#include "((?:kernels|tk)/.*)"', path.read_text(), re.M)
    below = {f"include/{x}" if x.startswith("tk/") else x for x in names}
    return below.union(*(includes(ROOT / "cuda" / name) for name in below))


def test_host_headers_are_those_that_handlers_include():
    files = [x for part in ("ffi", "runtime") for x in (ROOT / "cuda" / part).iterdir()]
    assert lists()["HOST_HEADERS"] == sorted(set().union(*map(includes, files)))


def test_cmake_writes_digests_of_host_headers_and_does_so_again(cmake_folder):
    written = (cmake_folder / "generated" / "ffi" / "host_headers.inc").read_text()
    inputs = (cmake_folder / "CMakeFiles" / "Makefile.cmake").read_text()
    expected = ""
    for name in lists()["HOST_HEADERS"]:
        path = ROOT / "cuda" / name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        expected += f'{{"{name}", "{digest}"}},\n'
        # A change of it configures once more.
        assert f'"{path}"' in inputs
    assert written == expected


@pytest.mark.skipif("TEST_SRCDIR" not in os.environ, reason="Bazel makes the list")
def test_bazel_agrees_with_this_reading_of_its_files():
    text = (ROOT / "tests" / "linked_sources").read_text()
    linked = {
        label.removeprefix("//cuda:")
        for label in text.split()
        if label.startswith("//cuda:") and label.endswith(".cc")
    }
    assert linked == {source for module in MODULES for source in bazel(module)}
