"""Arithmetic and logic in PTX: see :mod:`ptx.machine`."""

from __future__ import annotations

import numpy as np

from ptx.types import TYPES, full, type_of


def _elementwise(function):
    """An instruction whose operands and result have the opcode's type."""

    def make(t, item, parts):
        dtype = type_of(parts)
        put = t.result(item.operands[0], dtype)
        values = [t.value(operand, dtype) for operand in item.operands[1:]]
        if len(values) == 2:
            a, b = values
            return lambda w: put(w, full(w, function(a(w), b(w))))
        if len(values) == 1:
            (a,) = values
            return lambda w: put(w, full(w, function(a(w))))
        return lambda w: put(w, full(w, function(*(value(w) for value in values))))

    return make


def _flush(x):
    tiny = np.float32(np.finfo(np.float32).tiny)
    return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)


def _approximate(function):
    def apply(x):
        wide = function(_flush(x).astype(np.float64))
        return _flush(wide.astype(np.float32))

    return apply


def _fma(a, b, c):
    if a.dtype == np.float64:
        raise NotImplementedError("fma of float64")
    # Both the product and nearly always the sum are exact in more digits.
    wide = np.asarray(a, np.longdouble) * b + c
    return wide.astype(np.float32)


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a.astype(np.int64)) // np.abs(np.asarray(b, np.int64))
    return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)


def _remainder(a, b):
    return a - _divide(a, b) * b


def _shift(function):
    def make(t, item, parts):
        dtype = type_of(parts)
        put = t.result(item.operands[0], dtype)
        a, b = t.value(item.operands[1], dtype), t.value(item.operands[2], np.uint32)
        most = 8 * dtype.itemsize

        def run(w):
            by = np.asarray(b(w))
            kept = function(a(w), np.minimum(by, most - 1).astype(dtype))
            if function is np.left_shift or dtype.kind == "u":
                kept = np.where(by >= most, dtype.type(0), kept)
            put(w, full(w, kept.astype(dtype)))

        return run

    return make


def _funnel_shift(t, item, parts):
    left, clamp = parts[1] == "l", parts[2] == "clamp"
    put = t.result(item.operands[0], np.uint32)
    low, high, by = (t.value(operand, np.uint32) for operand in item.operands[1:])

    def run(w):
        count = by(w).astype(np.uint64)
        count = np.minimum(count, 32) if clamp else count & np.uint64(31)
        both = np.asarray(high(w)).astype(np.uint64) << np.uint64(32) | low(w)
        both = (both << count) >> np.uint64(32) if left else both >> count
        put(w, full(w, both.astype(np.uint32)))

    return run


def _multiply(t, item, parts):
    """mul and mad: low, wide or high half of integers."""
    dtype = type_of(parts)
    if dtype.kind == "f" or parts[-1].endswith("x2"):
        return _multiply_floats(t, item, parts)
    mode = parts[1]
    size = 2 * dtype.itemsize
    wide = np.dtype(f"{dtype.kind}{size}" if size <= 8 else object)
    kept = wide if mode == "wide" else dtype
    put = t.result(item.operands[0], kept)
    a, b = (t.value(operand, dtype) for operand in item.operands[1:3])
    c = t.value(item.operands[3], kept) if len(item.operands) > 3 else None
    if wide.kind == "O" and mode == "wide":
        raise NotImplementedError(item.text)

    def run(w):
        if mode == "lo":
            product = a(w) * b(w)
        else:
            product = np.asarray(a(w)).astype(wide) * np.asarray(b(w)).astype(wide)
            if mode == "hi":
                by = 8 * dtype.itemsize
                by = by if wide.kind == "O" else wide.type(by)
                product = (product >> by).astype(dtype)
        put(w, full(w, product if c is None else product + c(w)))

    return run


def _multiply_floats(t, item, parts):
    if parts[-1] not in ("bf16x2", "f16x2"):
        return _elementwise(np.multiply)(t, item, parts)
    kind = parts[-1][:-2]
    put = t.result(item.operands[0], np.uint32)
    a, b = (t.value(operand, np.uint32) for operand in item.operands[1:])

    def run(w):
        halves = zip(unpack(a(w), kind), unpack(b(w), kind), strict=True)
        put(w, pack(*(x * y for x, y in halves), kind))

    return run


def unpack(pairs, kind):
    """The two 16-bit floats of each number, as float32."""
    halves = pairs.astype(np.uint16), (pairs >> np.uint32(16)).astype(np.uint16)
    return tuple(widen(half, kind) for half in halves)


def widen(bits, kind):
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x, kind):
    """float32 to the bits of a 16-bit float, to nearest even."""
    if kind == "f16":
        bits = x.astype(np.float16).view(np.uint16)
    else:
        wide = x.view(np.uint32)
        one = np.uint32(1)
        rounded = wide + np.uint32(0x7FFF) + (wide >> np.uint32(16) & one)
        bits = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def pack(low, high, kind):
    high = narrow(high, kind).astype(np.uint32) << np.uint32(16)
    return high | narrow(low, kind)


