"""What Bazel 4 has built in, by the names of rules_cc, which it would download."""

load(":native.bzl", "NativeCcInfo", "native_cc_common")

cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_proto_library = native.cc_proto_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
objc_library = native.objc_library

CcInfo = NativeCcInfo
cc_common = native_cc_common
