"""The structs of XLA's c_api.h (FFI API 0.3), as far as calling a handler takes."""

from __future__ import annotations

import ctypes

_BUFFER = 1
_ARRAY, _DICTIONARY, _SCALAR, _STRING = 1, 2, 3, 4
STAGES = {"initialize": 2, "execute": 3}
_TYPES = {
    "bool": 1,
    "int32": 4,
    "int64": 5,
    "uint32": 8,
    "float16": 10,
    "float32": 11,
    "bfloat16": 16,
}


def _struct(name: str, *fields) -> type:
    header = [("struct_size", ctypes.c_size_t), ("extension", ctypes.c_void_p)]
    return type(name, (ctypes.Structure,), {"_fields_": header + list(fields)})


_Buffer = _struct(
    "Buffer",
    ("dtype", ctypes.c_int),
    ("data", ctypes.c_void_p),
    ("rank", ctypes.c_int64),
    ("dims", ctypes.c_void_p),
)
_Arrays = _struct(
    "Arrays",
    ("size", ctypes.c_int64),
    ("types", ctypes.c_void_p),
    ("items", ctypes.c_void_p),
)
_Attributes = _struct(
    "Attributes",
    ("size", ctypes.c_int64),
    ("types", ctypes.c_void_p),
    ("names", ctypes.c_void_p),
    ("items", ctypes.c_void_p),
)
Frame = _struct(
    "Frame",
    ("api", ctypes.c_void_p),
    ("context", ctypes.c_void_p),
    ("stage", ctypes.c_int),
    ("args", _Arrays),
    ("rets", _Arrays),
    ("attributes", _Attributes),
    ("future", ctypes.c_void_p),
)
ErrorCreate = _struct(
    "ErrorCreate", ("message", ctypes.c_char_p), ("code", ctypes.c_int)
)
StreamGet = _struct(
    "StreamGet", ("context", ctypes.c_void_p), ("stream", ctypes.c_void_p)
)
OrdinalGet = _struct(
    "OrdinalGet", ("context", ctypes.c_void_p), ("ordinal", ctypes.c_int32)
)
Api = _struct(
    "Api",
    ("version_size", ctypes.c_size_t),
    ("version_extension", ctypes.c_void_p),
    ("major", ctypes.c_int),
    ("minor", ctypes.c_int),
    ("internal", ctypes.c_void_p),
    # In the order of the struct; those that handlers call are filled in.
    ("functions", ctypes.c_void_p * 18),
)
ERROR_CREATE, STREAM_GET, ORDINAL_GET = 0, 4, 17


class _Span(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Scalar(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int), ("value", ctypes.c_void_p)]


class _Array(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int),
        ("size", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
    ]


class Memory:
    """Builds structs, and keeps alive what they point to."""

    def __init__(self):
        self._kept = []

    def keep(self, value) -> int:
        self._kept.append(value)
        return ctypes.addressof(value)

    def array(self, element: type, values: list) -> int:
        return self.keep((element * max(len(values), 1))(*values))

    def struct(self, cls: type, *values):
        return cls(ctypes.sizeof(cls), None, *values)

    def buffers(self, arrays: list, addresses: list[int]):
        """Arrays of (dtype, shape), at an address each."""
        pointers = []
        for (dtype, shape), address in zip(arrays, addresses, strict=True):
            dims = self.array(ctypes.c_int64, shape)
            buffer = self.struct(_Buffer, _TYPES[dtype], address, len(shape), dims)
            pointers.append(self.keep(buffer))
        kinds = self.array(ctypes.c_int, [_BUFFER] * len(arrays))
        items = self.array(ctypes.c_void_p, pointers)
        return self.struct(_Arrays, len(arrays), kinds, items)

    def span(self, text: str) -> int:
        data = text.encode()
        return self.keep(_Span(self.keep(ctypes.create_string_buffer(data)), len(data)))

    def attributes(self, values: dict):
        names = sorted(values)
        encoded = [self.attribute(values[name]) for name in names]
        return self.struct(
            _Attributes,
            len(names),
            self.array(ctypes.c_int, [kind for kind, _ in encoded]),
            self.array(ctypes.c_void_p, [self.span(name) for name in names]),
            self.array(ctypes.c_void_p, [address for _, address in encoded]),
        )

    def attribute(self, value) -> tuple[int, int]:
        if isinstance(value, dict):
            return _DICTIONARY, self.keep(self.attributes(value))
        if isinstance(value, str):
            return _STRING, self.span(value)
        if isinstance(value, list):  # [dtype, numbers]
            dtype, numbers = value
            element = {"int64": ctypes.c_int64, "float32": ctypes.c_float}[dtype]
            data = self.array(element, numbers)
            return _ARRAY, self.keep(_Array(_TYPES[dtype], len(numbers), data))
        dtype, element = {
            bool: ("bool", ctypes.c_bool),
            int: ("int64", ctypes.c_int64),
            float: ("float32", ctypes.c_float),
        }[type(value)]
        pointer = self.keep(element(value))
        return _SCALAR, self.keep(_Scalar(_TYPES[dtype], pointer))
