"""Links whose other end is a file: what a virtual machine has instead of a namespace with a link in it."""

import fcntl
import os
import struct

__all__ = ["LENT_TAP", "leave_tap", "make_tap"]

LENT_TAP = "tap0"
"""What a link is called where somebody opens it by its name."""

_SET_IFF, _SET_INDEX, _SET_HEADER_SIZE = 0x400454CA, 0x400454DA, 0x400454D8
_SET_PERSISTENT, _SET_OWNER = 0x400454CB, 0x400454CC
_TAP, _NO_INFORMATION, _VNET_HEADER = 0x0002, 0x1000, 0x4000
_HEADER_BYTES = 12
"""Of struct virtio_net_hdr_mrg_rxbuf, which tells the other side what of a packet is left to it."""


def make_tap(name: str, index: int) -> int:
    """Make a link in the namespace of the calling thread, and return the file at its other end.

    The link is there as long as somebody has that open, and is still down.

    Args:
        name: At most 15 characters.
        index: Of the link, so that nobody has to ask for it.

    Raises:
        OSError: There is such a link (EBUSY, EEXIST), or this kernel has none.
    """
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(file, _SET_INDEX, struct.pack("I", index))
        flags = _TAP | _NO_INFORMATION | _VNET_HEADER
        fcntl.ioctl(file, _SET_IFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(file, _SET_HEADER_SIZE, struct.pack("i", _HEADER_BYTES))
    except BaseException:
        os.close(file)
        raise
    return file


def leave_tap(file: int, owner: int) -> None:
    """Let go of a tap, whose link stays, and a user may open it by its name.

    Args:
        file: Of it; the descriptor stays the caller's, and is one of nothing.
        owner: Id of the user.

    Raises:
        OSError: The kernel refuses it.
    """
    fcntl.ioctl(file, _SET_OWNER, owner)
    fcntl.ioctl(file, _SET_PERSISTENT, 1)
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, file, inheritable=False)
    os.close(nothing)
