"""Bazel's own providers, by names that defs.bzl can give back."""

native_cc_common = cc_common
NativeCcInfo = CcInfo
