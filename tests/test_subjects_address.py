"""Addresses of servers: what is read from them, what is refused, and that no credentials are told."""

import pytest

from specplug.errors import UsageError
from specplug.subjects.address import ServerAddress, is_address, key_from, parse_address


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://localhost:8080/", "http://localhost:8080"),
        ("http://localhost:1234/v1", "http://localhost:1234"),
        ("https://api.example.org/openai/v1/", "https://api.example.org/openai"),
        ("HTTP://[::1]:9000/x", "http://[::1]:9000/x"),
        ("  http://host ", "http://host"),
    ],
)
def test_the_url_keeps_scheme_port_and_prefix_and_loses_v1(text: str, url: str) -> None:
    assert parse_address(text, {}).url == url


@pytest.mark.parametrize(
    "text",
    [
        "http://",
        "ftp://host",
        "http://host:99999",
        "http://host:port",
        "http://a b",
        "http://host/x?key=1",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text, {})


def test_credentials_in_an_address_are_refused_and_not_told() -> None:
    with pytest.raises(UsageError) as refused:
        parse_address("https://user:hunter2@host:8080", {})
    assert "hunter2" not in str(refused.value) and "user" not in str(refused.value)
    assert "SPECPLUG_SERVER_KEY" in str(refused.value)


def test_the_key_is_in_no_text_of_an_address() -> None:
    address = parse_address("http://host", {"SPECPLUG_SERVER_KEY": "hunter2"})
    assert address.key == "hunter2"
    assert "hunter2" not in f"{address} {address!r}"


def test_the_own_variable_wins_over_openais() -> None:
    both = {"OPENAI_API_KEY": "b", "SPECPLUG_SERVER_KEY": "a"}
    assert [key_from(both), key_from({"OPENAI_API_KEY": "b"}), key_from({})] == ["a", "b", None]
    assert key_from({"SPECPLUG_SERVER_KEY": "  ", "OPENAI_API_KEY": "b"}) == "b"


def test_a_key_that_no_header_can_carry_is_refused() -> None:
    with pytest.raises(UsageError, match="SPECPLUG_SERVER_KEY"):
        key_from({"SPECPLUG_SERVER_KEY": "ключ"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://host", True),
        ("ftp://host", True),
        ("llama-server -m x.gguf", False),
        ("vllm serve m --speculative-config http://x", False),
        ("URL=http://x llama-server", False),
    ],
)
def test_addresses_are_told_from_commands(text: str, expected: bool) -> None:
    assert is_address(text) == expected


@pytest.mark.parametrize(
    ("url", "local"), [("http://127.0.0.2:1", True), ("http://localhost", True), ("http://h", False)]
)
def test_local_addresses(url: str, local: bool) -> None:
    assert ServerAddress(url).is_local == local
    assert ServerAddress(url, launched=True).is_local
