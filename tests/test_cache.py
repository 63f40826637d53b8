"""The folder of compiled kernels: kept, checked, shared, and never in the way."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import extension_process
import pytest

from tk_jax import _ffi

_COMPILE = """
result = extension.compile(spec)
print(json.dumps({"origin": result["origin"], "size": len(result["cubin"]),
                  "log": result["log"], "cache": extension.cache_info(),
                  "keys": extension.kernel_keys(spec)}))
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "kernels"


def compile_in(folder, **kwargs):
    """What a fresh process makes of the probe kernel, and what it prints to stderr."""
    environment = {"TK_JAX_CACHE_DIR": str(folder)} | kwargs.pop("environment", {})
    done = extension_process.run(_COMPILE, environment=environment, **kwargs)
    return json.loads(done.stdout), done.stderr


def entries(folder):
    return sorted(folder.iterdir())


def the_entry(folder):
    (entry,) = entries(folder)
    return entry


def test_second_process_reads_what_the_first_compiled(folder):
    first, _ = compile_in(folder)
    second, stderr = compile_in(folder)
    assert (first["origin"], second["origin"]) == ("compiled", "cache")
    assert first["size"] == second["size"] > 1000
    assert first["log"] == second["log"]
    assert "Used" in second["log"]
    assert stderr == ""
    assert the_entry(folder).stem == first["keys"]["cache"]


def test_folder_and_entries_are_the_users_alone(folder):
    compile_in(folder / "deep" / "down")
    assert (folder / "deep" / "down").stat().st_mode & 0o777 == 0o700
    assert the_entry(folder / "deep" / "down").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: data + b"\0", id="longer"),
        pytest.param(lambda data: b"x" + data[1:], id="other-format"),
        pytest.param(
            lambda data: data[:-1] + bytes([data[-1] ^ 1]), id="bit-flip-in-cubin"
        ),
        pytest.param(
            lambda data: data[:16] + b"0" * 64 + data[80:], id="tampered-digest"
        ),
        pytest.param(lambda data: b"\xff" * len(data), id="noise"),
    ],
)
def test_damaged_entry_is_rebuilt(folder, damage):
    compile_in(folder)
    entry = the_entry(folder)
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    again, _ = compile_in(folder)
    assert again["origin"] == "compiled"
    assert parts(the_entry(folder))[0] == "tk_jax kernel 1"
    afterwards, _ = compile_in(folder)
    assert afterwards["origin"] == "cache"


def parts(entry):
    magic, digest, rest = entry.read_bytes().split(b"\n", 2)
    return magic.decode(), digest.decode(), rest


def test_entry_under_another_kernels_name_is_refused(folder):
    """A whole, correctly digested entry is still not the kernel that was asked for."""
    compile_in(folder)
    other = extension_process.SPEC | {"symbol": "tk_other"}
    second, _ = compile_in(folder, spec=other)
    first_entry = folder / f"{compile_in(folder)[0]['keys']['cache']}.tkcubin"
    second_entry = folder / f"{second['keys']['cache']}.tkcubin"
    second_entry.write_bytes(first_entry.read_bytes())
    again, _ = compile_in(folder, spec=other)
    assert again["origin"] == "compiled"


def test_link_is_not_followed(folder, tmp_path):
    compile_in(folder)
    entry = the_entry(folder)
    elsewhere = tmp_path / "elsewhere"
    entry.rename(elsewhere)
    entry.symlink_to(elsewhere)
    again, _ = compile_in(folder)
    assert again["origin"] == "compiled"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_folder_that_others_can_write_is_not_used(folder, mode):
    folder.mkdir()
    compile_in(folder)
    folder.chmod(mode)
    result, stderr = compile_in(folder)
    assert result["origin"] == "compiled"
    assert not result["cache"]["usable"]
    assert "other users can write to it" in result["cache"]["problem"]
    assert stderr.count("tk_jax: warning") == 1
    assert f"the kernel cache {folder} is not used" in stderr
    assert "TK_JAX_CACHE_DIR" in stderr


