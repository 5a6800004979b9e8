"""Images made by hand for tests: layers as tar, manifests, and the forms in which they travel."""

import gzip
import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field

from backports import zstd

from hadal.node.images.oci import machine

OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"


def digest_of(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def entry(name, content=b"", **attributes):
    """One entry of a layer: `type`, `linkname`, `mode`, `uid`, `pax_headers`, ... as of tarfile."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 1_600_000_000
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def folder(name, **attributes):
    return entry(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **attributes})


def layer(*entries):
    """A layer as an uncompressed tar."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


def as_gzip(data):
    return gzip.compress(data, 1, mtime=0)


def as_zstd(data):
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


@dataclass
class MadeImage:
    """An image: its blobs by digest, and its manifest."""

    layers: list
    compress: object = as_gzip
    settings: dict = field(default_factory=dict)
    blobs: dict = field(default_factory=dict)

    def __post_init__(self):
        self.diff_ids = [digest_of(data) for data in self.layers]
        self.packed = [self.compress(data) for data in self.layers]
        config = {
            "architecture": machine(),
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
            "config": self.settings,
        }
        self.config = self.add(config, f"{OCI}.config.v1+json")
        self.layer_descriptors = [
            self.add(data, f"{OCI}.layer.v1.tar+gzip") for data in self.packed
        ]
        self.remake()

    def add(self, content, kind):
        """Keep a blob; return its descriptor."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.blobs[digest_of(data)] = data
        return {"mediaType": kind, "digest": digest_of(data), "size": len(data)}

    def remake(self, **changes):
        """Make the manifest again, changed."""
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": self.config,
            "layers": self.layer_descriptors,
        }
        self.manifest = self.add(manifest | changes, f"{OCI}.manifest.v1+json")

    def index(self, *others):
        """A list with this image for this machine; others come before it."""
        own = self.manifest | {"platform": {"os": "linux", "architecture": machine()}}
        content = {"schemaVersion": 2, "manifests": [*others, own]}
        return self.add(content, f"{OCI}.index.v1+json")

    def write_layout(self, root, name="team/tool:1"):
        """As an OCI layout directory."""
        annotated = self.manifest | {"annotations": {"org.opencontainers.image.ref.name": name}}
        files = {
            "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
            "index.json": json.dumps({"schemaVersion": 2, "manifests": [annotated]}).encode(),
        }
        for digest, data in self.blobs.items():
            files[f"blobs/sha256/{digest[7:]}"] = data
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    def docker_save(self, name="team/tool:1"):
        """As the archive that `docker save` writes."""
        config = self.blobs[self.config["digest"]]
        paths = [f"{i}/layer.tar" for i in range(len(self.layers))]
        listed = [{"Config": "config.json", "RepoTags": [name], "Layers": paths}]
        entries = [
            entry("config.json", config),
            entry("manifest.json", json.dumps(listed).encode()),
        ]
        entries += [entry(path, data) for path, data in zip(paths, self.layers, strict=True)]
        return layer(*entries)


def small_image(**settings):
    """Two layers; the upper one changes, removes and hides."""
    return MadeImage(
        [
            layer(
                folder("etc"),
                entry("etc/kept", b"kept\n"),
                entry("etc/changed", b"old\n", mode=0o640, uid=12, gid=34),
                entry("etc/removed", b"x\n"),
                folder("hidden"),
                entry("hidden/old", b"x\n"),
                entry("link", type=tarfile.SYMTYPE, linkname="etc/kept"),
                entry("hard", type=tarfile.LNKTYPE, linkname="etc/kept"),
            ),
            layer(
                folder("etc"),
                entry("etc/changed", b"new\n"),
                entry("etc/.wh.removed"),
                folder("hidden"),
                entry("hidden/.wh..wh..opq"),
                entry("hidden/new", b"y\n"),
            ),
        ],
        settings=settings,
    )
