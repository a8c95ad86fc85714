"""What the servers of tests share: answers in JSON, and silence on the terminal."""

import json
from http.server import BaseHTTPRequestHandler
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """Answers by say()."""

    def say(self, said: Any, *, code: int = 200) -> None:
        """Answer with `said` as JSON; None: with nothing."""
        body = b"" if said is None else json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
