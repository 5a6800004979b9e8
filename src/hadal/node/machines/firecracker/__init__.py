"""Firecracker: microVMs on hosts with KVM. Not yet run on real hardware (docs/machines.md)."""
