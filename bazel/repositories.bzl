"""Finds on the host what is not in the tree: Python, jaxlib's FFI headers, nanobind, pybind11."""

_ASK = """
import importlib.util, json, os, sys, sysconfig

def folder(name):
    spec = importlib.util.find_spec(name)
    return os.path.dirname(spec.origin) if spec and spec.origin else None

print(json.dumps({
    "version": "%d.%d" % sys.version_info[:2],
    "include": sysconfig.get_path("include"),
    "packages": [path for path in sys.path if os.path.isdir(path) and path.endswith("-packages")],
    "jaxlib": folder("jaxlib"),
    "nanobind": folder("nanobind"),
    "pybind11": folder("pybind11"),
}))
"""

_BUILD = """\
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

py_runtime(
    name = "py_runtime",
    interpreter_path = "{interpreter}",
    python_version = "PY3",
    # Whatever "python" is on PATH, if anything.
    stub_shebang = "#!{interpreter}",
)

py_runtime_pair(
    name = "py_runtime_pair",
    py3_runtime = ":py_runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":py_runtime_pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)

cc_library(
    name = "python_headers",
    hdrs = glob(["python/**/*.h"]),
    includes = ["python"],
)

cc_library(
    name = "xla_ffi",
    hdrs = glob(["jaxlib/xla/ffi/api/*.h"]),
    includes = ["jaxlib"],
)
"""

_NANOBIND = """
cc_library(
    name = "nanobind",
    srcs = [
        "nanobind/src/nb_combined.cpp",
    ],
    hdrs = glob([
        "nanobind/include/**/*.h",
        "nanobind/ext/robin_map/include/**/*.h",
    ]),
    copts = [
        "-std=c++17",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
        "-w",
    ],
    includes = [
        "nanobind/ext/robin_map/include",
        "nanobind/include",
    ],
    linkstatic = True,
    textual_hdrs = glob([
        "nanobind/src/*.cpp",
        "nanobind/src/*.h",
    ]),
    deps = [":python_headers"],
)
"""

_PYBIND11 = """
cc_library(
    name = "pybind11",
    hdrs = glob(["pybind11/**/*.h"]),
    includes = ["pybind11"],
    deps = [":python_headers"],
)
"""

def _local_python_impl(ctx):
    named = ctx.os.environ.get("TK_PYTHON")
    python = ctx.path(named) if named else ctx.which("python3")
    if not python or not python.exists:
        fail("No Python at %s: set TK_PYTHON to one that has jax and nanobind" % (named or "python3 on PATH"))
    result = ctx.execute([python, "-c", _ASK])
    if result.return_code:
        fail("%s does not run: %s" % (python, result.stderr))
    found = json.decode(result.stdout)
    for name in ["jaxlib", "nanobind"]:
        if not found[name]:
            fail("{python} has no {name}: set TK_PYTHON to a Python that has it, or {python} -m pip install {name}".format(
                name = name,
                python = python,
            ))

    # Programs run in an environment that sees the host's packages, but not the finders that editable
    # installs leave there: a tk_jax among them would hide the one that was built here.
    result = ctx.execute([python, "-m", "venv", "--without-pip", ctx.path("venv")])
    if result.return_code:
        fail("%s -m venv fails: %s" % (python, result.stdout + result.stderr))
    ctx.file(
        "venv/lib/python%s/site-packages/host.pth" % found["version"],
        "\n".join(found["packages"]) + "\n",
    )

    ctx.symlink(found["include"], "python")
    ctx.symlink(found["jaxlib"] + "/include", "jaxlib")
    ctx.symlink(found["nanobind"], "nanobind")
    text = _BUILD.format(interpreter = ctx.path("venv/bin/python")) + _NANOBIND
    if found["pybind11"]:
        ctx.symlink(found["pybind11"] + "/include", "pybind11")
        text += _PYBIND11
    ctx.file("BUILD.bazel", text)

local_python = repository_rule(
    implementation = _local_python_impl,
    configure = True,
    doc = "The Python named by TK_PYTHON, else python3 on PATH, and what is installed in it.",
    environ = ["PATH", "TK_PYTHON"],
    local = True,
)

def tk_jax_repositories():
    """The repositories that tk_jax's targets name, and the Python that runs them."""
    local_python(name = "local_python")
    native.register_toolchains("@local_python//:toolchain")
