"""Brings up the loopback device of a new network namespace, then becomes a program.

``unshare --net python scripts/loopback.py PROGRAM [ARGUMENTS]``: for a program that
talks to itself over the network, as Bazel does, and shall have no other.
"""

import fcntl
import os
import socket
import struct
import sys

_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1


def main() -> None:
    with socket.socket() as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack(
            "16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
        )
        request = struct.pack("16sh14x", b"lo", flags | _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
