# SPDX-License-Identifier: Apache-2.0
"""The web configuration file, and what it does over real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from daemon import webconfig
from daemon.errors import UnsupportedError, UsageError
from tests.daemon.test_server import PATIENCE, FakeSource, Running, is_cut_off, read_all, serving

# bcrypt at its lowest cost: "secret", and "other" at the next.
SECRET = "$2y$04$Img8DmS65mpTHblcXAVoUeIRNSOQWVkNnIjf6Dn1ju91fwsxVi17e"
OTHER = "$2b$05$2i2mNTG7oh35Sx6pvjrbnegeFw1Ux/NhdW6rtD6IxSp13mgKa3qZi"
USERS = f"basic_auth_users:\n  alice: {SECRET}\n  bob: {OTHER}\n"
TLS = "tls_server_config:\n  cert_file: server.pem\n  key_file: server.key\n"
MUTUAL = "  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority, a server and two clients, one of them of another authority."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl; install openssl")
    path = tmp_path_factory.mktemp("certificates")
    make(path, "ca", "-subj", "/CN=ca", "-addext", "keyUsage=keyCertSign")
    make(path, "stranger", "-subj", "/CN=stranger")
    by_ca = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
    for name in ("server", "renewed"):
        make(path, name, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", *by_ca)
    make(path, "client", "-subj", "/CN=client", "-addext", "extendedKeyUsage=clientAuth", *by_ca)
    return path


def make(folder: Path, name: str, *arguments: str) -> None:
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
    ]
    result = subprocess.run(
        [*command, "-keyout", f"{name}.key", "-out", f"{name}.pem", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def written(folder: Path, text: str) -> Path:
    path = folder / "web.yml"
    path.write_text(text)
    return path


def load(folder: Path, text: str) -> webconfig.WebConfig:
    return webconfig.load(written(folder, text))


def faults(folder: Path, text: str) -> list[str]:
    """Each fault as LINE: text."""
    with pytest.raises(UsageError) as failure:
        load(folder, text)
    prefix = f"{folder}/web.yml:"
    assert all(problem.startswith(prefix) for problem in str(failure.value).splitlines())
    return [problem.removeprefix(prefix) for problem in str(failure.value).splitlines()]


# The file

GOOD = {
    "nothing": "",
    "empty sections": "tls_server_config:\nhttp_server_config:\nbasic_auth_users:\n",
    "no tls": "tls_server_config: {}\n",
    "tls": TLS,
    "empty keys": TLS + "  client_ca_file:\n  cipher_suites:\n",
    "mutual": TLS + MUTUAL,
    "optional": TLS + "  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.pem\n",
    "none": TLS + "  client_auth_type: NoClientCert\n",
    "versions": TLS + "  min_version: TLS13\n  max_version: TLS13\n",
    "ciphers": TLS + "  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, TLS_AES_128_GCM_SHA256]\n",
    "tls 1.3 ciphers": TLS + "  cipher_suites: [TLS_AES_128_GCM_SHA256]\n",
    "server's order": TLS + "  prefer_server_cipher_suites: true\n",
    "http2": TLS + "http_server_config: {http2: true}\n",
    "headers": "http_server_config:\n  headers:\n    Strict-Transport-Security: max-age=31536000; includeSubDomains\n"
    "    X-Frame-Options: deny\n    X-Content-Type-Options: nosniff\n    X-XSS-Protection: 1; mode=block\n"
    "    Content-Security-Policy: default-src 'self'\n",
    "users": USERS,
    "no users": "basic_auth_users: {}\n",
}
BAD = {
    "key alone": ("tls_server_config:\n  key_file: server.key\n", ["1: tls_server_config: cert_file is missing"]),
    "neither": (
        "tls_server_config:\n  client_auth_type: NoClientCert\n",
        ["1: tls_server_config: cert_file is missing", "1: tls_server_config: key_file is missing"],
    ),
    "no such file": (
        "tls_server_config:\n  cert_file: gone.pem\n  key_file: /gone.key\n",
        ["2: tls_server_config.cert_file: {folder}/gone.pem cannot", "3: tls_server_config.key_file: /gone.key cannot"],
    ),
    "not a certificate": (
        "\ntls_server_config:\n  cert_file: server.key\n  key_file: server.key\n",
        ["2: tls_server_config: "],
    ),
    "not a pair": (
        "tls_server_config:\n  cert_file: server.pem\n  key_file: client.key\n",
        ["1: tls_server_config: "],
    ),
    "authority unused": (TLS + "  client_ca_file: ca.pem\n", ["4: tls_server_config.client_ca_file: nothing uses it"]),
    "auth type": (TLS + "  client_auth_type: Sometimes\n", ["4: tls_server_config.client_auth_type: 'Sometimes'"]),
    "version": (TLS + "  min_version: TLS99\n", ["4: tls_server_config.min_version: 'TLS99' is not known"]),
    "cipher": (TLS + "  cipher_suites: [RC4]\n", ["4: tls_server_config.cipher_suites[0]: 'RC4' is not known"]),
    "unknown keys": (
        "tls: {}\nhttp_server_config: {header: {}}\n",
        ["1: tls: unknown key", "2: http_server_config.header: unknown key"],
    ),
    "headers": (
        "http_server_config:\n  headers:\n    Server: x\n    X-Frame-Options: maybe\n",
        [
            "3: http_server_config.headers.Server: unknown header",
            "4: http_server_config.headers.X-Frame-Options: 'maybe'",
        ],
    ),
    "hash": ("basic_auth_users:\n  alice: secret\n", ["2: basic_auth_users.alice: not a bcrypt hash"]),
    "user twice": (USERS + f"  alice: {OTHER}\n", ["4: basic_auth_users.alice: given twice"]),
    "shape": ("- tls_server_config\n", ["1: found a list"]),
    "not yaml": ("a: b: c\n", ["1: not valid YAML"]),
    "everything at once": (
        "tls_server_config:\n  cert_file: 1\n  min_version: x\nbasic_auth_users: {a: b}\nfoo:\n",
        [
            "1: tls_server_config: key_file is missing",
            "2: tls_server_config.cert_file: found a whole number",
            "3: tls_server_config.min_version: 'x'",
            "4: basic_auth_users.a: not a bcrypt hash",
            "5: foo: unknown key",
        ],
    ),
}
# What the format has and this server has not.
UNSUPPORTED = {
    "certificate inside": ("tls_server_config: {cert: x, key: y}\n", ["cert: not supported", "key: not supported"]),
    "any certificate": (
        TLS + "  client_auth_type: RequireAnyClientCert\n",
        ["client_auth_type: 'RequireAnyClientCert'"],
    ),
    "no authority": (
        TLS + "  client_auth_type: RequireAndVerifyClientCert\n",
        ["client_auth_type: no authority to verify with"],
    ),
    "names": (TLS + MUTUAL + "  client_allowed_sans: [a]\n", ["client_allowed_sans: not supported here"]),
    "curves": (TLS + "  curve_preferences: [X25519]\n", ["curve_preferences: not supported here"]),
    "rate": ("rate_limit: {burst: 1}\n", ["rate_limit: not supported here"]),
    "old version": (TLS + "  min_version: TLS10\n", ["min_version: 'TLS10' is not known"]),
    "no version left": (TLS + "  min_version: TLS13\n  max_version: TLS12\n", ["no version of TLS is left"]),
    "ciphers of another version": (
        TLS + "  cipher_suites: [TLS_AES_128_GCM_SHA256]\n  max_version: TLS12\n",
        ["no version of TLS is left"],
    ),
    "line break in a header": (
        'http_server_config: {headers: {X-XSS-Protection: "1\\r\\nX: y"}}\n',
        ["X-XSS-Protection: not a header's value"],
    ),
    "colon in a name": (f'basic_auth_users: {{"a:b": {SECRET}}}\n', ["no user can log in by this name"]),
    "salt": (f"basic_auth_users: {{a: {SECRET[:28]}9{SECRET[29:]}}}\n", ["a: not a bcrypt hash"]),
}


def needs_bcrypt(text: str) -> None:
    if "basic_auth_users:" in text:
        pytest.importorskip("bcrypt", reason="install python3-bcrypt")


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD.keys())
def test_good_file(folder: Path, text: str) -> None:
    needs_bcrypt(text)
    web = load(folder, text)
    assert bool(web.context) == ("cert_file" in text)


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_file(folder: Path, text: str, expected: Sequence[str]) -> None:
    needs_bcrypt(text)
    found = faults(folder, text)
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start.format(folder=folder))
        assert "; " in problem  # the remedy


@pytest.mark.parametrize(("text", "expected"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported(folder: Path, text: str, expected: Sequence[str]) -> None:
    needs_bcrypt(text)
    found = "\n".join(faults(folder, text))
    assert all(part in found for part in expected), found


@pytest.mark.prometheus
@pytest.mark.parametrize(
    ("text", "good"),
    [*((text, True) for text in GOOD.values()), *((text, False) for text, _ in BAD.values())],
    ids=[*GOOD, *(f"bad {name}" for name in BAD)],
)
def test_promtool_agrees(folder: Path, text: str, good: bool) -> None:
    promtool = shutil.which("promtool", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not promtool:
        pytest.skip("needs promtool; install prometheus")
    result = subprocess.run(
        [promtool, "check", "web-config", written(folder, text)], capture_output=True, text=True, check=False
    )
    assert (result.returncode == 0) == good, result.stdout + result.stderr


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"web\.yml: cannot be read \(No such file or directory\); correct"):
        webconfig.load(tmp_path / "web.yml")
    (tmp_path / "web.yml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        webconfig.load(tmp_path / "web.yml")


def test_missing_bcrypt_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcrypt", None)
    with pytest.raises(UnsupportedError, match="install python3-bcrypt"):
        load(tmp_path, USERS)
    load(tmp_path, "")


def test_key_with_a_password_is_refused_without_asking(folder: Path) -> None:
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", "server.key", "-out", "locked.key", "-passout", "pass:x"],
        cwd=folder,
        check=True,
    )
    (problem,) = faults(folder, TLS.replace("server.key", "locked.key"))
    assert problem.startswith("1: tls_server_config: ")


# TLS


def client_context(folder: Path, certificate: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    if certificate:
        context.load_cert_chain(folder / f"{certificate}.pem", folder / f"{certificate}.key")
    return context


def get(running: Running, context: ssl.SSLContext) -> tuple[int, str]:
    """The status and the server's common name."""
    connection = http.client.HTTPSConnection("127.0.0.1", running.port, timeout=PATIENCE, context=context)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        assert isinstance(connection.sock, ssl.SSLSocket)
        certificate: Any = connection.sock.getpeercert()
        (((_, name),),) = certificate["subject"]
        return connection.getresponse().status, name


