"""An MLflow server of its own in a folder, in which a chosen request fails (`test_faults.py`). Prints its port.

GET /fail/<fault>/<number> counts requests from there on and fails that one so; GET /asked says how many there were.
"""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import Any

FAULTS = {
    "login": ("200 OK", "text/html", b"<html>\n<title>Sign in</title>\n</html>"),
    "host": ("403 FORBIDDEN", "text/plain", b"Invalid Host header - possible DNS rebinding attack detected"),
    "gateway": ("502 BAD GATEWAY", "text/html", b""),
    "cut": ("200 OK", "application/json", b'{"run": {'),
}


class Failing:
    """WSGI: the app, but for one request."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app, self.fault, self.at, self.asked = app, "", -1, 0
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/fail/"):
            _, _, self.fault, at = path.split("/")
            self.at, self.asked = int(at), 0
            start("200 OK", [])
            return [b""]
        if path == "/asked":
            start("200 OK", [])
            return [str(self.asked).encode()]
        with self.lock:
            number, self.asked = self.asked, self.asked + 1
        if number != self.at:
            return self.app(environ, start)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, kind, body = FAULTS[self.fault]
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]


def main() -> None:
    folder = tempfile.mkdtemp(dir=sys.argv[1])
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": f"{folder}/artifacts",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    from mlflow.server import app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, Failing(app), threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
