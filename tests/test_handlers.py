"""What FFI handlers refuse, what they launch, and with which tensor maps."""

import pytest
from handler_process import FIRST_ADDRESS, Call, Gpu, both_stages, launched

_INVALID, _PRECONDITION, _UNIMPLEMENTED, _INTERNAL = 3, 9, 12, 13
_BF16, _F32 = 9, 7  # CU_TENSOR_MAP_DATA_TYPE_*
_SWIZZLE_128 = 3


# -- tk_kernel_v1 ----------------------------------------------------------------------

_SOURCE = '#include "tk/kernel_params.h"\nvoid copy(const tk::KernelParams&) {}'


def kernel_call(args, rets, *, map_tiles=None, scalars=(1.5,), **settings):
    defaults = {
        "symbol": "tk_copy",
        "header": "",
        "source": _SOURCE,
        "function": "copy",
        "threads": 128,
        "shared_bytes": 0,
        "cluster_size": 1,
        "grid_x": 1,
        "grid_y": 1,
        "grid_z": 1,
    }
    if map_tiles is None:
        map_tiles = [0, 0] * (len(args) + len(rets))
    return Call(
        "tk_kernel_v1",
        args,
        rets,
        {
            "settings": defaults | settings,
            "map_tiles": ["int64", list(map_tiles)],
            "scalars": ["float32", list(scalars)],
        },
    )


_MATRIX = ("bfloat16", [3, 100, 192])


def test_kernel_launch():
    call = kernel_call(
        [_MATRIX], [_MATRIX], threads=256, shared_bytes=70000, grid_x=7, grid_y=2
    )
    ((loaded, ran),) = launched(Gpu(), call)
    (attribute,) = loaded.of("attribute")
    assert (attribute["id"], attribute["value"]) == (8, 70000)
    (launch,) = ran.of("launch")
    assert launch["symbol"] == "tk_copy"
    assert launch["grid"] == [7, 2, 1]
    assert launch["block"] == [256, 1, 1]
    assert launch["shared_bytes"] == 70000
    assert "cluster" not in launch
    assert ran.of("map") == []


def test_kernel_cluster():
    ((_, ran),) = launched(
        Gpu(), kernel_call([_MATRIX], [_MATRIX], cluster_size=2, grid_x=4)
    )
    assert ran.of("launch")[0]["cluster"] == [2, 1, 1]


def test_kernel_tensor_maps():
    arrays = [_MATRIX, ("float32", [64, 48]), ("float32", [1000])]
    call = kernel_call(arrays, [_MATRIX], map_tiles=[64, 128, 16, 16, 1, 128, 0, 0])
    ((_, ran),) = launched(Gpu(), call)
    assert ran.of("map") == [
        {
            "call": "map",
            "type": _BF16,
            "address": FIRST_ADDRESS,
            "swizzle": _SWIZZLE_128,
            "dims": [192, 100, 3],
            "strides": [384, 38400],
            "box": [64, 64, 1],
        },
        {
            "call": "map",
            "type": _F32,
            "address": 2 * FIRST_ADDRESS,
            "swizzle": 2,
            "dims": [48, 64],
            "strides": [192],
            "box": [16, 16],
        },
        {
            "call": "map",
            "type": _F32,
            "address": 3 * FIRST_ADDRESS,
            "swizzle": 0,
            "dims": [1000],
            "strides": [],
            "box": [128],
        },
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            kernel_call([_MATRIX] * 8, [_MATRIX]),
            "9 arguments and results; a kernel takes 8",
        ),
        (
            kernel_call([_MATRIX], [_MATRIX], map_tiles=[0, 0]),
            "map_tiles has 2 numbers; expected rows and columns for each of 2 buffers",
        ),
        (
            kernel_call([_MATRIX], [_MATRIX], scalars=[0.0] * 5),
            "5 scalars; a kernel takes 4",
        ),
        (
            kernel_call([("float32", [1] * 6)], [_MATRIX]),
            "buffer 0 has shape (1, 1, 1, 1, 1, 1); at most 5 dimensions",
        ),
        (
            kernel_call([], [_MATRIX], threads=100),
            "threads is 100; expected a multiple",
        ),
        (kernel_call([], [_MATRIX], threads=2**40), "is out of range"),
        (kernel_call([], [_MATRIX], shared_bytes=232449), "is out of range"),
        (kernel_call([], [_MATRIX], symbol="a b"), "the symbol is not an identifier"),
        (
            kernel_call([], [_MATRIX], function="f(); g"),
            "the function is not a name expression: f(); g",
        ),
        (kernel_call([], [_MATRIX], source=""), "neither a header nor source text"),
    ],
)
def test_kernel_refusals(call, message):
    for answer in Gpu().run(*both_stages(call)):
        assert answer.code == _INVALID
        assert answer.message.startswith("tk_kernel_v1: ")
        assert message in answer.message
        assert answer.driver == []


