# SPDX-License-Identifier: Apache-2.0
"""The configuration file: what is accepted, and that every fault is named at once with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from daemon.config import CollectorConfig, Config, Listen, ServerConfig, load, parse
from daemon.declare import Option
from daemon.errors import UsageError
from daemon.fields import parse_duration

SHIPPED = Path(__file__).parents[2] / "config" / "bpfmetricsd.yaml"
EVENTS_OFF = Option("events", "bool", False, "")
OPTIONS: dict[str, tuple[Option, ...]] = {
    "biolatency": (
        Option("max_devices", "int", 64, "", minimum=1, maximum=1024),
        Option("max_inflight", "int", 16384, "", minimum=256, maximum=1048576),
    ),
    "runqlat": (
        Option("by", "choice", "none", "", choices=("none", "cgroup")),
        Option("max_cgroups", "int", 256, "", minimum=16, maximum=4096),
    ),
    "tcpretrans": (
        Option("by", "choice", "none", "", choices=("none", "remote_subnet", "local_port")),
        EVENTS_OFF,
    ),
    "cachestat": (),
    "oomkill": (Option("events", "bool", True, ""),),
    "tcplife": (
        Option("local_ports", "ports", (), "", maximum=64),
        Option("max_connections", "int", 16384, "", minimum=256, maximum=1048576),
        EVENTS_OFF,
    ),
}
KNOWN = "biolatency, cachestat, oomkill, runqlat, tcplife, tcpretrans"
LISTEN = 'write ADDRESS:PORT such as 127.0.0.1:10435 or "[::1]:10435", ":10435" for all addresses, or fd://'
ONE = "collectors: {cachestat: {}}\n"  # line 1 of most tests
# No deadline: a slow machine is not a fault.
PROPERTY = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])


def faults(text: str) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        parse(text, "f.yaml", OPTIONS)
    return caught.value.problems


def fault(text: str) -> str:
    """The one fault of `text`, which follows a good first line."""
    (problem,) = faults(ONE + text)
    return problem


# What is accepted


def test_shipped_file_names_all_collectors_at_their_defaults() -> None:
    config = load(SHIPPED, OPTIONS)
    assert config == Config(
        collectors={
            name: CollectorConfig(options={option.name: option.default for option in options})
            for name, options in OPTIONS.items()
        }
    )


def test_shipped_file_shows_true_limits_in_what_it_comments_out() -> None:
    text = SHIPPED.read_text()
    shown = text.replace("biolatency: {}\n  #  max_devices", "biolatency:\n    max_devices").replace(
        "  #  max_in", "    max_in"
    )
    assert shown.count("#  max_") == 0
    assert parse(shown, "f.yaml", OPTIONS) == load(SHIPPED, OPTIONS)
    for option in OPTIONS["biolatency"]:
        assert re.search(rf"{option.name}: {option.default} +# {option.minimum} to {option.maximum} ", text)


def test_one_collector_is_enough_and_the_rest_is_default() -> None:
    config = parse("collectors:\n  biolatency:\n", "f.yaml", OPTIONS)
    assert config.server == ServerConfig((Listen("127.0.0.1", 10435),), None)
    assert (config.interval, config.journal) == (5.0, True)
    assert (config.bpffs, config.state) == (Path("/sys/fs/bpf/bpfmetricsd"), Path("/run/bpfmetricsd"))
    assert config.collectors == {
        "biolatency": CollectorConfig({"max_devices": 64, "max_inflight": 16384}, 1000, True, 10.0)
    }


def test_collector_overrides_defaults() -> None:
    text = """
        defaults: {max_series: 50, exemplars: false, exemplar_interval: 1m}
        collectors:
          cachestat:
          tcplife: {max_series: 60, exemplars: true, exemplar_interval: 2s, local_ports: [443, 22], events: true}
        """
    assert parse(text, "f.yaml", OPTIONS).collectors == {
        "cachestat": CollectorConfig({}, 50, False, 60.0),
        "tcplife": CollectorConfig({"local_ports": (443, 22), "max_connections": 16384, "events": True}, 60, True, 2.0),
    }


@pytest.mark.parametrize("empty", ["", " ~", " null", " {}"])
def test_an_empty_section_is_an_empty_mapping(empty: str) -> None:
    text = f"server:{empty}\ndefaults:{empty}\ncollectors:\n  cachestat:{empty}\n"
    assert parse(text, "f.yaml", OPTIONS) == Config(collectors={"cachestat": CollectorConfig()})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("127.0.0.1:10435", Listen("127.0.0.1", 10435)),
        (":10435", Listen("", 10435)),
        ('"[::1]:10435"', Listen("::1", 10435)),
        ('"[0:0::1]:10435"', Listen("::1", 10435)),
        ('"[fe80::1%eth0]:1"', Listen("fe80::1%eth0", 1)),
        ("LocalHost:65535", Listen("localhost", 65535)),
        ("fd://", Listen(fd=True)),
    ],
)
def test_listen(value: str, expected: Listen) -> None:
    assert parse(f"{ONE}server: {{web_config: null}}\n", "f.yaml", OPTIONS).server == ServerConfig()
    alone = parse(f"{ONE}server:\n  listen: {value}\n", "f.yaml", OPTIONS)
    listed = parse(f"{ONE}server:\n  listen:\n  - {value}\n", "f.yaml", OPTIONS)
    assert alone.server.listen == listed.server.listen == (expected,)
    again = parse(f"{ONE}server: {{listen: '{expected}'}}", "f.yaml", OPTIONS)
    assert again.server.listen == (expected,)


def test_paths_are_tidied() -> None:
    text = ONE + "bpffs: //sys/fs/bpf/./own/\nserver: {web_config: /etc/web.yaml}\n"
    config = parse(text, "f.yaml", OPTIONS)
    assert str(config.bpffs) == "/sys/fs/bpf/own"
    assert config.server.web_config == Path("/etc/web.yaml")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1us", 1e-6), ("100us", 1e-4), ("250ms", 0.25), ("0.5s", 0.5), ("5s", 5.0), ("2m", 120.0), ("1h", 3600.0)],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("5", "5 has no unit"),
        ("5d", "'5d' has an unknown unit"),
        ("5S", "'5S' has an unknown unit"),
        ("", "'' is not a duration"),
        ("5 s", "'5 s' is not a duration"),
        ("-5s", "'-5s' is not a duration"),
        ("1m30s", "'1m30s' is not a duration"),
        ("\u0665s", "'\u0665s' is not a duration"),
    ],
)
def test_parse_duration_names_the_cause(text: str, cause: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(cause)}$"):
        parse_duration(text)


@pytest.mark.parametrize(
    "text",
    [
        "interval: 1s",
        "interval: 5m",
        "defaults: {max_series: 10, exemplar_interval: 1h}",
        "defaults: {max_series: 100000, exemplar_interval: 1000ms}",
        "journal: off",
        "state: &own /run/own\nbpffs: *own",
    ],
)
def test_limits_and_plain_aliases_are_allowed(text: str) -> None:
    assert parse(ONE + text, "f.yaml", OPTIONS).collectors


# What is refused

BROKEN = """\
server:
  listen: [127.0.0.1, "::1:10435", "[::1]:0", ":1", "*:1", 10435, "[0::1]:5", "[::1]:5"]
  web_config: web.yaml
  liste: 1
