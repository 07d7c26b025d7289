"""A Ray head that is a pretence: it tells of jobs what it was given to tell. And one that takes questions in silence."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def silent_head(port: int = 0) -> Iterator[str]:
    """Connections to its address succeed, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", port), backlog=100) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


@contextmanager
def fake_head(jobs: dict[str, dict[str, object]], port: int = 0) -> Iterator[str]:
    """Knows `jobs` by their names, each with its "status", and is in trouble about those that have none.

    It takes a job that it is handed without a word, and refuses one whose name it knows.
    """

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            words = self.path.strip("/").split("/")
            job = jobs.get(words[2], {}) if len(words) > 2 else {}
            if self.path == "/api/version":
                self._say({"version": "4", "ray_version": "2.60.0", "ray_commit": "none"})
            elif self.path.endswith("/logs"):
                self._say({"logs": "said by Ray"})
            elif self.path == "/api/jobs/":
                self._say([_told(name, row) for name, row in jobs.items()])
            elif words[1] == "v0":
                self._say({"result": False, "msg": "nobody knows the machines"})
            elif "status" not in job:
                self._say({}, code=500 if job else 404)
            else:
                self._say(_told(words[2], job))

        def do_POST(self) -> None:
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["submission_id"]
            if name in jobs:
                self._say({}, code=500)
            else:
                jobs[name] = {"status": "PENDING"}

        def _say(self, row: object, *, code: int = 200) -> None:
            said = json.dumps(row if code == 200 else "the job does not exist" if code == 404 else "trouble").encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Answers) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def _told(name: str, job: dict[str, object]) -> dict[str, object]:
    return {"type": "SUBMISSION", "submission_id": name, "entrypoint": "none", **job}