@pytest.mark.parametrize(
    ("array", "tile"),
    [
        (_MATRIX, [257, 64]),
        (_MATRIX, [-1, 64]),
        (("float32", [0, 64]), [16, 64]),
        (("float32", [64]), [2, 64]),
        (("float32", []), [1, 1]),
    ],
)
def test_kernel_map_refusals(array, tile):
    call = kernel_call([array], [_MATRIX], map_tiles=[*tile, 0, 0])
    _, ran = Gpu().run(*both_stages(call))
    assert ran.code == _INVALID
    assert "no tensor map of tiles" in ran.message
    assert ran.of("launch") == []


def test_kernel_with_nothing_to_write_is_not_launched():
    ((_, ran),) = launched(Gpu(), kernel_call([_MATRIX], [("float32", [0, 4])]))
    assert ran.driver == []


@pytest.mark.parametrize("grid", [{"grid_x": 0}, {"grid_y": 65536}, {"grid_x": 2**31}])
def test_impossible_grid(grid):
    _, ran = Gpu().run(*both_stages(kernel_call([_MATRIX], [_MATRIX], **grid)))
    assert ran.code == _UNIMPLEMENTED
    assert "cannot be launched" in ran.message


# -- The runtime's errors, through any target ------------------------------------------


def test_gpu_that_is_not_hopper():
    for capability in ("8.0", "10.0", "9.1"):
        loaded, ran = Gpu(FAKE_CAPABILITY=capability).run(
            *both_stages(kernel_call([_MATRIX], [_MATRIX]))
        )
        assert loaded.code == ran.code == _UNIMPLEMENTED
        assert loaded.message == (
            f"tk_kernel_v1: GPU 0 is a Fake GPU (compute capability {capability}); "
            'tk_jax\'s kernels need a Hopper GPU (9.0). Pass implementation="xla".'
        )


def test_no_driver():
    (answer,) = Gpu(TK_JAX_LIBCUDA="/nowhere/libcuda.so.1").run(
        kernel_call([_MATRIX], [_MATRIX])
    )
    assert answer.code == _PRECONDITION
    assert "the NVIDIA driver was not found (/nowhere/libcuda.so.1" in answer.message
    assert 'implementation="xla"' in answer.message


def test_no_compiler(tmp_path):
    call = kernel_call([_MATRIX], [_MATRIX], symbol="tk_never_compiled")
    loaded, ran = Gpu(TK_JAX_NVRTC=str(tmp_path)).run(*both_stages(call))
    assert loaded.code == _PRECONDITION
    assert "NVRTC, NVIDIA's run-time compiler, was not found" in loaded.message
    assert "pip install 'tk_jax[cuda13]'" in loaded.message
    assert f"{tmp_path}/libnvrtc.so.13: no such file" in loaded.message
    assert ran.code == _INTERNAL
    assert "is not loaded on GPU 0: execute ran before initialize" in ran.message


@pytest.mark.parametrize(
    ("function", "stage"),
    [
        ("cuInit", 0),
        ("cuDeviceGetAttribute", 0),
        ("cuDevicePrimaryCtxRetain", 0),
        ("cuModuleLoadDataEx", 0),
        ("cuModuleGetFunction", 0),
        ("cuFuncSetAttribute", 0),
        ("cuFuncLoad", 0),
        ("cuTensorMapEncodeTiled", 1),
        ("cuLaunchKernelEx", 1),
    ],
)
def test_failures_of_the_driver_are_told_in_its_words(function, stage):
    call = kernel_call([_MATRIX], [_MATRIX], map_tiles=[64, 64, 0, 0])
    answer = Gpu(FAKE_FAILURE=function).run(*both_stages(call))[stage]
    assert answer.code != 0
    assert (
        f"{function} failed: unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED)"
        in answer.message
    )


def test_kernel_that_does_not_compile():
    call = kernel_call([_MATRIX], [_MATRIX], source="void copy(int) { missing(); }")
    loaded, _ = Gpu(compiles=True).run(*both_stages(call))
    assert loaded.code == _INTERNAL
    assert "cannot compile tk_copy.cu: NVRTC_ERROR_COMPILATION" in loaded.message
    assert 'identifier "missing" is undefined' in loaded.message
