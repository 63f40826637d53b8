"""Runs one file of tests under Bazel: `run_pytest.py FILE [pytest's arguments]`."""

import os
import pathlib
import sys

import pytest


def main() -> int:
    # The workspace as the test sees it: what its rule names, and no more.
    root = pathlib.Path.cwd()
    temporary = os.environ["TEST_TMPDIR"]
    os.environ.setdefault("HOME", temporary)
    report = os.environ.get("XML_OUTPUT_FILE")
    file, *arguments = sys.argv[1:]
    return pytest.main(
        [
            f"--rootdir={root}",
            f"--config-file={root / 'pyproject.toml'}",
            f"--basetemp={temporary}/pytest",
            "-p",
            "no:cacheprovider",
            *([f"--junitxml={report}"] if report else []),
            *arguments,
            str(root / file),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