interval: 5
intervall: 5s
bpffs: /sys/fs/bpf/
state: run/bpfmetricsd
journal: sometimes
journal: true
defaults: {max_series: 5, exemplars: 1, exemplar_interval: 2h}
collectors:
  biolatancy: {}
  biolatency: {max_devices: 0x10, max_inflight: "256", max_series: 1e9}
  runqlat: {by: cgroups}
  tcpretrans: [events]
  cachestat: {by: none}
  oomkill:
    <<: {events: true}
    events: !!python/object/apply:os.system [reboot]
    ? [a, b]
    : 1
  tcplife:
    local_ports: [22, 22, 0, ssh]
    max_connections: 2026-01-01
    events:
    exemplar_interval: {s: 5}
"""

KEYS = "known: bpffs, collectors, defaults, interval, journal, server, state"
COMMON = "exemplar_interval, exemplars, max_series"
UNITS = "(units: us, ms, s, m, h)"
FAULTS_OF_BROKEN = f"""\
f.yaml:2: server.listen[0]: '127.0.0.1' has no port; {LISTEN}
f.yaml:2: server.listen[1]: '::1' is not an address; {LISTEN}
f.yaml:2: server.listen[2]: the port '0' is not a number from 1 to 65535; {LISTEN}
f.yaml:2: server.listen[4]: '*' is not an address; {LISTEN}
f.yaml:2: server.listen[5]: found a whole number; {LISTEN}
f.yaml:2: server.listen[7]: [::1]:5 is given twice; keep one
f.yaml:3: server.web_config: 'web.yaml' is not an absolute path; write the whole path, from / on
f.yaml:4: server.liste: unknown key; did you mean listen? known: listen, web_config
f.yaml:5: interval: 5 has no unit; write a duration from 1s to 5m {UNITS}
f.yaml:6: intervall: unknown key; did you mean interval? {KEYS}
f.yaml:7: bpffs: /sys/fs/bpf belongs to the system and this folder gets removed; \
write one below it: /sys/fs/bpf/bpfmetricsd
f.yaml:8: state: 'run/bpfmetricsd' is not an absolute path; write the whole path, from / on
f.yaml:9: journal: found a string; write true or false
f.yaml:10: journal: given twice, first on line 9; keep one
f.yaml:11: defaults.max_series: 5 is out of range; write a whole number from 10 to 100000
f.yaml:11: defaults.exemplars: found a whole number; write true or false
f.yaml:11: defaults.exemplar_interval: 2h is out of range; write a duration from 1s to 1h {UNITS}
f.yaml:13: collectors.biolatancy: unknown collector; did you mean biolatency? known: {KNOWN}
f.yaml:14: collectors.biolatency.max_devices: '0x10' is not in plain decimal digits; \
write a whole number from 1 to 1024
f.yaml:14: collectors.biolatency.max_inflight: found a string; write a whole number from 256 to 1048576
f.yaml:14: collectors.biolatency.max_series: found a string; write a whole number from 10 to 100000
f.yaml:15: collectors.runqlat.by: 'cgroups' is not known; did you mean cgroup? write one of none, cgroup
f.yaml:16: collectors.tcpretrans: found a list; write a mapping of keys; known: by, events, {COMMON}
f.yaml:17: collectors.cachestat.by: unknown key; known: {COMMON}
f.yaml:19: collectors.oomkill: merge keys (<<) are not allowed; write the keys out
f.yaml:20: collectors.oomkill.events: the tag '!!python/object/apply:os.system' is not allowed; remove it
f.yaml:21: collectors.oomkill: a key is a list or a mapping; write a word as the key
f.yaml:24: collectors.tcplife.local_ports[1]: 22 is given twice; keep one
f.yaml:24: collectors.tcplife.local_ports[2]: 0 is out of range; write a whole number from 1 to 65535
f.yaml:24: collectors.tcplife.local_ports[3]: found a string; write a whole number from 1 to 65535
f.yaml:25: collectors.tcplife.max_connections: found a date; write a whole number from 256 to 1048576
f.yaml:26: collectors.tcplife.events: found nothing; write true or false
f.yaml:27: collectors.tcplife.exemplar_interval: found a mapping; write a duration from 1s to 1h {UNITS}
"""


def test_every_fault_at_once() -> None:
    assert "".join(f"{problem}\n" for problem in faults(BROKEN)) == FAULTS_OF_BROKEN


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing\n", "~", "collectors:\n", "collectors: ~\n", "collectors: {}\n"]
)
def test_no_collector_is_a_fault(text: str) -> None:
    assert faults(text) == (f"f.yaml:1: collectors: no collector is named; name at least one of {KNOWN}",)


def test_no_collector_is_told_where_the_key_is() -> None:
    assert faults("interval: 5s\ncollectors:\n")[0].startswith("f.yaml:2: collectors: no collector is named;")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("a: b: c", "f.yaml:1: not valid YAML: mapping values are not allowed here; check indentation, "),
        ("a:\n\tb: 1", "f.yaml:2: not valid YAML: .*; indent with spaces, not with tabs"),
        ("\nlisten: [::1]:10435", r'f.yaml:2: not valid YAML: .*; quote an IPv6 address: "\[::1\]:10435"'),
        ("a: 1\nb: 'x\n\n", "f.yaml:4: not valid YAML: .* quoted scalar from line 2, found unexpected end of stream; "),
        ("a: *x", "f.yaml:1: not valid YAML: found undefined alias 'x'; "),
        ("a: 1\n---\nb: 2", "f.yaml:2: a second document starts here; keep one, and remove the line ---"),
        ("a: 1\nb: \x01", r"f.yaml:2: the character '\\x01' is not allowed in YAML; remove it"),
        ("a: \ud800", r"f.yaml:1: the character '\\ud800' is not allowed in YAML; remove it"),
        ('a: "\\UFFFFFFFF"', "f.yaml:1: not valid YAML: a number in it is too large; "),
        (f"%YAML 1.{'9' * 5000}\n---\n", "f.yaml:1: not valid YAML: a number in it is too large; "),
        ("[" * 100_000, "f.yaml:1: not valid YAML: nested more than 32 levels deep; "),
        ("[]", "f.yaml:1: found a list; write a mapping of keys; known: "),
        ("5", "f.yaml:1: found a whole number; write a mapping of keys; known: "),
        ("!config {}", "f.yaml:1: the tag '!config' is not allowed; remove it"),
    ],
)
def test_text_that_is_no_mapping_is_one_fault(text: str, wrong: str) -> None:
    (problem,) = faults(text)
    assert re.match(wrong, problem)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server: {listen: []}", f"f.yaml:2: server.listen: the list is empty; {LISTEN}"),
        ("server: {listen: 300.0.0.1:1}", f"f.yaml:2: server.listen: '300.0.0.1' is not an address; {LISTEN}"),
        ("server: {listen: a..b:1}", f"f.yaml:2: server.listen: 'a..b' is not an address; {LISTEN}"),
        ("server: {listen: }", f"f.yaml:2: server.listen: found nothing; {LISTEN}"),
        ("server: {listen: [fd://,\n fd://]}", "f.yaml:3: server.listen[1]: fd:// is given twice; keep one"),
        (
            f"server: {{listen: [{', '.join(f'127.0.0.1:{port}' for port in range(1, 18))}]}}",
            "f.yaml:2: server.listen: 17 entries are too many; keep at most 16",
        ),
        ("server: 5", "f.yaml:2: server: found a whole number; write a mapping of keys; known: listen, web_config"),
        ("interval:\n  s: 5", f"f.yaml:2: interval: found a mapping; write a duration from 1s to 5m {UNITS}"),
        ("interval: 999ms", f"f.yaml:2: interval: 999ms is out of range; write a duration from 1s to 5m {UNITS}"),
        ("interval: 1:30", f"f.yaml:2: interval: '1:30' is not a duration; write a duration from 1s to 5m {UNITS}"),
        ("interval: true", f"f.yaml:2: interval: found true or false; write a duration from 1s to 5m {UNITS}"),
        ("journal: !!bool maybe", "f.yaml:2: journal: 'maybe' is not a boolean; write true or false"),
        ("state: /run/../tmp", "f.yaml:2: state: '/run/../tmp' leads through ..; write the path without it"),
        (
            'state: "/a\\0b"',
            "f.yaml:2: state: '/a\\x00b' has a character that cannot be printed; write the whole path, from / on",
        ),
        ("!x journal: true", "f.yaml:2: the tag '!x' is not allowed; remove it"),
        ('"a\\nb": 1', f"f.yaml:2: 'a\\nb': unknown key; {KEYS}"),
    ],
)
def test_one_fault(text: str, expected: str) -> None:
    assert fault(text) == expected


@pytest.mark.parametrize("path", ["/", "//", "/.", "/sys", "/sys/fs", "/sys/fs/bpf", "/sys/fs/bpf/", "/sys//fs/bpf/."])
def test_bpffs_is_never_a_folder_of_the_system(path: str) -> None:
    assert "belongs to the system and this folder gets removed" in fault(f"bpffs: {path}")


@pytest.mark.parametrize("path", ["/", "/run"])
def test_state_is_never_a_folder_of_the_system(path: str) -> None:
    assert "belongs to the system and this folder gets removed" in fault(f"state: {path}")


@pytest.mark.parametrize("number", ["9", "100001", "-50", "9" * 5000, "0100", "1_000", "0x40", "1:40"])
def test_whole_numbers_are_decimal_and_in_range(number: str) -> None:
    problem = fault(f"defaults: {{max_series: {number}}}")
    assert problem.startswith("f.yaml:2: defaults.max_series: ")
    assert problem.endswith("; write a whole number from 10 to 100000")
    assert len(problem) < 200


def test_a_list_of_ports_that_is_too_long_is_one_fault() -> None:
    (problem,) = faults(f"collectors: {{tcplife: {{local_ports: [{'x, ' * 65}]}}}}")
    assert problem == "f.yaml:1: collectors.tcplife.local_ports: 65 entries are too many; keep at most 64"


def test_one_port_still_wants_a_list() -> None:
    (problem,) = faults("collectors: {tcplife: {local_ports: 443}}")
    assert problem.endswith("found a whole number; write a list of ports such as [22, 443], or [] for none")


def test_recursive_aliases_end() -> None:
    problems = faults("x: &x [*x]\ncollectors: &c {runqlat: *c, tcplife: {local_ports: &p [*p]}}\n")
    assert [problem.partition(";")[0] for problem in problems] == [
        "f.yaml:1: x: unknown key",
        "f.yaml:2: collectors.runqlat.runqlat: unknown key",
        "f.yaml:2: collectors.runqlat.tcplife: unknown key",
        "f.yaml:2: collectors.tcplife.local_ports[0]: found a list",
    ]


def test_a_billion_laughs_are_not_expanded() -> None:
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 20))
    assert len(faults(f"{ONE}a0: &a0 ha\n{bomb}")) == 20


# The file itself


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"collectors:\n  \xff\n", ":2: not UTF-8 text; save the file as UTF-8"),
        (b"#" * (1 << 20) + b"\n", ": larger than 1 MiB, so hardly a configuration; name another file with --config"),
    ],
)
def test_load_refuses_content(tmp_path: Path, content: bytes, wrong: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load(path, OPTIONS)
    assert caught.value.problems == (f"{path}{wrong}",)


def test_load_names_what_it_cannot_read(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    expected = {
        tmp_path / "none": "there is no such file; create it, or name another with --config",
        tmp_path: "this is a directory; name a file with --config",
        loop: "cannot be read (Too many levels of symbolic links); name another file with --config",
    }
    for path, wrong in expected.items():
        with pytest.raises(UsageError) as caught:
            load(path, OPTIONS)
        assert caught.value.problems == (f"{path}: {wrong}",)


class Forbidden(type(Path())):  # type: ignore[misc]  # the concrete class of this system
    """A path that may not be read: root, who runs these tests, may read everything."""

    def open(self, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")


def test_load_says_when_it_is_not_allowed() -> None:
    with pytest.raises(UsageError, match=r"^/f\.yaml: not allowed to read it; run as root, or change its permissions$"):
        load(Forbidden("/f.yaml"), OPTIONS)


def test_load_names_the_path_in_each_fault(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("a: 1\nb: 2\n")
    with pytest.raises(UsageError) as caught:
        load(path, OPTIONS)
    assert [problem.startswith(f"{path}:") for problem in caught.value.problems] == [True] * 3


# Properties

KEY_WORDS = "server listen interval defaults collectors max_series by local_ports bpffs"
VALUE_WORDS = "5s 5 1e9 true none ~ fd:// :1 [::1]:1 /run/x << &a *a !!int !x"
SIGNS = [":", ": ", "? ", "- ", "[", "]", "{", "}", ", ", "\n", "\n  ", "\n    ", "\t", "'", '"', "#", "|", ">"]
RARE = ["---", "...", "%YAML 1.1", "\\U", "\0"]
WORDS = st.sampled_from([*OPTIONS, *KEY_WORDS.split(), *VALUE_WORDS.split(), *SIGNS, *RARE])
MUTATION = st.tuples(st.integers(0, 4000), st.integers(0, 40), WORDS | st.text(max_size=3))


def check_any(text: str) -> None:
    """Either a configuration or faults of one line each, with a line that the text has."""
    problems: tuple[str, ...] = ()
    try:
        assert parse(text, "f.yaml", OPTIONS).collectors
    except UsageError as refused:
        problems = refused.problems
        assert problems
    last = len(re.findall("\r\n|[\r\n\x85\u2028\u2029]", text)) + 1
    for problem in problems:
        match = re.match(r"f\.yaml:(\d+): \S.*; \S", problem)
        assert match, problem
        assert 1 <= int(match[1]) <= last
        assert problem.isprintable()


@PROPERTY
@given(st.text())
@example("\ufeff")
def test_any_text_is_a_configuration_or_faults(text: str) -> None:
    check_any(text)


@PROPERTY
@given(st.lists(WORDS).map("".join))
def test_anything_like_yaml_is_a_configuration_or_faults(text: str) -> None:
    check_any(text)


@PROPERTY
@given(st.lists(MUTATION, min_size=1, max_size=4))
def test_any_change_of_the_shipped_file_is_a_configuration_or_faults(mutations: list[tuple[int, int, str]]) -> None:
    text = SHIPPED.read_text()
    for start, length, insert in mutations:
        text = text[:start] + insert + text[start + length :]
    check_any(text)


def values(option: Option) -> st.SearchStrategy[object]:
    match option.kind:
        case "choice":
            return st.sampled_from(option.choices)
        case "int":
            return st.integers(option.minimum, option.maximum)
        case "bool":
            return st.booleans()
        case "ports":
            return st.lists(st.integers(1, 65535), unique=True, max_size=option.maximum)


PORTS = st.integers(1, 65535)
LISTENS = st.one_of(
    st.just(Listen(fd=True)),
    st.builds(
        Listen, st.just("") | st.ip_addresses().map(str) | st.from_regex(r"[a-z][a-z0-9]{0,20}", fullmatch=True), PORTS
    ),
)
OWN = st.from_regex(r"/opt(/[a-z .:#'{}é-]{1,8}[a-z]){1,3}", fullmatch=True).filter(lambda path: " /" not in path)
COMMONS = {
    "max_series": st.integers(10, 100_000),
    "exemplars": st.booleans(),
    "exemplar_interval": st.integers(1, 3600).map(lambda seconds: f"{seconds}s"),
}
DOCUMENTS = st.fixed_dictionaries(
    {
        "collectors": st.fixed_dictionaries(
            {},
            optional={
                name: st.fixed_dictionaries({}, optional={**{o.name: values(o) for o in options}, **COMMONS})
                for name, options in OPTIONS.items()
            },
        ).filter(bool)
    },
    optional={
        "server": st.fixed_dictionaries(
            {},
            optional={
                "listen": st.lists(LISTENS.map(str), min_size=1, max_size=16, unique=True),
                "web_config": st.none() | OWN,
            },
        ),
        "interval": st.integers(1000, 300_000).map(lambda ms: f"{ms}ms"),
        "bpffs": OWN,
        "state": OWN,
        "journal": st.booleans(),
        "defaults": st.fixed_dictionaries({}, optional=COMMONS),
    },
)


def written(config: Config) -> dict[str, object]:
    """The document that says all of `config`."""
    return {
        "server": {
            "listen": [str(listen) for listen in config.server.listen],
            "web_config": str(config.server.web_config) if config.server.web_config else None,
        },
        "interval": f"{round(config.interval * 1000)}ms",
        "bpffs": str(config.bpffs),
        "state": str(config.state),
        "journal": config.journal,
        "collectors": {
            name: {
                **{key: list(value) if isinstance(value, tuple) else value for key, value in one.options.items()},
                "max_series": one.max_series,
                "exemplars": one.exemplars,
                "exemplar_interval": f"{round(one.exemplar_interval)}s",
            }
            for name, one in config.collectors.items()
        },
    }


@PROPERTY
@given(DOCUMENTS, st.booleans())
def test_a_valid_configuration_survives_the_round_trip(document: dict[str, object], flow: bool) -> None:
    config = parse(yaml.safe_dump(document, default_flow_style=flow), "f.yaml", OPTIONS)
    again = yaml.safe_dump(written(config), sort_keys=False, allow_unicode=True)
    assert parse(again, "f.yaml", OPTIONS) == config
    assert list(config.collectors) == sorted(document["collectors"])  # type: ignore[call-overload]