def test_entry_that_others_can_write_is_not_used(folder):
    compile_in(folder)
    the_entry(folder).chmod(0o666)
    assert compile_in(folder)[0]["origin"] == "compiled"
    assert the_entry(folder).stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_not_used(folder):
    compile_in(folder)
    try:
        os.chown(folder, 65534, 65534)
    except OSError as error:
        assert error.errno == errno.EINVAL
        pytest.skip("a user namespace with one user, as in Bazel's sandbox")
    result, stderr = compile_in(folder)
    assert result["origin"] == "compiled"
    assert "it belongs to another user" in stderr


def test_read_only_folder_is_read(folder):
    compile_in(folder)
    folder.chmod(0o500)
    result, stderr = compile_in(folder, preexec=extension_process.obey_permissions)
    assert result["origin"] == "cache"
    assert stderr == ""


def test_read_only_folder_does_not_stop_a_new_kernel(folder):
    folder.mkdir(mode=0o500)
    result, stderr = compile_in(folder, preexec=extension_process.obey_permissions)
    assert result["origin"] == "compiled"
    assert f"compiled kernels cannot be kept in {folder}: Permission denied" in stderr
    assert entries(folder) == []


def test_full_disk_does_not_stop_a_kernel(folder):
    def no_space():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    result, stderr = compile_in(folder, preexec=no_space)
    assert result["origin"] == "compiled"
    assert f"cannot be kept in {folder}: File too large" in stderr
    assert entries(folder) == [], "half an entry was left behind"


def test_folder_that_cannot_exist_does_not_stop_a_kernel(tmp_path):
    (tmp_path / "file").touch()
    result, stderr = compile_in(tmp_path / "file" / "kernels")
    assert result["origin"] == "compiled"
    assert "is not used: Not a directory" in stderr


def test_off_means_no_folder(tmp_path):
    result, stderr = compile_in("off", environment={"HOME": str(tmp_path)})
    assert result["origin"] == "compiled"
    assert result["cache"]["path"] == ""
    assert stderr == ""
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HOME": "{}"}, ".cache/tk_jax"),
        ({"HOME": "{}", "XDG_CACHE_HOME": "{}/xdg"}, "xdg/tk_jax"),
        ({"HOME": "{}", "TK_JAX_CACHE_DIR": "{}/own"}, "own"),
    ],
)
def test_default_folders(tmp_path, variables, expected):
    filled = {name: value.format(tmp_path) for name, value in variables.items()}
    done = extension_process.run(
        "print(extension.cache_info()['path'])", environment=filled
    )
    assert done.stdout.strip() == str(tmp_path / expected)


