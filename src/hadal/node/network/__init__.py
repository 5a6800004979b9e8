"""Networks of boxes: start with `manager.NetworkManager`; docs/network.md says what policies mean."""

from hadal.node.network.config import NetworkConfig
from hadal.node.network.denials import Denial
from hadal.node.network.findings import Finding, probe
from hadal.node.network.handles import BoxNetwork, LiveNetwork, NetworkStatistics
from hadal.node.network.manager import NetworkManager
from hadal.node.network.taps import LENT_TAP

__all__ = [
    "LENT_TAP",
    "BoxNetwork",
    "Denial",
    "Finding",
    "LiveNetwork",
    "NetworkConfig",
    "NetworkManager",
    "NetworkStatistics",
    "probe",
]