_TO_WHOLE = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _convert(t, item, parts):
    rounding = [_TO_WHOLE[p] for p in parts[1:] if p in _TO_WHOLE]
    to, source = [p for p in parts[1:] if p in TYPES]
    if to in ("bf16x2", "f16x2"):
        put = t.result(item.operands[0], np.uint32)
        high, low = (t.value(operand, np.float32) for operand in item.operands[1:])
        return lambda w: put(
            w, full(w, pack(full(w, low(w)), full(w, high(w)), to[:-2]))
        )
    put = t.result(item.operands[0], TYPES[to])
    value = t.value(item.operands[1], TYPES[source])
    if to in ("bf16", "f16"):
        return lambda w: put(w, narrow(full(w, value(w)), to))
    if source in ("bf16", "f16"):
        return lambda w: put(w, widen(value(w), source))
    target, origin = TYPES[to], TYPES[source]
    if origin.kind == "f" and target.kind != "f":
        (function,) = rounding
        limits = np.iinfo(target)

        def run(w):
            x = function(value(w)).astype(np.float64)
            x = np.where(np.isnan(x), 0, np.clip(x, limits.min, limits.max))
            put(w, full(w, x.astype(target)))

        return run
    if origin.kind == "f" and rounding:
        (function,) = rounding
        return lambda w: put(w, full(w, function(value(w)).astype(target)))
    return lambda w: put(w, full(w, np.asarray(value(w)).astype(target)))


