"""All that can be set about the server: as a flag, in the environment, or in a file; the first of these counts."""

import importlib.util
import ipaddress
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from arkasr import audio
from arkasr.engines import Dtype, EngineName
from arkasr.errors import MissingExtraError, UsageError
from arkasr.server import default_state
from arkasr.server.fetch import UrlPolicy

PREFIX = "ARKASR_SERVER_"
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Serve OpenAI's audio API; a flag may also be set as ARKASR_SERVER_NAME, or in the file of --config."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", cli_kebab_case=True, cli_implicit_flags=True,
        cli_hide_none_type=True, cli_avoid_json=True, cli_enforce_required=False,
    )  # fmt: skip

    config: Path | None = Field(None, description="a TOML file with these settings, names as in the flags")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 is any free one")
    insecure: bool = Field(False, description="allow another address than this machine's own without API keys")
    model: list[str] = Field(
        [], description="0.6b, 3b, tiny, ORG/NAME@COMMIT or a folder; again for several; default as `transcribe`"
    )
    alias: list[str] = Field([], description="NAME=MODEL: answer to another name, such as whisper-1=0.6b")
    engine: EngineName = Field("auto", description="what runs the network; openai: the endpoint of --base-url")
    base_url: str | None = Field(None, description="engine openai: http://HOST/v1, where models of --model are served")
    api_key_env: str | None = Field(None, description="engine openai: environment variable with the endpoint's API key")
    parallel: Count | None = Field(None, description="engine openai: requests at once, of each model and process; 8")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: Dtype = Field("auto", description="precision; auto is int8 on a CPU")
    offline: bool = Field(False, description="make no network call for models")
    unload_after_s: float = Field(
        0, ge=0, description="free a model's memory after so long without a request; 0: never"
    )
    workers: Count = Field(1, description="processes, each with its own copy of the models")
    state: Path = Field(default_factory=default_state, description="folder of keys.json and usage.sqlite3")

    max_requests: Count = Field(64, description="requests in work or waiting in a process; more get 503")
    max_realtime: Count = Field(16, description="WebSockets of /v1/realtime in a process; more get 503")
    realtime_s: Positive = Field(3600, description="longest that such a session may last")
    realtime_idle_s: Positive = Field(300, description="longest that it may be without an event of the client")
    realtime_partials: bool = Field(
        False, description="engine openai: send text of an utterance before its end, for which it is sent several times"
    )
    request_timeout_s: Positive = Field(3600, description="longest that a request may take, upload included")
    shutdown_s: Positive = Field(30, description="time for running requests after a SIGTERM")
    max_upload_mb: Positive = Field(500, description="largest request body")
    min_upload_rate: Positive = Field(4096, description="bytes a second that an upload must bring, after 15 s")
    max_audio_s: Positive = Field(6 * 3600, description="longest audio of a request")
    max_channels: Count = Field(16, description="most channels of an upload")
    max_sample_rate: Count = Field(192_000, description="highest sample rate of an upload")
    cors_origin: list[str] = Field([], description="web origin whose pages may call the API, or *; again for several")
    allowed_host: list[str] = Field([], description="Host header to answer to, when there are no keys")
    url_host: list[str] = Field([], description="host that `url` inputs may come from, or *; none: no `url` inputs")
    url_network: list[str] = Field([], description="private network (CIDR) that `url` inputs may come from, too")
    url_port: list[int] = Field([80, 443], description="port that `url` inputs may come from; again for several")
    url_timeout_s: Positive = Field(60, description="longest that fetching a `url` may take")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of the log on stderr")
    log_text: bool = Field(False, description="write transcripts to the log, too")

    @classmethod
    def settings_customise_sources(  # noqa: D102 - pydantic-settings' own hook
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the hook's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def check_engine(self) -> None:
        """Refuse what does not go together with the engine.

        Raises:
            UsageError: a setting that is for another one.
            MissingExtraError: vLLM is not installed.
        """
        remote = {"--base-url": self.base_url, "--api-key-env": self.api_key_env, "--parallel": self.parallel}
        here = {
            "--device": self.device != "auto",
            "--dtype": self.dtype != "auto",
            "--unload-after-s": self.unload_after_s > 0,
        }
        if self.engine == "openai":
            if self.base_url is None or not self.model:
                raise UsageError("engine openai: give --base-url http://HOST/v1, and --model as it is called there")
            if wrong := [flag for flag, given in here.items() if given]:
                raise UsageError(
                    f"{', '.join(wrong)}: not with engine openai, whose models are elsewhere; leave it out"
                )
        elif wrong := [flag for flag, given in remote.items() if given is not None]:
            raise UsageError(f"{', '.join(wrong)}: only with --engine openai; this one is {self.engine}")
        if self.engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise MissingExtraError("engine vllm: vLLM is not installed; pip install 'arkasr[vllm]'")
        if self.engine == "vllm" and self.workers > 1:
            raise UsageError(
                "--workers: engine vllm is one process, for each would take the whole device; leave it out, or put "
                "this server, with --engine openai, in front of `vllm serve`"
            )

    @property
    def url_policy(self) -> UrlPolicy:
        """What `url` inputs may be."""
        return UrlPolicy(
            tuple(self.url_host),
            max_bytes=self.max_upload_bytes,
            timeout_s=self.url_timeout_s,
            ports=tuple(self.url_port),
            private_networks=tuple(self.url_network),
        )

    @property
    def limits(self) -> audio.Limits:
        """What a stranger's audio may ask of us."""
        return audio.Limits(self.max_audio_s, self.max_channels, self.max_sample_rate)

    @property
    def max_upload_bytes(self) -> int:
        """Bytes of the largest request body."""
        return round(self.max_upload_mb * 1e6)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def read_settings(arguments: Sequence[str]) -> Settings:
    """Settings from flags, the environment, and the file that `--config` names; --help prints and exits.

    Raises:
        UsageError: an unknown or bad one, or a file that cannot be read.
    """
    try:
        flags = CliSettingsSource[Any](Settings, cli_parse_args=list(arguments), cli_prog_name="ark-asr serve")
        path = flags().get("config") or os.environ.get(f"{PREFIX}CONFIG")
        if path is None:
            return Settings(_cli_settings_source=flags)  # type: ignore[call-arg]

        class Filed(Settings):
            model_config = SettingsConfigDict(toml_file=path)

        if not Path(path).is_file():
            raise UsageError(f"{path}: no such file; check --config")
        return Filed(_cli_settings_source=flags)  # type: ignore[call-arg]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "-".join(map(str, first["loc"])).replace("_", "-")
        raise UsageError(f"serve: {name}: {first['msg']}; see `ark-asr serve --help`") from None
    except (SettingsError, OSError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"serve: {error}; see `ark-asr serve --help`") from None