def test_many_processes_at_once(folder):
    """All get the kernel; the folder ends with one whole entry and nothing else."""
    processes = [
        subprocess.Popen(
            extension_process.command(_COMPILE),
            env=extension_process.clean_environment()
            | {"TK_JAX_CACHE_DIR": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 6
    assert all(stderr == "" for _, stderr in outputs)
    sizes = {json.loads(stdout)["size"] for stdout, _ in outputs}
    assert len(sizes) == 1
    the_entry(folder)
    assert compile_in(folder)[0]["origin"] == "cache"


def test_change_of_sources_options_or_kernel_changes_the_key(folder, tmp_path):
    def keys(**kwargs):
        return compile_in(folder, **kwargs)[0]["keys"]["cache"]

    root = tmp_path / "sources"
    for part in ("include/tk", "kernels"):
        (root / part).mkdir(parents=True)
    for name in ("kernel_params.h", "tensor_map.h"):
        header = _ffi.source_root() / "include" / "tk" / name
        (root / "include" / "tk" / name).write_text(header.read_text())
    before = keys(source_root=root)
    assert keys(source_root=root) == before
    assert (
        keys(source_root=root, spec=extension_process.SPEC | {"threads": 256}) != before
    )

    unrelated = root / "kernels" / "unrelated.cuh"
    unrelated.write_text("// one\n")
    added = keys(source_root=root)
    unrelated.write_text("// two\n")
    changed = keys(source_root=root)
    unrelated.rename(root / "kernels" / "renamed.cuh")
    assert len({before, added, changed, keys(source_root=root)}) == 4


def test_shipped_kernel_needs_no_compiler(folder, tmp_path):
    """A shipped entry is found without NVRTC, which is nowhere to be found here."""
    compiled, shipped = ship(tmp_path), tmp_path / "shipped"
    (tmp_path / "empty").mkdir()

    def run(spec=extension_process.SPEC):
        folders = [str(tmp_path / name) for name in ("missing", "empty", "shipped")]
        return extension_process.run(
            f"extension.set_shipped_dirs({folders})\n"
            "result = extension.compile(spec)\n"
            "print(result['origin'], len(result['cubin']))\n",
            spec=spec,
            environment={
                "TK_JAX_CACHE_DIR": str(folder),
                "TK_JAX_NVRTC": str(tmp_path / "nothing.so"),
            },
            check=False,
        )

    assert run().stdout.split() == ["shipped", str(compiled["size"])]
    missing = "NVRTC, NVIDIA's run-time compiler, was not found"
    assert missing in run(extension_process.SPEC | {"threads": 256}).stderr

    entry = the_entry(shipped)
    good = entry.read_bytes()
    entry.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert missing in run().stderr
    entry.write_bytes(good.replace(b"tk_probe", b"tk_prone", 1))
    assert missing in run().stderr


def ship(tmp_path):
    """Compiles the probe kernel into the folder "shipped"."""
    code = f"""
result = extension.compile(spec, ship_to={str(tmp_path / "shipped")!r})
print(json.dumps({{"origin": result["origin"], "size": len(result["cubin"]),
                  "key": extension.kernel_keys(spec)["shipped"]}}))
"""
    done = extension_process.run(code, environment={"TK_JAX_CACHE_DIR": "off"})
    return json.loads(done.stdout)


def test_shipped_entry_is_for_everyone_and_named_without_the_compiler(tmp_path):
    compiled = ship(tmp_path)
    entry = the_entry(tmp_path / "shipped")
    assert compiled["origin"] == "compiled"
    assert entry.stem == compiled["key"]
    assert entry.stat().st_mode & 0o444 == 0o444


def test_folder_that_cannot_be_shipped_to_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"cannot be written to .*: Not a directory"):
        _ffi.extension().compile(
            extension_process.SPEC, ship_to=str(tmp_path / "file" / "kernels")
        )


def test_folders_of_shipped_kernels(monkeypatch):
    monkeypatch.delenv("TK_JAX_CUBINS", raising=False)
    (package,) = _ffi.shipped_folders()
    assert package.endswith("/tk_jax/cubins")
    monkeypatch.setenv("TK_JAX_CUBINS", "/one:/two:")
    assert _ffi.shipped_folders() == ["/one", "/two", package]


def test_program_ships_what_it_names(tmp_path):
    """The command that fills a folder, and the variable that names it later."""
    command = [sys.executable, "-m", "tk_jax.compile"]
    names = ["attention_bwd_finish_d64_bf16", "attention_bwd_finish_d64_fp16"]
    options = [f"--only={name}" for name in names]
    environment = extension_process.clean_environment() | {"TK_JAX_CACHE_DIR": "off"}
    shipped = str(tmp_path / "shipped")

    def run(*more, **variables):
        return subprocess.run(
            [*command, *options, *more],
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout

    assert f"2 kernels in {shipped}" in run("--output", shipped)
    assert len(entries(tmp_path / "shipped")) == 2
    without = {"TK_JAX_CUBINS": shipped, "TK_JAX_NVRTC": str(tmp_path / "nothing.so")}
    found = run(**without)
    assert [line.split()[2] for line in found.splitlines()] == ["shipped"] * 2
