"""Tests that pytest runs."""

def pytest_test(name, src, args = [], data = [], deps = [], **kwargs):
    """A py_test that runs pytest on one file.

    Args:
      name: The target's name.
      src: The file of tests.
      args: Arguments for pytest.
      data: Files that the tests read.
      deps: Libraries that the tests import.
      **kwargs: What every test rule takes.
    """
    native.py_test(
        name = name,
        srcs = [
            src,
            "//bazel:run_pytest.py",
        ],
        args = ["$(rootpath %s)" % src] + args,
        data = data + ["//:pyproject.toml"],
        legacy_create_init = False,
        main = "//bazel:run_pytest.py",
        python_version = "PY3",
        srcs_version = "PY3",
        deps = deps,
        **kwargs
    )
