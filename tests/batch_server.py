"""A server of OpenAI's batch endpoint, with addresses as Azure and gateways have them."""

import email
import email.policy
import json
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Server(ThreadingHTTPServer):
    """What /files, /batches and /chat/completions hold; the path before "/v1" is any."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, str] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.finished = True
        self.status = "completed"
        self.drop_created = False
        self.wrong: set[str] = set()
        """Passages whose requests fail."""
        self.spoil: Callable[[str], str] = str
        """What a line of results becomes on the way."""
        self.has_batches = True
        self.most = 10**9
        """Requests of a batch that may be queued."""

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        server, path = self.server, urlsplit(self.path).path
        if path.endswith("/content"):
            content = server.files.get(path.split("/")[-2])
            return self.answer(content or {"error": {"message": "gone"}}, 200 if content else 404)
        if path.endswith("/batches"):
            return self.answer({"object": "list", "data": list(server.batches.values())})
        batch = server.batches.get(path.split("/")[-1])
        if batch is None:
            return self.answer({"error": {"message": "no such batch"}}, 404)
        if server.files[batch["input_file_id"]].count("\n") > server.most:
            error = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
            batch |= {"status": "failed", "errors": {"data": [error]}}
        if server.finished and batch["status"] == "in_progress":
            batch["status"] = server.status
            if server.status == "completed":
                self.run(batch)
        return self.answer(batch)

    def run(self, batch: dict[str, Any]) -> None:
        replies, errors = [], []
        for line in map(json.loads, self.server.files[batch["input_file_id"]].splitlines()):
            status, body = self.complete(line["body"])
            entry = {
                "custom_id": line["custom_id"],
                "response": {"status_code": status, "body": body},
            }
            (replies if status == 200 else errors).append(json.dumps(entry))
        for name, lines in (("output", replies), ("error", errors)):
            if lines:
                batch[f"{name}_file_id"] = f"{name}-{batch['id']}"
                lines = [self.server.spoil(line) for line in lines]
                self.server.files[f"{name}-{batch['id']}"] = "\n".join(lines) + "\n"

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        passage = body["messages"][-1]["content"].partition("Passage: ")[2].partition("\n")[0]
        self.server.asked[passage] += 1
        if any(text in body["messages"][-1]["content"] for text in self.server.wrong):
            return 400, {"error": {"message": "content filter"}}
        text = json.dumps({"queries": [{"kind": "question", "text": f"What is {passage[:30]}?"}]})
        if "\nQueries:" in body["messages"][-1]["content"]:
            text = '{"answerable": [1]}'
        if "\nGrades:" in body["messages"][-1]["content"]:
            text = "1: 3\n2: 0"
        choice = {"index": 0, "finish_reason": "stop"}
        choice["message"] = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 20 if "answerable" in text else 100, "completion_tokens": 20}
        return 200, {"id": "c", "object": "chat.completion", "created": 0,
                     "model": body["model"], "choices": [choice], "usage": usage}  # fmt: skip

    def do_POST(self) -> None:
        server = self.server
        server.headers.append(dict(self.headers))
        server.paths.append(self.path)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if path.endswith("/chat/completions"):
            status, body = self.complete(json.loads(data))
            return self.answer(body, status)
        if not server.has_batches:
            return self.answer({"error": {"message": "no such page"}}, 404)
        if path.endswith("/files"):
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            message = email.message_from_bytes(head + data, policy=email.policy.HTTP)
            parts = {
                part.get_param("name", header="content-disposition"): part
                for part in message.iter_parts()
            }
            id = f"file-{len(server.files)}"
            server.files[id] = parts["file"].get_payload(decode=True).decode()
            file = {"id": id, "object": "file", "bytes": 1, "created_at": 0, "filename": "f"}
            return self.answer({**file, "purpose": "batch", "status": "processed"})
        asked = json.loads(data)
        id = f"batch-{len(server.batches)}"
        server.batches[id] = {
            "id": id, "object": "batch", "status": "in_progress", "created_at": 0, **asked,
            "errors": {"data": [{"message": "the file is no JSONL"}]},
        }  # fmt: skip
        if server.drop_created:
            server.drop_created = False
            self.close_connection = True
            return None
        return self.answer(server.batches[id])