def test_tls(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(web=load(folder, TLS)) as running:
        assert get(running, client_context(folder)) == (200, "server")
        assert capsys.readouterr().out == f"listening on https://127.0.0.1:{running.port}\n"


def test_large_answer_over_tls(folder: Path) -> None:
    with serving(FakeSource(series=50_000), web=load(folder, TLS)) as running, connected(running, folder) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(client).endswith(b'{number="49999"} 49999\n')


def connected(running: Running, folder: Path) -> ssl.SSLSocket:
    return client_context(folder).wrap_socket(running.connect(), server_hostname="127.0.0.1")


@pytest.mark.parametrize("certificate", ["", "stranger", "client"])
def test_client_certificates(folder: Path, certificate: str) -> None:
    with serving(web=load(folder, TLS + MUTUAL)) as running:
        context = client_context(folder, certificate)
        if certificate == "client":
            assert get(running, context) == (200, "server")
        else:
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                get(running, context)
        assert get(running, client_context(folder, "client"))[0] == 200


@pytest.mark.parametrize(("certificate", "fine"), [("", True), ("client", True), ("stranger", False)])
def test_optional_client_certificates(folder: Path, certificate: str, fine: bool) -> None:
    text = TLS + "  client_auth_type: VerifyClientCertIfGiven\n  client_ca_file: ca.pem\n"
    with serving(web=load(folder, text)) as running:
        if fine:
            assert get(running, client_context(folder, certificate))[0] == 200
        else:
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                get(running, client_context(folder, certificate))


def test_versions_and_ciphers(folder: Path) -> None:
    text = TLS + "  max_version: TLS12\n  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384]\n"
    with serving(web=load(folder, text)) as running, connected(running, folder) as client:
        assert client.version() == "TLSv1.2"
        cipher = client.cipher()
        assert cipher
        assert cipher[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"


def test_clients_that_do_not_finish_the_handshake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.server.REQUEST_SECONDS", 0.3)
    with serving(web=load(folder, TLS)) as running:
        with running.connect() as silent, running.connect() as plain:
            plain.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert is_cut_off(plain)
            assert is_cut_off(silent)
        with connected(running, folder) as client:
            client.sendall(b"GET /met")
            assert is_cut_off(client)
        assert get(running, client_context(folder))[0] == 200


def test_stop_with_tls_clients_connected(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        with serving(web=load(folder, TLS)) as running:
            client = stack.enter_context(connected(running, folder))
            stack.enter_context(running.connect())  # its handshake never comes
            assert get(running, client_context(folder))[0] == 200
        assert is_cut_off(client)


def test_reload_takes_new_certificates(folder: Path) -> None:
    with serving(web=load(folder, TLS)) as running:
        written(folder, TLS.replace("server.", "renewed.") + "http_server_config: {headers: {X-Frame-Options: deny}}\n")
        running.call(running.server.reload)
        assert get(running, client_context(folder)) == (200, "renewed")
        written(folder, TLS.replace("server.key", "client.key"))
        running.call(running.server.reload)
        assert running.notify.said[-1].startswith(f"ready configuration not read again: {folder}/web.yml:1:")
        assert get(running, client_context(folder)) == (200, "renewed")
        written(folder, "")
        running.call(running.server.reload)
        assert "TLS cannot be switched on or off by a reload" in running.notify.said[-1]
        assert running.source.reloads == 1


# Passwords


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (basic("alice", "secret"), 200),
        (basic("bob", "other"), 200),
        (basic("alice", "other"), 401),
        (basic("alice", ""), 401),
        (basic("eve", "secret"), 401),
        (basic("", "secret"), 401),
        (basic("alice", "secret" + "x" * 100), 401),
        (basic("alice", "secret\0"), 401),
        ({"Authorization": basic("alice", "secret")["Authorization"].replace("Basic", "bAsIc ")}, 200),
        ({"Authorization": basic("alice", "secret")["Authorization"].replace("Basic", "Bearer")}, 401),
        ({"Authorization": "Basic"}, 401),
        ({"Authorization": "Basic ????"}, 401),
        ({"Authorization": "Basic YWxpY2U="}, 401),  # alice without a colon
    ],
)
def test_basic_authentication(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    pytest.importorskip("bcrypt", reason="install python3-bcrypt")
    with serving(web=load(tmp_path, USERS)) as running:
        for path in ("/metrics", "/-/healthy", "/nothing"):
            response, body = running.get(path, headers)
            if status == 200:
                assert response.status == (404 if path == "/nothing" else 200)
            else:
                assert (response.status, body) == (401, b"a user and a password are needed\n")
                assert response.headers["WWW-Authenticate"] == 'Basic realm="bpfmetricsd", charset="UTF-8"'


def test_headers_go_on_every_answer(tmp_path: Path) -> None:
    text = (
        "http_server_config:\n  headers:\n    Content-Security-Policy: default-src 'self'\n    X-Frame-Options: deny\n"
    )
    with serving(web=load(tmp_path, text)) as running:
        for path in ("/", "/metrics", "/nothing"):
            headers = running.get(path)[0].headers
            assert headers.get_all("Content-Security-Policy") == ["default-src 'self'"]
            assert headers["X-Frame-Options"] == "deny"
            assert headers["X-Content-Type-Options"] == "nosniff"


class FakeBcrypt:
    """Right when the password is in the hash; counts the checks."""

    def __init__(self) -> None:
        self.checked: list[tuple[bytes, bytes]] = []

    def checkpw(self, password: bytes, hashed: bytes) -> bool:
        self.checked.append((password, hashed))
        return hashed.endswith(b"=" + password)


def header(user: str, password: str) -> bytes:
    return basic(user, password)["Authorization"].encode()


def statuses(auth: webconfig.BasicAuth, *headers: bytes | None) -> list[int]:
    """The answers to requests that come all at once."""

    async def ask() -> list[int]:
        return await asyncio.gather(*(auth.status(header) for header in headers))

    return asyncio.run(ask())


def test_only_right_passwords_are_remembered() -> None:
    fake = FakeBcrypt()
    auth = webconfig.BasicAuth({b"alice": b"$2b$04$=secret"}, fake.checkpw)
    for _ in range(3):
        assert statuses(auth, header("alice", "secret")) == [200]
    assert len(fake.checked) == 1
    for _ in range(3):
        assert statuses(auth, header("alice", "wrong")) == [401]
    assert len(fake.checked) == 4


def test_memory_of_passwords_is_bounded() -> None:
    users = {f"user{i}".encode(): b"$2b$04$=secret" for i in range(200)}
    auth = webconfig.BasicAuth(users, FakeBcrypt().checkpw)
    for i in range(200):
        assert statuses(auth, header(f"user{i}", "secret")) == [200]
    assert len(auth._known) == webconfig.CACHED_LOGINS


def test_unknown_users_cost_the_slowest_check() -> None:
    fake = FakeBcrypt()
    auth = webconfig.BasicAuth({b"alice": b"$2b$04$=secret", b"bob": b"$2b$12$=other"}, fake.checkpw)
    assert statuses(auth, header("eve", "other")) == [401]
    assert statuses(auth, header("eve", "other")) == [401]
    assert fake.checked == [(b"other", b"$2b$12$=other")] * 2


def test_long_passwords_cost_a_check_and_are_refused() -> None:
    fake = FakeBcrypt()
    right = "x" * webconfig.PASSWORD_BYTES
    auth = webconfig.BasicAuth({b"alice": b"$2b$04$=" + right.encode()}, fake.checkpw)
    assert statuses(auth, header("alice", right + "y")) == [401]
    assert statuses(auth, header("alice", right)) == [200]
    assert len(fake.checked) == 2


def test_a_flood_of_passwords_waits_in_a_short_line() -> None:
    gate = threading.Event()
    auth = webconfig.BasicAuth({b"alice": b"$2b$04$=secret"}, lambda *_: gate.wait(PATIENCE) and False)

    async def flood() -> list[int]:
        tasks = [asyncio.create_task(auth.status(header("eve", str(i)))) for i in range(100)]
        await asyncio.sleep(0)  # each has come to its turn or to the end of the line
        gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(flood()) == [401] * webconfig.WAITING_LOGINS + [503] * (100 - webconfig.WAITING_LOGINS)


def test_busy_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bcrypt", reason="install python3-bcrypt")
    monkeypatch.setattr(webconfig, "WAITING_LOGINS", 0)
    with serving(web=load(tmp_path, USERS)) as running:
        response, body = running.get("/", basic("alice", "secret"))
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert body == b"too many passwords wait to be checked; try again\n"


def test_client_that_leaves_before_its_password_is_checked(tmp_path: Path) -> None:
    pytest.importorskip("bcrypt", reason="install python3-bcrypt")
    with serving(web=load(tmp_path, USERS)) as running:
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", running.port)) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: " + header("eve", "x") + b"\r\n\r\n")
        assert running.get("/", basic("alice", "secret"))[0].status == 200
