"""Images: root file systems for boxes, pulled, imported or built, kept by content, mounted once.

Start with `ImageStore` (store.py).
"""

from hadal.node.images.recipes import Recipe, Step
from hadal.node.images.records import Bind, ImageConfig, ImageRecord
from hadal.node.images.registry import RegistrySettings
from hadal.node.images.resolved import ResolvedImage
from hadal.node.images.store import HOST, ImageStore, default_folder

__all__ = [
    "HOST",
    "Bind",
    "ImageConfig",
    "ImageRecord",
    "ImageStore",
    "Recipe",
    "RegistrySettings",
    "ResolvedImage",
    "Step",
    "default_folder",
]
