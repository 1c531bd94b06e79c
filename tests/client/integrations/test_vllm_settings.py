"""What vLLM's plug-in is told, and that wrong settings and other models are refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config

from expertd.client.fleet.discovery import DnsServers, FileServers, StaticServers
from expertd.client.integrations.vllm import fleet
from expertd.client.integrations.vllm.fleet import check_same, fleet_of, share
from expertd.client.integrations.vllm.settings import WAIT_SECONDS, Settings, read
from expertd.kernels.model.config import MoeConfig
from expertd.proto.base.errors import ModelMismatch


def test_without_servers_there_is_nothing_to_do() -> None:
    assert read({}, {}) is None
    assert read(None, {"EXPERTD_WAIT": "3"}) is None


def test_the_environment_tells_and_vllms_own_configuration_wins() -> None:
    environment = {
        "EXPERTD_SERVERS": "a:1, b:2",
        "EXPERTD_HIDDEN_DTYPE": "bfloat16",
        "EXPERTD_TOKEN_FILE": "/run/token",
        "EXPERTD_ROOT_CA": "",
    }
    told = read({}, environment)
    assert told is not None
    assert told.servers == StaticServers(("a:1", "b:2"))
    assert told.wait == WAIT_SECONDS
    assert told.config.hidden_dtype == torch.bfloat16
    assert told.config.security is not None
    assert told.config.security.token_file == Path("/run/token")
    other = read({"expertd": {"servers": ["c:3"], "wait": 5, "hedge_quantile": 0.9}}, environment)
    assert other is not None
    assert (other.servers, other.wait, other.config.hedge_quantile) == (StaticServers(("c:3",)), 5.0, 0.9)


def test_servers_may_be_found() -> None:
    for text, servers in (
        ("dns:fleet:50051", DnsServers("fleet", 50051)),
        ("file:/etc/s", FileServers(Path("/etc/s"))),
    ):
        told = read({}, {"EXPERTD_SERVERS": text})
        assert told is not None
        assert told.servers == servers


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "servers",
            "dns:fleet",
            r"servers \(EXPERTD_SERVERS, or expertd.servers\): 'dns:fleet' names no host and port",
        ),
        ("servers", "nowhere", r"servers \(EXPERTD_SERVERS"),
        ("hidden_dtype", "int4", r"hidden_dtype \(EXPERTD_HIDDEN_DTYPE.*'int4' is no dtype; choose from bfloat16"),
        ("wait", "soon", r"wait \(EXPERTD_WAIT.*could not convert"),
        ("colour", "red", r"expertd.colour in vLLM's additional configuration is unknown; choose from servers, wait"),
    ],
)
def test_what_is_wrong_is_named(name: str, value: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read({"expertd": {"servers": "a:1"} | {name: value}}, {})


def test_the_first_field_in_which_models_differ_is_named() -> None:
    ours = MoeConfig()
    check_same(ours, MoeConfig())
    with pytest.raises(ModelMismatch, match=r"moe_intermediate_size is 2048 in vLLM's model and 1024 on the expertd"):
        check_same(ours, replace(ours, moe_intermediate_size=1024))


class Connected:
    """In a fleet's place."""

    def __init__(self, settings: Settings, model: MoeConfig) -> None:
        self.of = settings, model


def test_engines_of_a_process_share_a_fleet_only_where_servers_settings_and_model_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "Fleet", Connected)
    monkeypatch.setattr(fleet, "_fleets", [])
    model = DeepseekV3Config()

    def one(servers: str, hf_config: DeepseekV3Config = model, **more: float) -> object:
        settings = read({"expertd": {"servers": servers} | more}, {})
        assert settings is not None
        return fleet_of(settings, hf_config)

    first = one("a:1")
    assert one("a:1") is first
    others = [one("b:1"), one("a:1", call_timeout=5.0), one("a:1", DeepseekV3Config(moe_intermediate_size=1024))]
    assert len({id(each) for each in (first, *others)}) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 31, 32, 127, 128, 1000])
def test_ranks_call_for_every_row_once(tokens: int, ranks: int) -> None:
    rows = [row for rank in range(ranks) for row in range(tokens)[share(tokens, rank, ranks)]]
    assert rows == list(range(tokens))
