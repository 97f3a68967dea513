"""How this machine reaches another. No torch."""

import ipaddress
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

import psutil

from medvlp.ranks import Ranks


@dataclass(frozen=True)
class Route:
    """How this machine reaches another: its own address on the way, and the interface that has it.

    Attributes:
        address: "" where there is no way. interface: "" of a loopback address, or of none.
    """

    address: str = ""
    interface: str = ""

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to this machine and no other."""
        return bool(self.address) and ipaddress.ip_address(self.address).is_loopback


def route_to(host: str) -> Route:
    """The way to a host, by the system's routing table; nothing is sent."""
    try:
        kind, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            address = str(probe.getsockname()[0])
    except OSError:
        return Route()
    if ipaddress.ip_address(address).is_loopback:
        return Route(address)
    names = [name for name, own in psutil.net_if_addrs().items() if address in {one.address for one in own}]
    return Route(address, names[0] if names else "")


def tell_gloo(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Have ranks of several nodes use the interface towards rank 0: GLOO_SOCKET_IFNAME, where it is not set.

    By itself gloo takes what the machine's own name resolves to, which on many is a loopback address.
    """
    if ranks.world_size > ranks.local_world_size and (interface := route_to(ranks.address).interface):
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
