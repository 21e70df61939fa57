"""``hf-spot serve``: runs in a browser, read-only, for this machine alone unless more is asked for."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import logging
import os
import secrets
import socket
import socketserver
import sys
import webbrowser
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from hf_spot.commands.common import add_command, print_json, takes_json
from hf_spot.errors import ConfigError, StoreUnavailable

if TYPE_CHECKING:
    from hf_spot.economics.site import Answer, Site

log = logging.getLogger("hf_spot")

_HOST, _PORT = "127.0.0.1", 8467
_INTERVAL_S = 10.0
_REQUEST_TIMEOUT_S = 30.0  # for a browser to send its request
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
# Nothing is loaded from anywhere, and only the page's own script runs.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'nonce-{nonce}'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_to(commands: Any) -> None:
    """Add ``serve``."""
    serve = add_command(commands, "serve", _serve, "show runs in a browser: all at and below a URL, and a page for each")
    serve.add_argument("url", metavar="URL", help="s3://bucket/prefix, gs://…, az://…, hf://…, or a directory")
    serve.add_argument("--port", type=int, default=_PORT, help=f"port (default: {_PORT}; 0 takes a free one)")
    serve.add_argument("--host", default=_HOST, help=f"address to listen at (default: {_HOST}, only for this machine)")
    serve.add_argument(
        "--allow-others",
        action="store_true",
        help="accept a HOST that other machines can reach: there is no password, and whoever can reach it reads all runs",
    )
    serve.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that browsers know this server by, such as that of a proxy; repeatable",
    )
    serve.add_argument("--open", action="store_true", help="open a browser")
    serve.add_argument(
        "--interval-s", type=float, default=_INTERVAL_S, metavar="S", help="seconds between two looks of a page (default: 10)"
    )
    takes_json(serve)


def _serve(args: argparse.Namespace) -> int:
    from hf_spot.economics.site import Site

    if not args.interval_s > 0:
        raise ConfigError(f"--interval-s {args.interval_s:g} must be positive", hint=f"--interval-s {_INTERVAL_S:g}")
    site = Site(args.url, interval_s=args.interval_s)
    _tell_what_is_there(args)
    with _bound(args, site) as server:
        address = server.address
        if args.json:
            print_json({"url": args.url, "address": address})
        else:
            print(f"{args.url} is shown at {address} (Ctrl-C ends it)")
        sys.stdout.flush()
        if server.is_open_to_others:
            print("hf-spot: other machines can read all runs there: there is no password", file=sys.stderr)
        if args.open and not webbrowser.open(address):
            print(f"hf-spot: no browser was found: open {address}", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _tell_what_is_there(args: argparse.Namespace) -> None:
    """Say if there is no run, or the store does not answer now: pages show what will be there.

    Raises:
        SpotError: the URL or the store can't be used.
    """
    from hf_spot.run.below import what_is_there
    from hf_spot.run.run import Run

    run = Run(args.url)
    try:
        if run.state().number:
            return
        words, hint = what_is_there(args.url)
    except StoreUnavailable as error:
        words, hint = str(error.args[0]), error.hint or ""
    if "below it" not in words:
        print(f"hf-spot: {args.url}: {words}\n  Try: {hint}", file=sys.stderr)


def _bound(args: argparse.Namespace, site: Site) -> _Server:
    if not 0 <= args.port < 65536:
        raise ConfigError(f"--port {args.port} is not a port", hint=f"--port {_PORT}, or 0 for a free one")
    try:
        found = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {args.host} --port {args.port}: {error}", hint=f"--host {_HOST} --port {_PORT}") from error
    family, *_, address = found[0]
    is_local = all(ipaddress.ip_address(str(one[4][0]).partition("%")[0]).is_loopback for one in found)
    if not is_local and not args.allow_others:
        raise ConfigError(
            f"--host {args.host}: other machines could read all runs there, without a password",
            hint=f"ssh -L {args.port}:localhost:{args.port} this-machine, from the other machine; or add --allow-others",
        )
    try:
        return _Server(family, address, site, is_open_to_others=not is_local, names=[args.host, *args.name])
    except OSError as error:
        words = "is in use" if error.errno == errno.EADDRINUSE else f"can't be used: {os.strerror(error.errno or 0)}"
        raise ConfigError(f"{args.host}:{args.port} {words}", hint="--port 0, which takes a free one") from error


class _Server(socketserver.ThreadingTCPServer):
    """Serves a `Site`, one thread per request.

    Args:
        family: of the address.
        address: to listen at.
        site: makes the pages.
        is_open_to_others: whether other machines can reach it.
        names: that it may be called by, besides addresses.
    """

    allow_reuse_address = True
    daemon_threads = True  # a store that does not answer must not keep the process

    def __init__(self, family: int, address: Any, site: Site, *, is_open_to_others: bool, names: Collection[str]) -> None:
        self.address_family = family
        self.site = site
        self.is_open_to_others = is_open_to_others
        self._names = {name.lower().rstrip(".") for name in names} | {"localhost"}
        super().__init__(address, _Handler)

    @property
    def address(self) -> str:
        """Return the URL of the first page, as a browser on this machine reaches it."""
        host, port = str(self.server_address[0]), self.server_address[1]
        ip = ipaddress.ip_address(host)
        if ip.is_unspecified:
            host = "127.0.0.1" if ip.version == 4 else "::1"
        return f"http://{f'[{host}]' if ip.version == 6 else host}:{port}/"

    def answers_to(self, host: str) -> bool:
        """Return whether a request's ``Host`` is this server. Otherwise the name of another site could lead here, and its page
        would read what this one shows (DNS rebinding). An address can't be rebound."""
        name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower().rstrip(".") in self._names:
            return True
        try:
            ip = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.is_open_to_others or ip.is_loopback

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong in a request's thread; a browser that went away is not worth a line."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            log.warning("a request was not answered", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_TIMEOUT_S
    server: _Server
    server_version, sys_version = "hf-spot", ""

    def do_GET(self) -> None:
        self._answer(with_text=True)

    def do_HEAD(self) -> None:
        self._answer(with_text=False)

    def _answer(self, *, with_text: bool) -> None:
        nonce = secrets.token_urlsafe(16)
        host = self.headers.get("Host", "")
        if not self.server.answers_to(host):
            self._send(421, f"This server is not {host[:100]!r}. hf-spot serve --name NAME accepts another name.", "text/plain")
            return
        answer = self._asked(nonce)
        headers = {"Content-Security-Policy": _POLICY.format(nonce=nonce)}
        headers |= {"Location": answer.location} if answer.location else {}
        self._send(answer.status, answer.text if with_text else "", **headers)

    def _asked(self, nonce: str) -> Answer:
        from hf_spot.economics.site import Answer

        try:
            return self.server.site.answer(self.path, nonce)
        except Exception:  # whatever a run holds, the server and its other pages stay
            log.exception("the page %s can't be made", self.path)
            return Answer(500, "<!DOCTYPE html><title>hf_spot</title><main>This page can't be made: the log says why.</main>")

    def _send(self, status: int, text: str, kind: str = "", **headers: str) -> None:
        data = text.encode("utf-8", "replace")
        self.send_response(status)
        sent = {**_HEADERS, **headers, "Content-Length": str(len(data))}
        for name, value in (sent | ({"Content-Type": f"{kind}; charset=utf-8"} if kind else {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)
