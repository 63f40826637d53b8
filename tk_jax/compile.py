"""Compiles kernels ahead of time into the cache, with or without a GPU.

``python -m tk_jax.compile`` compiles every specialisation that the package chooses by
itself, so that no program waits for one later; ``--only attention`` a part of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import os
import sys
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping

from tk_jax import _ffi
from tk_jax.ops import _state_step
from tk_jax.ops.attention import config as attention_config
from tk_jax.ops.attention import tiling as attention_tiling
from tk_jax.ops.based_attention import config as based_attention_config
from tk_jax.ops.hedgehog_attention import config as hedgehog_config
from tk_jax.ops.linear_attention import config as linear_attention_config
from tk_jax.ops.matmul import config as matmul_config

DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Specialisation:
    """One kernel of a call, with the settings that chose it."""

    op: str  # "attention_fwd", "attention_bwd", "linear_attention", "matmul", ...
    settings: str  # what tells it apart beyond its symbol, in words
    spec: dict  # what the extension compiles

    @property
    def symbol(self) -> str:
        return self.spec["symbol"]

    @property
    def name(self) -> str:
        return f"{self.symbol} {self.settings}".strip()


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A kernel that is in the cache now."""

    name: str
    seconds: float
    origin: str  # "shipped", "cache", or "compiled" just now


def specialisations(
    only: str = "", tiles: Mapping[str, int] = types.MappingProxyType({})
) -> Iterator[Specialisation]:
    """Every specialisation that the ops choose by default, each once.

    Args:
      only: A part of the op's or the kernel's name.
      tiles: Fields of the configs to set differently, for tuning. A kernel that does
        not take them is left out, with a warning.
    """
    seen = set()
    for item in _all_specialisations(tiles):
        if item.spec["function"] in seen or only not in f"{item.op} {item.name}":
            continue
        seen.add(item.spec["function"])
        yield item


def compile_kernels(
    kernels: Iterable[Specialisation] | None = None,
    *,
    use_cache: bool = True,
    output: str | os.PathLike | None = None,
) -> list[CompiledKernel]:
    """Compiles ``kernels`` into the cache folder; by default all that ops may choose.

    Needs NVRTC and no GPU. Kernels that are there already cost nothing.

    Args:
      kernels: What :func:`specialisations` yields, or a part of it.
      use_cache: False compiles all again.
      output: A folder that also gets them, to be shipped: from ``tk_jax/cubins`` and
        the folders of ``TK_JAX_CUBINS`` they are loaded without NVRTC.

    Raises:
      ImportError: the extension is not built.
      RuntimeError: NVRTC is missing, a kernel does not compile, or ``output`` cannot be
        written.

    >>> import tk_jax
    >>> compiled = tk_jax.compile_kernels([])
    """
    extension = _ffi.extension()
    wanted = list(specialisations() if kernels is None else kernels)
    ship_to = None if output is None else os.fspath(output)

    def compile_one(item: Specialisation) -> CompiledKernel:
        result = extension.compile(item.spec, use_cache=use_cache, ship_to=ship_to)
        return CompiledKernel(item.name, result["seconds"], result["origin"])

    # The extension lets go of the interpreter's lock while it compiles.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, wanted))


def _all_specialisations(tiles: Mapping[str, int]) -> Iterator[Specialisation]:
    for dtype in DTYPES:
        for make in (
            _attention_forward,
            _attention_backward,
            _based_attention,
            _hedgehog_attention,
            _linear_attention,
            _matmul,
            _state_step_kernels,
        ):
            try:
                yield from make(dtype, tiles)
            except ValueError as error:
                if not tiles:
                    raise
                warnings.warn(f"left out: {error}", stacklevel=2)


def _attention_forward(
    dtype: str, tiles: Mapping[str, int]
) -> Iterator[Specialisation]:
    for (head_dim, head_dim_v), mask in itertools.product(
        attention_tiling.KERNEL_HEAD_DIMS, attention_config.KERNEL_MASKS
    ):
        chosen = attention_tiling.forward_configs(head_dim, head_dim_v, mask)
        # Tiles that are given replace those of every choice: one of them is enough.
        for config in (_fields(x, tiles) for x in (chosen[:1] if tiles else chosen)):
            for spec in _ffi.extension().attention_forward_specs(
                dtype=dtype,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                mask=mask,
                features=[],
                config=config,
            ):
                yield Specialisation("attention_fwd", _words(config), spec)


def _attention_backward(
    dtype: str, tiles: Mapping[str, int]
) -> Iterator[Specialisation]:
    for (head_dim, head_dim_v), mask, deterministic in itertools.product(
        attention_tiling.KERNEL_HEAD_DIMS, attention_config.KERNEL_MASKS, (True, False)
    ):
        config = _fields(attention_tiling.backward_config(head_dim, head_dim_v), tiles)
        words = _words(config) + ("" if deterministic else " any-order")
        for spec in _ffi.extension().attention_backward_specs(
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
            features=[],
            deterministic=deterministic,
            config=config,
        ):
            # prepare and finish are the same kernels for every tile.
            has_tiles = "Traits<" in spec["function"]
            yield Specialisation("attention_bwd", words if has_tiles else "", spec)


