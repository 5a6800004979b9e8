"""Named services: what a word in a network policy stands for, unless the node's configuration says else."""

from collections.abc import Mapping

__all__ = ["SERVICES"]

SERVICES: Mapping[str, tuple[str, ...]] = {
    "crates": ("crates.io:443", "*.crates.io:443"),
    "debian": ("*.debian.org:80", "*.debian.org:443"),
    "github": ("github.com:443", "*.github.com:443", "*.githubusercontent.com:443"),
    "go": ("proxy.golang.org:443", "sum.golang.org:443"),
    "huggingface": ("huggingface.co:443", "*.huggingface.co:443", "*.hf.co:443"),
    "npm": ("*.npmjs.org:443",),
    "pypi": (),
    "ubuntu": ("*.ubuntu.com:80", "*.ubuntu.com:443"),
}
"""Entries of each service. One without entries, and every one with a mirror, is for the node's
configuration: mirrors in private networks need an entry for their addresses beside their names."""
