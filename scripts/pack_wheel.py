"""Packs what this Python has installed in editable mode as a wheel, without compiling.

``python scripts/pack_wheel.py FOLDER``: the modules and device sources that the install
put beside other packages, Python's sources from the clone, the install's metadata. It
is the wheel that ``pip wheel .`` would build with this Python, some minutes sooner.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import sys
import zipfile

from ship_kernels import record_line

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Only an editable install has these, and a wheel writes its RECORD itself.
_OF_INSTALL = {"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"}


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: pack_wheel.py FOLDER", file=sys.stderr)
        return 2
    try:
        print(pack(pathlib.Path(argv[0])))
    except (importlib.metadata.PackageNotFoundError, RuntimeError) as error:
        print(f"pack_wheel: {error}; pip install --editable . first", file=sys.stderr)
        return 1
    return 0


def pack(folder: pathlib.Path) -> pathlib.Path:
    """Returns the wheel's path."""
    install = importlib.metadata.distribution("tk_jax")
    files = _installed(install) | {
        path.relative_to(ROOT).as_posix(): path
        for path in (ROOT / "tk_jax").rglob("*")
        if path.suffix == ".py" and "cuda" not in path.parts
    }
    tag = _value(install.read_text("WHEEL"), "Tag")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"tk_jax-{install.version}-{tag}.whl"
    record = f"tk_jax-{install.version}.dist-info/RECORD"
    lines = ""
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(files.items()):
            data = path.read_bytes()
            archive.writestr(name, data)
            lines += record_line(name, data)
        archive.writestr(record, f"{lines}{record},,\n")
    return wheel


def _installed(install) -> dict[str, pathlib.Path]:
    """What goes into a wheel of an editable install's own files, by name."""
    files = {}
    for path in install.files or ():
        parts = path.parts
        if parts[0] == "tk_jax" or (
            parts[0].endswith(".dist-info") and parts[-1] not in _OF_INSTALL
        ):
            files[path.as_posix()] = pathlib.Path(install.locate_file(path))
    modules = any(name.startswith("tk_jax/_extension.") for name in files)
    if not modules or "tk_jax/__init__.py" in files:
        raise RuntimeError(f"{sys.executable} has no editable install of tk_jax")
    return files


def _value(text: str | None, name: str) -> str:
    for line in (text or "").splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise RuntimeError(f"the install's metadata has no {name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
