"""Options of `expertd serve`: one frozen dataclass, from which the command line is built."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.ranges import parse_ranges, parse_shard, shard_of
from expertd.proto.base.loopback import is_loopback

Weights: TypeAlias = Literal["fp8", "bf16"]
Pipeline: TypeAlias = Literal["auto", "fast", "dequant"]
BACKENDS = ("auto", "torch", "cutile")
WEIGHTS: tuple[Weights, ...] = ("fp8", "bf16")
LOG_FORMATS = ("text", "json")
SHARD = "instead of --experts: one of N even shards of all experts, such as 2/8, the second of eight"
PIPELINES: tuple[Pipeline, ...] = ("auto", "fast", "dequant")


class InvalidOption(ValueError):
    """An option's value is not usable; the message starts with the option's name."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen or connect: `host:port`, IPv6 hosts in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        host, colon, port = text.rpartition(":")
        if not (colon and host and port.isdecimal() and int(port) < 65536):
            raise ValueError(f"{text!r} is not host:port with a port from 0 to 65535")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


ALL_DEVICES: tuple[int, ...] = ()
"""Of `ServerConfig.devices`: as many as there are."""


def parse_devices(text: str) -> tuple[int, ...]:
    """Read "all", "0-3" or "0,2"."""
    return ALL_DEVICES if text == "all" else parse_ranges(text)


MOST_DEVICES = 64


