"""The interface that leads to another machine, and that gloo is told to use."""

import socket

import psutil
import pytest

from medvlp import network
from medvlp.network import Route, route_to, tell_gloo
from medvlp.ranks import Ranks


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_gloo_uses_the_interface_between_nodes_whoever_started_the_ranks(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "route_to", lambda host: Route("10.1.2.3", {"gpu01": "ib7"}[host]))
    several = Ranks(launcher, 3, 4, 1, 2, "gpu01", 29500)
    environment: dict[str, str] = {}
    tell_gloo(several, environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "ib7"}
    environment = {"GLOO_SOCKET_IFNAME": "eth5"}
    tell_gloo(several, environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth5"}


def test_gloo_is_left_alone_on_one_node_and_where_the_way_is_a_loopback() -> None:
    environment: dict[str, str] = {}
    tell_gloo(Ranks("torchrun", 1, 2, 1, 2, "127.0.0.1", 29500), environment)
    tell_gloo(Ranks("torchrun", 1, 2, 0, 1, "127.0.0.1", 29500), environment)
    assert environment == {}


def test_the_way_to_a_host() -> None:
    assert route_to("127.0.0.1") == Route("127.0.0.1", "")
    assert route_to("127.0.0.1").is_loopback
    assert route_to("no-such-host.invalid") == Route()
    own = {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not Route(address.address).is_loopback
    }
    for name, address in own.items():
        assert route_to(address) == Route(address, name)