_COMPARE = {
    "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _compare(name, dtype):
    if dtype.kind != "f":
        return _COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name.endswith("u") and name[:-1] in _COMPARE:
        ordered = _COMPARE[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":  # ordered, unlike NumPy's
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE[name]


def _set_predicate(t, item, parts):
    dtype = type_of(parts)
    compare = _compare(parts[1], dtype)
    joined = next((p for p in parts[2:-1] if p in ("and", "or", "xor")), None)
    target = item.operands[0]
    first, second = target if isinstance(target, tuple) else (target, None)
    puts = [t.result(name, bool) for name in (first, second) if name]
    a, b = (t.value(operand, dtype) for operand in item.operands[1:3])
    if joined is None:
        put = puts[0]
        if second is None:
            return lambda w: put(w, full(w, compare(a(w), b(w))))
    join = {None: lambda x, c: x, "and": np.logical_and, "or": np.logical_or,
            "xor": np.logical_xor}[joined]  # fmt: skip
    c = t.value(item.operands[3].lstrip("!"), bool) if joined else lambda w: None
    negated = joined is not None and item.operands[3].startswith("!")

    def run(w):
        found = compare(a(w), b(w))
        other = c(w)
        other = ~other if negated else other
        puts[0](w, full(w, join(found, other)))
        if second:
            puts[1](w, full(w, join(~found, other)))

    return run


def _select(t, item, parts):
    dtype = type_of(parts)
    put = t.result(item.operands[0], dtype)
    a, b = (t.value(operand, dtype) for operand in item.operands[1:3])
    p = t.value(item.operands[3], bool)
    return lambda w: put(w, np.where(p(w), a(w), b(w)))


def _permute(t, item, parts):
    if len(parts) > 2:
        raise NotImplementedError(item.text)
    put = t.result(item.operands[0], np.uint32)
    a, b, selector = (t.value(operand, np.uint32) for operand in item.operands[1:])

    def run(w):
        low, high = (np.asarray(x(w)).astype(np.uint64) for x in (a, b))
        both = high << np.uint64(32) | low
        choice = np.asarray(selector(w)).astype(np.uint64)
        found = np.zeros(w.size, np.uint64)
        for byte in range(4):
            nibble = choice >> np.uint64(4 * byte)
            value = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            sign = np.where(value >> np.uint64(7), np.uint64(255), np.uint64(0))
            value = np.where(nibble & np.uint64(8), sign, value)
            found |= value << np.uint64(8 * byte)
        put(w, found.astype(np.uint32))

    return run


def _bit_field_insert(a, b, position, length):
    position, length = position & np.uint32(255), length & np.uint32(255)
    mask = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(np.uint32)
    return (b & ~(mask << position)) | ((a & mask) << position)


def _bit_field_extract(a, position, length):
    if a.dtype.kind != "u":
        raise NotImplementedError("bfe of signed numbers")
    wide = a.astype(np.uint64) >> position.astype(np.uint64)
    mask = (np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)
    return (wide & mask).astype(a.dtype)


def _count_bits(x):
    return np.bitwise_count(x).astype(np.uint32)


def _leading_zeros(x):
    # Exact: a float64 has more digits than x.
    found = np.frexp(x.astype(np.float64))[1]
    return (32 - found).astype(np.uint32)


def _find_leading_one(t, item, parts):
    put = t.result(item.operands[0], np.uint32)
    value = t.value(item.operands[1], np.uint32)
    shifts = "shiftamt" in parts
    if parts[-1] != "u32":
        raise NotImplementedError(item.text)

    def run(w):
        x = value(w)
        zeros = _leading_zeros(x)
        found = zeros if shifts else np.uint32(31) - zeros
        put(w, np.where(x == 0, np.uint32(0xFFFFFFFF), found))

    return run


def _reverse_bits(x):
    found = np.zeros_like(x)
    for bit in range(32):
        found |= (x >> np.uint32(bit) & np.uint32(1)) << np.uint32(31 - bit)
    return found


def _lop3(t, item, parts):
    put = t.result(item.operands[0], np.uint32)
    a, b, c = (t.value(operand, np.uint32) for operand in item.operands[1:4])
    table = int(item.operands[4], 0)

    def run(w):
        x, y, z = a(w), b(w), c(w)
        found = np.zeros(w.size, np.uint32)
        for row in range(8):
            if table >> row & 1:
                found |= (
                    (x if row & 4 else ~x)
                    & (y if row & 2 else ~y)
                    & (z if row & 1 else ~z)
                )
        put(w, found)

    return run


def _maximum(t, item, parts):
    if type_of(parts).kind != "f":
        return _elementwise(np.maximum if parts[0] == "max" else np.minimum)(
            t, item, parts
        )
    nan = "NaN" in parts
    function = {
        ("max", False): np.fmax, ("min", False): np.fmin,
        ("max", True): np.maximum, ("min", True): np.minimum,
    }[parts[0], nan]  # fmt: skip
    return _elementwise(function)(t, item, parts)


def _move(t, item, parts):
    target, source = item.operands
    if isinstance(target, tuple) or isinstance(source, tuple):
        return _move_parts(t, target, source)
    dtype = type_of(parts)
    put, value = t.result(target, dtype), t.value(source, dtype)
    return lambda w: put(w, full(w, value(w)))


def _move_parts(t, target, source):
    """Between a register and the halves of it."""
    if isinstance(target, tuple):
        stored = t.stored(target[0])
        puts = [t.result(name, stored) for name in target]
        wide = np.dtype(f"u{stored.itemsize * len(target)}")
        value = t.value(source, wide)
        part = np.dtype(f"u{stored.itemsize}")

        def run(w):
            parts = np.ascontiguousarray(full(w, value(w))).view(part)
            for index, put in enumerate(puts):
                put(w, parts[index :: len(puts)].copy().view(stored))

        return run
    known = [name for name in source if t.is_register(name)]
    stored = (
        t.stored(known[0])
        if known
        else np.dtype(f"u{t.stored(target).itemsize // len(source)}")
    )
    wide = np.dtype(f"u{stored.itemsize * len(source)}")
    put = t.result(target, wide)
    values = [t.value(name, stored) for name in source]

    def join(w):
        parts = np.stack([full(w, value(w)) for value in values], axis=1)
        put(w, np.ascontiguousarray(parts).view(wide)[:, 0])

    return join


MAKERS = {
    "add": _elementwise(np.add),
    "sub": _elementwise(np.subtract),
    "mul": _multiply,
    "mad": _multiply,
    "fma": _elementwise(_fma),
    "div": _elementwise(_divide),
    "rem": _elementwise(_remainder),
    "abs": _elementwise(np.abs),
    "neg": _elementwise(np.negative),
    "min": _maximum,
    "max": _maximum,
    "and": _elementwise(np.bitwise_and),
    "or": _elementwise(np.bitwise_or),
    "xor": _elementwise(np.bitwise_xor),
    "not": _elementwise(np.invert),
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "shf": _funnel_shift,
    "lop3": _lop3,
    "prmt": _permute,
    "bfi": _elementwise(_bit_field_insert),
    "bfe": _elementwise(_bit_field_extract),
    "popc": _elementwise(_count_bits),
    "clz": _elementwise(_leading_zeros),
    "brev": _elementwise(_reverse_bits),
    "bfind": _find_leading_one,
    "ex2.approx": _elementwise(_approximate(np.exp2)),
    "lg2.approx": _elementwise(_approximate(np.log2)),
    "rcp": _elementwise(_approximate(np.reciprocal)),
    "rsqrt.approx": _elementwise(_approximate(lambda x: 1 / np.sqrt(x))),
    "sqrt": _elementwise(_approximate(np.sqrt)),
    "tanh.approx": _elementwise(_approximate(np.tanh)),
    "cvt": _convert,
    "mov": _move,
    "selp": _select,
    "setp": _set_predicate,
}
