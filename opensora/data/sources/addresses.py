"""Sessions that do not talk to private addresses: a list must not make this machine ask its own network."""

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

ALLOW = "set download.allow_private_hosts to allow it"


class RefusedError(Exception):
    """The address is private."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; an IPv4 address inside an IPv6 one counts as itself."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_global and not parsed.is_multicast


def open_session(allow_private: bool) -> Any:
    """A session of requests that raises RefusedError at a private address, unless it may talk to them.

    The address is looked at when the connection stands, before a byte is sent: so every redirect is checked, and a
    name that resolves to another address the second time gains nothing. Behind a proxy (HTTP_PROXY, …) only the proxy
    connects: there the addresses count to which this machine resolves the name, and a name that it cannot resolve is
    refused.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from requests.utils import select_proxy

    session = requests.Session()
    if allow_private:
        return session

    class PublicOnly(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = _public_pools()

        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:  # called at every hop
            if select_proxy(request.url, kwargs.get("proxies")):
                _check_name(urlsplit(request.url).hostname or "")
            return super().send(request, *args, **kwargs)

    for scheme in ("http://", "https://"):
        session.mount(scheme, PublicOnly())
    return session


def _public_pools() -> dict[str, Any]:
    """Pools of urllib3 whose connections refuse private addresses."""
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Public(HTTPConnection):
        def _new_conn(self) -> Any:
            return _checked(super()._new_conn(), self.host)

    class PublicSecure(HTTPSConnection):
        def _new_conn(self) -> Any:
            return _checked(super()._new_conn(), self.host)

    plain = type("PublicPool", (HTTPConnectionPool,), {"ConnectionCls": Public})
    secure = type("PublicSecurePool", (HTTPSConnectionPool,), {"ConnectionCls": PublicSecure})
    return {"http": plain, "https": secure}


def _checked(connection: Any, host: str) -> Any:
    address = str(connection.getpeername()[0])
    if is_public(address):
        return connection
    connection.close()
    raise RefusedError(f"{host} is a private address; {ALLOW}")


def _check_name(host: str) -> None:
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        what = f"{host} has no address that could be checked, and a proxy of the environment would ask for it"
        raise RefusedError(f"{what}; set download.allow_private_hosts to leave the check to the proxy") from None
    if not all(map(is_public, addresses)):
        raise RefusedError(f"{host} is a private address; {ALLOW}")
