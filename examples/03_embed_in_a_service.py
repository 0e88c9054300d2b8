"""A small HTTP service around a runner: POST a text, get the answer and the exit it came from.

    python examples/03_embed_in_a_service.py BUNDLE [PORT]

Torch is not imported: this is what ships. A runner serves one thread at a time, hence the lock.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from offramp.errors import InputError
from offramp.runtime import Runner


class Service:
    """Answers texts; a policy can be swapped between two requests."""

    def __init__(self, bundle: Path) -> None:
        self.runner = Runner.open(bundle)
        self.lock = threading.Lock()

    def answer(self, text: str) -> dict[str, object]:
        with self.lock:
            result = self.runner.run(self.runner.encode([text]))
        return {
            "label": self.runner.manifest.labels[result.prediction[0]],
            "score": float(result.score[0]),
            "exit_index": int(result.exit_index[0]),
            "reason": result.reason[0],
        }


def server_for(service: Service, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            try:
                status, body = 200, service.answer(text)
            except InputError as exc:  # the caller's mistake, said in the caller's words
                status, body = 400, {"error": str(exc)}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    server_for(Service(Path(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 8000).serve_forever()
