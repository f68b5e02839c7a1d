# SPDX-License-Identifier: Apache-2.0
"""TLS, client certificates and passwords, from the web configuration file that Prometheus exporters share.

The format is that of prometheus/exporter-toolkit, docs/web-configuration.md. What this server cannot do is a
fault in the file and never ignored, because most of these keys restrict access.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
import secrets
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from daemon.errors import UnsupportedError, UsageError
from daemon.fields import Faults, Field, Fields, compose, kind_of, read_bool, read_choice, read_items, read_mapping

import_module("concurrent.futures.thread")  # or asyncio.to_thread does, when the folder may be closed to our user

CACHED_LOGINS = 64
WAITING_LOGINS = 32
PASSWORD_BYTES = 72  # bcrypt reads no further

_VERSIONS = {"TLS12": ssl.TLSVersion.TLSv1_2, "TLS13": ssl.TLSVersion.TLSv1_3}
_CLIENT_AUTH = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
# Go's names and OpenSSL's. Those of TLS 1.3 cannot be chosen, there as here.
_CIPHERS = {
    "TLS_AES_128_GCM_SHA256": "",
    "TLS_AES_256_GCM_SHA384": "",
    "TLS_CHACHA20_POLY1305_SHA256": "",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
# The headers that may be set, and the values of those that have few.
_HEADERS: Mapping[str, tuple[str, ...]] = {
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
    "Content-Security-Policy": (),
}
_UNSUPPORTED = {
    "cert": "write the certificate to a file and name it with cert_file",
    "key": "write the key to a file and name it with key_file",
    "client_ca": "write the certificates to a file and name it with client_ca_file",
    "client_allowed_sans": "remove it, and give the clients a certificate authority of their own",
    "curve_preferences": "remove it",
    "rate_limit": "remove it; scrapes of the same moment share one reading",
}
_TLS_KEYS = ("cert_file", "key_file", "client_auth_type", "client_ca_file", "min_version", "max_version")
_TLS_LISTS = ("cipher_suites", "prefer_server_cipher_suites")
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")

CheckPassword = Callable[[bytes, bytes], bool]


@dataclass(frozen=True, slots=True)
class Tls:
    cert: Path
    key: Path
    client_auth: ssl.VerifyMode = ssl.CERT_NONE
    client_ca: Path | None = None
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ciphers: tuple[str, ...] = ()

    def apply(self, context: ssl.SSLContext) -> None:
        """Raises OSError (ssl.SSLError is one) or ValueError."""
        context.load_cert_chain(self.cert, self.key, password=lambda: "")  # without it, OpenSSL asks on the terminal
        if self.client_ca:
            context.load_verify_locations(self.client_ca)
        context.verify_mode = self.client_auth
        context.minimum_version = self.minimum
        context.maximum_version = self.maximum
        if self.ciphers:
            context.set_ciphers(":".join(self.ciphers))
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])


class BasicAuth:
    """Checks passwords against bcrypt hashes, one at a time and in a thread, and remembers the right ones."""

    def __init__(self, users: Mapping[bytes, bytes], checkpw: CheckPassword) -> None:
        self._users = users
        self._checkpw = checkpw
        self._slowest = max(users.values(), key=lambda hashed: hashed[4:6])
        self._secret = secrets.token_bytes(32)
        self._known: dict[bytes, None] = {}
        self._waiting = 0
        self._one = asyncio.Lock()

    async def status(self, authorization: bytes | None) -> int:
        """200, 401, or 503 while too many passwords wait to be checked."""
        credentials = _credentials(authorization)
        if credentials is None:
            return 401
        user, password = credentials
        # An unknown user costs as much time as a known one, or the names could be guessed.
        hashed = self._users.get(user, self._slowest)
        key = hmac.digest(self._secret, b":".join((user, hashed, password)), "sha256")
        if key in self._known:
            return 200
        if self._waiting >= WAITING_LOGINS:
            return 503
        self._waiting += 1
        try:
            async with self._one:
                right = await asyncio.to_thread(self._matches, password, hashed)
        finally:
            self._waiting -= 1
        if not right or user not in self._users:
            return 401
        if len(self._known) >= CACHED_LOGINS:
            self._known.pop(next(iter(self._known)))
        self._known[key] = None
        return 200

    def _matches(self, password: bytes, hashed: bytes) -> bool:
        usable = len(password) <= PASSWORD_BYTES and b"\0" not in password
        return self._checkpw(password[:PASSWORD_BYTES].replace(b"\0", b"?"), hashed) and usable


class WebConfig:
    """What the file at `path` says: `context` is None without TLS, `headers` go on every answer."""

    def __init__(self, path: Path, tls: Tls | None, headers: Mapping[bytes, bytes], auth: BasicAuth | None) -> None:
        self.path = path
        self.headers = headers
        self._tls = tls
        self._auth = auth
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if tls and self.context:
            tls.apply(self.context)

    async def authorize(self, authorization: bytes | None) -> int:
        """The HTTP status that a request with this Authorization header deserves: 200, 401 or 503."""
        return await self._auth.status(authorization) if self._auth else 200

    def renew(self) -> None:
        """Read the file and the certificates again, for new connections. UsageError: all stays as it was."""
        new = load(self.path)
        if bool(new.context) != bool(self.context):
            raise UsageError(f"{self.path}: TLS cannot be switched on or off by a reload; restart the service")
        if new._tls and self.context:
            new._tls.apply(self.context)
        self.headers, self._tls, self._auth = new.headers, new._tls, new._auth


def load(path: Path) -> WebConfig:
    """Read and check the file. UsageError has a line for each fault; UnsupportedError: bcrypt is missing."""
    faults = Faults(str(path))
    try:
        node = compose(path.read_text(encoding="utf-8"), faults)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{path}: cannot be read ({reason}); correct server.web_config, or the file") from None
    root = Field(node, "", 1, faults) if node else None
    fields = _mapping(root, "tls_server_config", "http_server_config", "basic_auth_users", "rate_limit")
    tls = _read_tls(fields.get("tls_server_config"), path.parent)
    headers = _read_headers(fields.get("http_server_config"))
    users = _read_users(fields.get("basic_auth_users"))
    faults.raise_any()
    auth = BasicAuth(users, _bcrypt().checkpw) if users else None
    try:
        return WebConfig(path, tls, headers, auth)
    except (OSError, ValueError) as error:
        line = fields["tls_server_config"].line
        raise UsageError(f"{path}:{line}: tls_server_config: {_reason(error)}; check the files that it names") from None


def _mapping(found: Field | None, *known: str) -> dict[str, Field]:
    """The known keys of a mapping without those that mean nothing (`key:`), and a fault for what is not supported."""
    fields = read_mapping(found, "key", known)
    for key, field in fields.items():
        if key in _UNSUPPORTED:
            field.fault("not supported here", _UNSUPPORTED[key])
    return {key: field for key, field in fields.items() if kind_of(field.node) != "null"}


def _read_tls(found: Field | None, folder: Path) -> Tls | None:
    fields = _mapping(found, *_TLS_KEYS, *_TLS_LISTS, *_UNSUPPORTED)
    if found is None or not fields.keys() & {"cert_file", "key_file", "client_ca_file", "client_auth_type"}:
        return None
    for key in ("cert_file", "key_file"):
        if key not in fields:
            found.fault(f"{key} is missing", "name both cert_file and key_file")
    cert, key_, ca = (_read_file(fields.get(key), folder) for key in ("cert_file", "key_file", "client_ca_file"))
    client_auth = _CLIENT_AUTH[read_choice(fields.get("client_auth_type"), "NoClientCert", _CLIENT_AUTH)]
    if client_auth == ssl.CERT_NONE and "client_ca_file" in fields:
        fields["client_ca_file"].fault("nothing uses it", "set client_auth_type to RequireAndVerifyClientCert")
    if client_auth != ssl.CERT_NONE and "client_ca_file" not in fields:
        fields["client_auth_type"].fault("no authority to verify with", "name its certificates with client_ca_file")
    minimum = _VERSIONS[read_choice(fields.get("min_version"), "TLS12", _VERSIONS)]
    maximum = _VERSIONS[read_choice(fields.get("max_version"), "TLS13", _VERSIONS)]
    ciphers = _read_ciphers(fields.get("cipher_suites"))
    if ciphers and not any(ciphers):  # only those of TLS 1.3
        minimum = ssl.TLSVersion.TLSv1_3
    if minimum > maximum:
        found.fault("no version of TLS is left", "let min_version be at most max_version, with a cipher suite for it")
    read_bool(fields.get("prefer_server_cipher_suites"), True)  # deprecated: it is so
    if cert is None or key_ is None:
        return None
    return Tls(cert, key_, client_auth, ca, minimum, maximum, tuple(filter(None, ciphers)))


def _read_file(found: Field | None, folder: Path) -> Path | None:
    if found is None or not found.expect("write the path of a file", "str"):
        return None
    path = folder / str(found.node.value)
    try:
        path.open("rb").close()
    except (OSError, ValueError) as error:
        found.fault(f"{path} cannot be read ({_reason(error)})", "correct the path or its permissions")
    return path


def _read_ciphers(found: Field | None) -> tuple[str, ...]:
    if found is None or not found.expect("write a list of cipher suites", "seq"):
        return ()
    names = read_items(found, len(_CIPHERS), lambda item: read_choice(item, "", _CIPHERS) or None)
    return tuple(_CIPHERS[name] for name in names)


def _read_headers(found: Field | None) -> dict[bytes, bytes]:
    fields = _mapping(found, "headers", "http2")
    read_bool(fields.get("http2"), True)  # it is an offer; this server answers in HTTP/1.1
    headers = {}
    for name, field in read_mapping(fields.get("headers"), "header", _HEADERS).items():
        values = _HEADERS[name]
        text = read_choice(field, "", values) if values else _read_text(field)
        headers[name.lower().encode()] = text.encode()
    return headers


def _read_text(found: Field) -> str:
    allowed = "write printable ASCII text"
    if not found.expect(allowed, "str", "int"):
        return ""
    text: str = found.node.value
    if not (text.isascii() and text.isprintable() and text.strip() == text):
        found.fault("not a header's value", allowed)
    return text


def _read_users(found: Field | None) -> dict[bytes, bytes]:
    names = [key.value for key, _ in found.node.value] if found and kind_of(found.node) == "map" else []
    users = {}
    fields: Fields = read_mapping(found, "user", names)
    for name, field in fields.items():
        allowed = "write what htpasswd -nBC 10 NAME prints after the colon"
        if not field.expect(allowed, "str"):
            continue
        hashed: str = field.node.value
        if not _BCRYPT.fullmatch(hashed) or not _usable(hashed.encode()):
            field.fault("not a bcrypt hash", allowed)
        elif not name or ":" in name:
            field.fault("no user can log in by this name", "remove the colon, or name the user")
        users[name.encode()] = hashed.encode()
    return users


def _usable(hashed: bytes) -> bool:
    """Whether bcrypt takes the salt as it is: tried at the lowest cost."""
    try:
        return bool(_bcrypt().hashpw(b"", b"$2b$04$" + hashed[7:])[7:29] == hashed[7:29])
    except ValueError:
        return False


def _bcrypt() -> Any:
    try:
        return import_module("bcrypt")
    except ImportError:
        raise UnsupportedError("basic_auth_users needs the module bcrypt; install python3-bcrypt") from None


def _credentials(authorization: bytes | None) -> tuple[bytes, bytes] | None:
    """User and password of `Basic BASE64` (RFC 7617), or None."""
    scheme, _, encoded = (authorization or b"").partition(b" ")
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True)
    except binascii.Error:
        return None
    user, colon, password = decoded.partition(b":")
    return (user, password) if scheme.lower() == b"basic" and colon else None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