def _told(summary: str, parse: Callable[[str], object] = str) -> dict[str, Any]:
    """Metadata of an option: what `--help` says of it, and how its text is read."""
    return {"help": summary, "parse": parse}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server process. Raises `InvalidOption` for values that cannot work."""

    model: Path = field(metadata=_told("folder of the checkpoint: config.json and safetensors files", Path))
    manifest: Path | None = field(
        default=None,
        metadata=_told(
            "file of 'expertd fingerprint' that all weights are checked against"
            " (default: expertd.manifest.json in the folder of the checkpoint, if it is there)",
            Path,
        ),
    )
    experts: tuple[int, ...] = field(
        metadata=_told("ids of the experts to own, such as 0-31 or 0-15,64; or all; or --shard I/N", parse_ranges)
    )
    layers: tuple[int, ...] | None = field(
        default=None, metadata=_told("layers to own, such as 3-60 (default: all MoE layers)", parse_ranges)
    )
    listen: Address = field(
        default=Address("127.0.0.1", 50051),
        metadata=_told("address of the gRPC service; port 0 picks a free one", Address.parse),
    )
    unix_socket: Path | None = field(
        default=None,
        metadata=_told("path of a unix socket to serve gRPC on too: plaintext, for this user's processes alone", Path),
    )
    metrics: Address = field(
        default=Address("127.0.0.1", 9464),
        metadata=_told("address of the Prometheus endpoint; port 0 picks a free one", Address.parse),
    )
    tls_cert: Path | None = field(
        default=None, metadata=_told("PEM file of this server's certificate chain; turns TLS on", Path)
    )
    tls_key: Path | None = field(default=None, metadata=_told("PEM file of its private key, not encrypted", Path))
    tls_client_ca: Path | None = field(
        default=None, metadata=_told("PEM file of authorities: callers must show a certificate of one of them", Path)
    )
    auth_token_file: Path | None = field(
        default=None, metadata=_told("file of bearer tokens, one a line: callers must send one of them", Path)
    )
    admin_listen: Address | None = field(
        default=None,
        metadata=_told(
            "address of the administration, which changes what the server owns while it serves (default: none)",
            Address.parse,
        ),
    )
    admin_token_file: Path | None = field(
        default=None, metadata=_told("file of bearer tokens, one a line, of which administrators must send one", Path)
    )
    insecure: bool = field(
        default=False, metadata=_told("allow plaintext on --listen addresses that other machines can reach", bool)
    )
    shared_memory_bytes: int = field(
        default=4 << 30,
        metadata=_told("memory that callers on this machine may share with the server, all together; 0: none", int),
    )
    spin_us: int | None = field(
        default=None,
        metadata=_told(
            "microseconds to look for calls in shared memory before sleeping, at most; 0: none"
            " (default: as is worth it on this machine)",
            int,
        ),
    )
    max_connections: int = field(
        default=1024, metadata=_told("connections at once; further ones are closed as they come", int)
    )
    max_streams: int = field(default=1024, metadata=_told("calls and streams at once on one connection", int))
    backend: str = field(default="auto", metadata=_told("compute backend: auto, torch (CPU) or cutile (GPU)"))
    devices: tuple[int, ...] | None = field(
        default=None,
        metadata=_told(
            "devices over which the experts of each layer are spread, such as 0-3, or all; of the torch backend,"
            " that many simulated ones (default: one)",
            parse_devices,
        ),
    )
    device_experts: int | None = field(
        default=None,
        metadata=_told(
            "experts of a layer on each of several devices; more than their even share are copies of the busiest"
            " (default: their even share)",
            int,
        ),
    )
    device_loads: Path | None = field(
        default=None,
        metadata=_told(
            "JSON file of recorded loads, by which experts are spread over devices: an object from layers to lists with"
            " a number for every expert of the model (default: all are alike)",
            Path,
        ),
    )
    pipeline: Pipeline = field(
        default="auto",
        metadata=_told("arithmetic of the cutile backend: fast (FP8), dequant (FP16, more exact) or auto: the faster"),
    )
    weights: Weights = field(
        default="fp8",
        metadata=_told(
            "what experts' weights are served as: fp8, to which those of BF16 checkpoints are rounded, or bf16, as such"
            " checkpoints have them, in twice the memory"
        ),
    )
    batch_invariant: bool = field(
        default=False,
        metadata=_told("a token's bits never depend on the rest of its batch; the torch backend is always so", bool),
    )
    threads: int | None = field(
        default=None,
        metadata=_told("CPU threads of the torch backend (default: a share of the CPUs)", int),
    )
    max_tokens_per_request: int = field(default=4096, metadata=_told("largest request, in tokens", int))
    max_batch_tokens: int = field(default=16384, metadata=_told("largest device batch, in tokens", int))
    max_queued_tokens: int = field(
        default=65536, metadata=_told("tokens that may wait before requests are refused", int)
    )
    max_queued_bytes: int = field(
        default=1 << 30, metadata=_told("bytes of tensors that may wait before requests are refused", int)
    )
    device_timeout: float = field(
        default=30.0,
        metadata=_told(
            "seconds without a sign of the device after which requests are refused, twice that: exit", float
        ),
    )
    locality: str = field(
        default="", metadata=_told("where this server is, such as a zone; coordinators prefer servers of their own")
    )
    shadow_check_rate: float = field(
        default=0.0,
        metadata=_told("share of requests of which one token is computed again from the checkpoint, on the CPU", float),
    )
    drain_seconds: float = field(
        default=30.0, metadata=_told("longest wait for requests in flight on SIGTERM, in seconds", float)
    )
    ready_file: Path | None = field(
        default=None, metadata=_told("file to write when serving: JSON with the bound addresses", Path)
    )
    per_expert_metrics: bool = field(
        default=False, metadata=_told("export the pairs of every expert of every layer, for 'expertd plan'", bool)
    )
    trace_endpoint: str | None = field(
        default=None,
        metadata=_told(
            "OTLP endpoint (gRPC), such as http://collector:4317, for spans of the requests that callers trace;"
            " needs expertd[otel]"
        ),
    )
    log_level: str = field(
        default="info", metadata=_told("debug (with a line for every request), info, warning or error")
    )
    log_format: str = field(default="text", metadata=_told("text, or json: one object a line"))

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InvalidOption(f"--backend is {self.backend!r}; choose from {', '.join(BACKENDS)}")
        if self.pipeline not in PIPELINES:
            raise InvalidOption(f"--pipeline is {self.pipeline!r}; choose from {', '.join(PIPELINES)}")
        if self.weights not in WEIGHTS:
            raise InvalidOption(f"--weights is {self.weights!r}; choose from {', '.join(WEIGHTS)}")
        self._check_devices()
        if self.weights == "bf16" and self.pipeline == "fast":
            raise InvalidOption("--pipeline fast computes with FP8 weights; leave it out, or --weights bf16")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise InvalidOption(f"--log-level is {self.log_level!r}; choose from debug, info, warning, error")
        if self.log_format not in LOG_FORMATS:
            raise InvalidOption(f"--log-format is {self.log_format!r}; choose from {', '.join(LOG_FORMATS)}")
        for name in (
            "threads",
            "max_connections",
            "max_streams",
            "max_tokens_per_request",
            "drain_seconds",
            "device_timeout",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidOption(f"{flag(name)} is {value}; it must be greater than 0")
        for name in ("shared_memory_bytes", "spin_us"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidOption(f"{flag(name)} is {value}; it must be at least 0")
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            most = 2**63 - 1 if option.name.endswith("_bytes") else 2**31 - 1
            if isinstance(value, int) and value > most:
                raise InvalidOption(f"{flag(option.name)} is {value}; it must be at most {most}")
        for name in ("max_batch_tokens", "max_queued_tokens"):
            value = getattr(self, name)
            if value < self.max_tokens_per_request:
                raise InvalidOption(
                    f"{flag(name)} is {value}; it must be at least --max-tokens-per-request"
                    f" {self.max_tokens_per_request}"
                )
        if not 0 <= self.shadow_check_rate <= 1:
            raise InvalidOption(f"--shadow-check-rate is {self.shadow_check_rate}; it must be from 0 to 1")
        self._check_security()

    def _check_devices(self) -> None:
        if self.devices is None:
            for name in ("device_experts", "device_loads"):
                if getattr(self, name) is not None:
                    raise InvalidOption(f"{flag(name)} needs --devices with it")
        elif len(self.devices) > MOST_DEVICES:
            raise InvalidOption(f"--devices names {len(self.devices)} devices; a server has at most {MOST_DEVICES}")
        if self.device_experts is not None and not 0 < self.device_experts <= len(self.experts):
            raise InvalidOption(
                f"--device-experts is {self.device_experts}; it must be from 1 to the {len(self.experts)} of the server"
            )

    def _check_security(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("key", "cert") if self.tls_cert is None else ("cert", "key")
            raise InvalidOption(f"--tls-{given} needs --tls-{missing} with it")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InvalidOption("--tls-client-ca needs --tls-cert and --tls-key with it")
        if self.tls_cert is not None and self.insecure:
            raise InvalidOption("--insecure contradicts --tls-cert; give one of them")
        for name in ("listen", "admin_listen"):
            address = getattr(self, name)
            if address and self.tls_cert is None and not self.insecure and not is_loopback(address.host):
                raise InvalidOption(
                    f"{flag(name)} {address} would take plaintext from other machines; give --tls-cert and --tls-key,"
                    " or --insecure in a network that protects traffic itself"
                )
        if self.admin_token_file is not None and self.admin_listen is None:
            raise InvalidOption("--admin-token-file needs --admin-listen with it")
        if self.admin_listen and self.admin_token_file is None and not is_loopback(self.admin_listen.host):
            raise InvalidOption(
                f"--admin-listen {self.admin_listen} would let everybody who reaches it change what the server owns;"
                " give --admin-token-file"
            )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, *, model_required: bool = True) -> None:
        for option in dataclasses.fields(cls):
            if option.metadata["parse"] is bool:
                parser.add_argument(flag(option.name), action="store_true", help=option.metadata["help"])
                continue
            has_default = option.default not in (dataclasses.MISSING, None)
            default = f" (default: {option.default})" if has_default else ""
            parser.add_argument(
                flag(option.name),
                required=model_required and option.name == "model",
                metavar=metavar(option),
                help=option.metadata["help"] + default,
            )
        parser.add_argument("--shard", metavar="I/N", help=SHARD)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ServerConfig:
        """Raises `InvalidOption`, or `InvalidConfig` where the model must tell which experts there are."""
        texts = vars(arguments)
        if (texts["experts"] is None) == (texts["shard"] is None):
            raise InvalidOption("--experts or --shard is needed, one of them: --experts all owns the whole model")
        values: dict[str, Any] = {}
        for option in dataclasses.fields(cls):
            text = texts[option.name]
            if text is not None and not (option.name == "experts" and text == "all"):
                values[option.name] = _parsed(option.name, option.metadata["parse"], text)
        if "experts" not in values:
            shard = (1, 1) if texts["shard"] is None else _parsed("shard", parse_shard, texts["shard"])
            values["experts"] = _experts_of(values["model"], *shard)
        return cls(**values)


def metavar(option: dataclasses.Field[Any]) -> str:
    """What an option wants, for its help."""
    name = option.name.rpartition("_")[2]
    if option.name == "model":
        return "FOLDER"
    if name in ("bytes", "tokens", "us", "seconds", "rate"):
        return name.upper()
    wanted = {
        Address.parse: "HOST:PORT",
        parse_ranges: "RANGES",
        parse_devices: "RANGES",
        Path: "FILE",
        float: "SECONDS",
        int: "N",
    }
    return wanted.get(option.metadata["parse"], name.upper())


def flag(name: str) -> str:
    """The option that sets field `name`."""
    return "--" + name.replace("_", "-")


def _parsed(name: str, parse: Callable[[str], Any], text: str) -> Any:  # noqa: ANN401
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidOption(f"{flag(name)}: {error}") from None


def _experts_of(model: Path, number: int, count: int) -> tuple[int, ...]:
    experts = MoeConfig.from_json(model / "config.json").n_routed_experts
    if count > experts:
        raise InvalidOption(f"--shard {number}/{count}: the model has {experts} experts, too few for so many shards")
    return shard_of(experts, number, count)
