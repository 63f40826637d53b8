"""Prints what the package and some of its extras need, for `pip install -r`.

``python scripts/requirements.py test demo``. For environments that run the sources
without installing them, as Bazel does.
"""

import pathlib
import sys
import tomllib


def main() -> None:
    pyproject = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    print(*project["dependencies"], sep="\n")
    for extra in sys.argv[1:]:
        print(*project["optional-dependencies"][extra], sep="\n")


if __name__ == "__main__":
    main()
