"""Experts in another process, or on another machine: a client that is an expert, and a server for one.

    GET  /v1/expert   {"name", "version", "tasks", "needs_box", "degraded"}
    POST /v1/run      a request as ``wire`` has it  ->  a result

PyTorch beside JAX on one accelerator takes its memory: such experts run in a process of their own
(``umm experts --serve=NAME``), and are named by their address (``--expert=http://127.0.0.1:8400``).
"""

import hashlib
import http.client
import http.server
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from umm_jax.errors import ConfigError, DataError
from umm_jax.router import wire
from umm_jax.router.experts import Expert, ExpertError, Request, Result, Spec

LARGEST = 128 << 20  # bytes of a request or result


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect could lead anywhere: it is an answer like any other, and no good one."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPEN = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay)


class Remote:
    """An expert behind an address.

    Args:
        url: as "http://127.0.0.1:8400". seconds: one try may take.
        tries: where the server fails or is slow; the same request has the same key each time, so it can be
            answered once.

    Raises:
        ConfigError: nobody is there, or no expert.
    """

    def __init__(
        self, url: str, *, seconds: float = 60.0, tries: int = 3, pause: float = 0.5, priority: int = 20
    ):
        try:
            parts = urllib.parse.urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"an expert's address is an http or https URL, got {url!r}")
        self.url, self.seconds, self.tries, self.pause = url.rstrip("/"), seconds, tries, pause
        try:
            found = self._ask("/v1/expert", None)
            if not isinstance(found, Mapping) or not found.get("name"):
                raise ConfigError(f"{url}: no expert: it does not say its name")
            names = {
                "tasks": frozenset,
                "needs_box": frozenset,
                "name": str,
                "version": str,
                "degraded": bool,
            }
            self.spec = Spec(priority=priority, **{k: make(found.get(k, ())) for k, make in names.items()})
        except ExpertError as error:
            raise ConfigError(f"{url}: {error}") from None
        except (TypeError, LookupError) as error:
            raise ConfigError(f"{url}: no expert: {error}") from None
        if not self.spec.tasks:
            raise ConfigError(f"{url}: an expert without tasks")

    def run(self, request: Request) -> Result:
        try:
            return wire.result_from_json(self._ask("/v1/run", wire.request_to_json(request)))
        except DataError as error:
            raise ExpertError(f"{self.url} gave no good result: {error}") from None

    def close(self) -> None:
        """Each request has a connection of its own."""

    def _ask(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if data is not None:
            headers["Idempotency-Key"] = hashlib.sha256(data).hexdigest()
        request = urllib.request.Request(self.url + path, data, headers)
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with _OPEN.open(request, timeout=self.seconds) as response:
                    read = response.read(LARGEST + 1)
                if len(read) > LARGEST:
                    raise ExpertError(f"answered with more than {LARGEST} bytes")
                return json.loads(read)
            except urllib.error.HTTPError as error:
                why = _reason(error)
                if error.code < 500:
                    raise ExpertError(why) from None
            except (OSError, http.client.HTTPException) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError:
                raise ExpertError("answered with what is no JSON") from None
        raise ExpertError(f"{why} ({self.tries} tries)")


def _reason(error: urllib.error.HTTPError) -> str:
    """What a server says is wrong."""
    try:
        found = json.loads(error.read(1 << 16))
        return str(found["error"])[:500]
    except (ValueError, KeyError, TypeError, OSError):
        return f"answered {error.code} {error.reason}"


def server(expert: Expert, host: str = "127.0.0.1", port: int = 0) -> http.server.ThreadingHTTPServer:
    """A server of one expert, for ``serve_forever``; port 0 is any free one, see ``server_port``.

    It has no locks on its door: beyond this machine, put it behind something that has.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self) -> None:
            if self.path != "/v1/expert":
                return self._say(404, {"status": "error", "error": "GET /v1/expert, POST /v1/run"})
            spec = expert.spec
            facts = {"name": spec.name, "version": spec.version, "degraded": spec.degraded}
            self._say(200, facts | {"tasks": sorted(spec.tasks), "needs_box": sorted(spec.needs_box)})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.path != "/v1/run" or not length.isdigit() or int(length) > LARGEST:
                return self._say(400, {"status": "error", "error": f"POST /v1/run, {LARGEST} bytes at most"})
            try:
                request = wire.request_from_json(json.loads(self.rfile.read(int(length))))
                if request.task not in expert.spec.tasks:
                    raise DataError(f"{expert.spec.name} does no {request.task}")
                self._say(200, wire.result_to_json(expert.run(request)))
            except (DataError, ExpertError, ValueError) as error:
                self._say(422, {"status": "error", "error": str(error)})
            except Exception as error:  # other people's code; the server goes on
                self._say(500, {"status": "error", "error": f"{type(error).__name__}: {error}"})

        def _say(self, status: int, found: Any) -> None:
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Quiet: what is asked is the user's."""

    return http.server.ThreadingHTTPServer((host, port), Handler)
