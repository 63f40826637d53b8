"""Adds compiled kernels to a wheel, so that its users wait for no compiler.

``python scripts/ship_kernels.py WHEEL``: unpacks the wheel, has the package in it
compile what its ops choose by default (``--only NAME``: a part of that), proves that
the package then finds all of it with an empty cache and without NVRTC, and writes the
wheel again with ``tk_jax/cubins``. Needs jax and NVRTC, and no GPU.

The package of the wheel compiles, and no other: kernels are found by a digest of all
device headers, and a checkout has more of them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

# An editable install goes before sys.path, by a finder of its own: it is left out.
_IN_WHEEL = """
import json, pathlib, sys
folder, output, *only = sys.argv[1:]
sys.meta_path[:] = [x for x in sys.meta_path if not type(x).__module__.startswith("_")]
sys.path.insert(0, folder)
from tk_jax import compile
assert pathlib.Path(compile.__file__).is_relative_to(folder), compile.__file__
kernels = {x.name: x for part in only or [""] for x in compile.specialisations(part)}
done = compile.compile_kernels(kernels.values(), output=output or None)
print(json.dumps([[x.name, x.origin] for x in done]))
"""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=pathlib.Path)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    args = parser.parse_args(argv)
    before = args.wheel.stat().st_size
    try:
        count = ship(args.wheel, args.only)
    except (OSError, RuntimeError) as error:
        print(f"ship_kernels: {error}", file=sys.stderr)
        return 1
    size = args.wheel.stat().st_size
    print(f"{args.wheel}: {count} kernels, {before / 1e6:.1f} -> {size / 1e6:.1f} MB")
    return 0


def ship(wheel: pathlib.Path, only: list[str]) -> int:
    """Returns the number of kernels in the wheel."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary).resolve() / "wheel"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        cubins = folder / "tk_jax" / "cubins"
        if cubins.exists():
            raise RuntimeError(f"{wheel} has kernels already")
        compiled = _run(folder, str(cubins), only)
        if not compiled:
            raise RuntimeError(f"no kernel's name contains any of {only}")
        found = _run(folder, "", only, TK_JAX_NVRTC=os.fspath(folder / "none"))
        missed = [name for name, origin in found if origin != "shipped"]
        if missed or len(found) != len(compiled):
            raise RuntimeError(f"not found again: {missed}")
        entries = sorted(cubins.glob("*.tkcubin"))
        _add(wheel, folder, entries)
        return len(entries)


def _run(folder, output: str, only: list[str], **variables: str) -> list[list[str]]:
    """What the package in ``folder`` says about each kernel that it was asked for."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "TK_JAX_CUBINS")
    }
    environment |= {"JAX_PLATFORMS": "cpu", "TK_JAX_CACHE_DIR": "off"} | variables
    done = subprocess.run(
        [sys.executable, "-c", _IN_WHEEL, str(folder), output, *only],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the package in the wheel failed:\n{done.stderr}")
    return json.loads(done.stdout)


def _add(wheel, folder: pathlib.Path, entries: list[pathlib.Path]) -> None:
    """Writes ``wheel`` again: its files as they are, ``entries``, a longer RECORD."""
    temporary = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(temporary, "w") as new:
        (record,) = (x for x in old.namelist() if x.endswith(".dist-info/RECORD"))
        for info in old.infolist():
            if info.filename != record:
                new.writestr(info, old.read(info))
        lines = old.read(record).decode()
        for entry in entries:
            # As old as the wheel's other files: equal kernels make equal wheels.
            info = zipfile.ZipInfo(
                entry.relative_to(folder).as_posix(), old.getinfo(record).date_time
            )
            info.external_attr = 0o100644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            data = entry.read_bytes()
            new.writestr(info, data)
            lines += record_line(info.filename, data)
        new.writestr(old.getinfo(record), lines)
    temporary.replace(wheel)


def record_line(name: str, data: bytes) -> str:
    """What a wheel's RECORD says of a file."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return f"{name},sha256={digest.decode().rstrip('=')},{len(data)}\n"


if __name__ == "__main__":
    sys.exit(main())
