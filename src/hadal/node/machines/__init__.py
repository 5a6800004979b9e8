"""Boxes with a kernel of their own: virtual machines under QEMU."""