def _based_attention(dtype: str, tiles: Mapping[str, int]) -> Iterator[Specialisation]:
    for dim, documents, normalize in itertools.product(
        based_attention_config.FEATURE_DIMS,
        (False, True),
        # float16 is not normalized by kernels.
        (False, True) if dtype == "bfloat16" else (False,),
    ):
        chosen = based_attention_config.scan_config(1, 1, 1, dim, 64)
        for kernel, default in based_attention_config.kernels(chosen, dim):
            config = _fields(default, tiles)
            for spec in _ffi.extension().based_attention_specs(
                kernel=kernel,
                dtype=dtype,
                dim=dim,
                documents=documents,
                normalize=normalize,
                config=config,
            ):
                yield Specialisation("based_attention", _words(config), spec)


def _linear_attention(dtype: str, tiles: Mapping[str, int]) -> Iterator[Specialisation]:
    for (key_dim, block), features in itertools.product(
        linear_attention_config.KERNEL_KEY_DIMS,
        linear_attention_config.KERNEL_FEATURES,
    ):
        chosen = linear_attention_config.scan_config(
            *linear_attention_config.SIZES_OF_BLOCKS[block], key_dim, 64
        )
        for kernel, taken, default in linear_attention_config.kernels(chosen, features):
            config = {} if default is None else _fields(default, tiles)
            for spec in _ffi.extension().linear_attention_specs(
                kernel=kernel,
                dtype=dtype,
                key_dim=key_dim,
                features=taken,
                config=config,
            ):
                yield Specialisation("linear_attention", _words(config), spec)


def _hedgehog_attention(dtype: str, _: Mapping[str, int]) -> Iterator[Specialisation]:
    kernels = [(name, False) for name in hedgehog_config.KERNELS]
    kernels += [(name, True) for name in hedgehog_config.DOCUMENT_KERNELS]
    for (kernel, documents), (key_dim, value_dim) in itertools.product(
        kernels, hedgehog_config.KERNEL_DIMS
    ):
        for spec in _ffi.extension().hedgehog_attention_specs(
            kernel=kernel,
            dtype=dtype,
            key_dim=key_dim,
            value_dim=value_dim,
            documents=documents,
        ):
            yield Specialisation("hedgehog_attention", "", spec)


def _matmul(dtype: str, tiles: Mapping[str, int]) -> Iterator[Specialisation]:
    for default, transpose_a, transpose_b in itertools.product(
        matmul_config.CONFIGS, (False, True), (False, True)
    ):
        config = _fields(default, tiles)
        for spec in _ffi.extension().matmul_specs(
            dtype=dtype,
            transpose_a=transpose_a,
            transpose_b=transpose_b,
            config=config,
        ):
            yield Specialisation("matmul", _words(config), spec)


def _state_step_kernels(
    dtype: str, tiles: Mapping[str, int]
) -> Iterator[Specialisation]:
    for key_dtype, value_dtype, settings in _state_step.kernels(dtype):
        config = _fields(settings.pop("config"), tiles)
        for spec in _ffi.extension().state_step_specs(
            key_dtype=key_dtype, value_dtype=value_dtype, config=config, **settings
        ):
            yield Specialisation("state_step", "", spec)


def _fields(config, tiles: Mapping[str, int]) -> dict[str, int]:
    fields = dataclasses.asdict(config)
    return fields | {name: tiles[name] for name in fields if name in tiles}


def _words(settings: dict) -> str:
    return "-".join(str(value) for value in settings.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tk_jax.compile", description=__doc__
    )
    parser.add_argument(
        "--only",
        action="append",
        help="part of an op's or kernel's name; may be given more than once",
    )
    parser.add_argument(
        "--output", help="a folder that gets them too, to be shipped with a program"
    )
    parser.add_argument("--force", action="store_true", help="compile all again")
    parser.add_argument("--list", action="store_true", help="only print names")
    options = parser.parse_args(arguments)
    try:
        wanted = {}
        for part in options.only or [""]:
            found = {item.name: item for item in specialisations(part)}
            if not found:
                parser.error(f"no kernel's name contains {part!r}")
            wanted |= found
        if options.list:
            print(*wanted, sep="\n")
            return 0
        kernels = compile_kernels(
            wanted.values(), use_cache=not options.force, output=options.output
        )
    except (ImportError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    for kernel in kernels:
        print(f"{kernel.seconds:6.1f} s  {kernel.origin:<8}  {kernel.name}")
    if options.output:
        print(f"{len(kernels)} kernels in {options.output}")
        return 0
    cache = _ffi.extension().cache_info()
    if not cache["usable"]:
        print(f"nothing was kept: {cache['path']}: {cache['problem']}", file=sys.stderr)
        return 1
    print(f"{len(kernels)} kernels in {cache['path']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
