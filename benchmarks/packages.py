"""Where the packages of rivals are: installed, or in a folder that an option names."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Mapping

# By option; benchmarks.run sets them before anything is looked for.
_folders: dict[str, pathlib.Path] = {}


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of Python, or a source tree of which some files are taken."""

    name: str  # as results record its version
    option: str  # --OPTION FOLDER says where it is
    help: str
    module: str | None  # what is imported where it is installed; None: never is
    files: str  # a pattern of what the folder has to have
    needs: tuple[str, ...] = ("torch",)  # other packages

    @property
    def folder(self) -> pathlib.Path | None:
        return _folders.get(self.option)

    def lacking(self) -> str | None:
        """What is not here of what it takes, in words; None where all is."""
        for package in self.needs:
            if not is_importable(package):
                return f"the package {package} is not installed"
        if self.folder is not None:
            if not any(self.folder.glob(self.files)):
                return f"--{self.option}: {self.folder} has no {self.files}"
        elif self.module is None or not is_importable(self.module):
            what = self.module or self.name
            return f"{what} is not installed: --{self.option} FOLDER says where it is"
        return None

    def version(self) -> str | None:
        """Of a folder: what its package says, or its commit."""
        if self.folder is None:
            return None
        init = self.folder / (self.module or "") / "__init__.py"
        if init.exists():
            found = re.search(
                r"^__version__ = ['\"]([^'\"]+)['\"]", init.read_text(), re.MULTILINE
            )
            if found:
                return found[1]
        command = ["git", "-C", str(self.folder), "rev-parse"]
        command += ["--show-toplevel", "HEAD"]
        try:
            described = subprocess.run(
                command, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "of unknown version"
        top, commit = described.stdout.splitlines()
        # A copy within another repository has not that one's commit.
        if pathlib.Path(top).resolve() != self.folder.resolve():
            return "of unknown version"
        return commit


MAMBA_SSM = Package(
    "mamba-ssm",
    "mamba-ssm",
    "its source tree, of which the Triton files are enough; default: as installed",
    "mamba_ssm",
    "mamba_ssm/ops/triton/ssd_combined.py",
    ("torch", "triton", "einops"),
)
FLA = Package(
    "fla-core",
    "fla",
    "the folder that fla is in; default: as installed",
    "fla",
    "fla/ops/__init__.py",
    ("torch", "triton", "einops"),
)
THUNDERKITTENS = Package(
    "thunderkittens",
    "thunderkittens",
    "its source tree, in which the op's kernel has been built",
    None,
    "kernels/*/_C*.so",
)
ALL = (MAMBA_SSM, FLA, THUNDERKITTENS)


def thunderkittens_of(kernel: str) -> Package:
    """With one of its kernels."""
    return dataclasses.replace(THUNDERKITTENS, files=f"kernels/{kernel}/_C*.so")


def set_folders(folders: Mapping[str, pathlib.Path | None]) -> None:
    """By option; what is None or missing is looked for among installed packages."""
    _folders.clear()
    _folders.update({name: path for name, path in folders.items() if path is not None})


def is_importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # Of a package above it.
        return False
    except ValueError:  # It has been imported, without a spec.
        return True


def versions() -> dict[str, str]:
    """Of the packages in folders."""
    found = {package.name: package.version() for package in ALL}
    return {name: version for name, version in found.items() if version is not None}


def mamba_ssm() -> types.ModuleType:
    """``mamba_ssm.ops.triton.ssd_combined``, without what the package imports besides.

    Its own ``__init__`` wants compiled kernels of other ops and whole models.
    """
    if "mamba_ssm" not in sys.modules:
        if MAMBA_SSM.folder is None:
            path = importlib.util.find_spec("mamba_ssm").submodule_search_locations
        else:
            path = [MAMBA_SSM.folder.absolute() / "mamba_ssm"]
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [str(x) for x in path]
        sys.modules["mamba_ssm"] = package
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


def fla(module: str) -> types.ModuleType:
    """A module of ``fla.ops``."""
    if FLA.folder is not None and "fla" not in sys.modules:
        sys.path.insert(0, str(FLA.folder.absolute()))
    return importlib.import_module(f"fla.ops.{module}")


def thunderkittens(kernel: str) -> types.ModuleType:
    """What ``make`` has built in ``kernels/<kernel>``."""
    (path,) = THUNDERKITTENS.folder.absolute().glob(f"kernels/{kernel}/_C*.so")
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
