"""Local datasets and a server that counts, for tests of evaluation."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_livecodebench(folder: Path, dates: list[str]) -> None:
    """Sums of two numbers plus 0, 1, 2, ...; one problem a date."""
    rows = [
        {
            "question_content": f"Read two integers, print their sum plus {number}.",
            "starter_code": "",
            "public_test_cases": json.dumps([{"input": "1 2\n", "output": f"{3 + number}\n", "testtype": "stdin"}]),
            "private_test_cases": json.dumps([{"input": "5 6\n", "output": f"{11 + number}\n", "testtype": "stdin"}]),
            "metadata": "{}",
            "contest_date": f"{date}T00:00:00",
        }
        for number, date in enumerate(dates)
    ]
    (folder / "v5").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "v5/test-00000-of-00001.parquet")
    config = "configs:\n- config_name: v5\n  data_files:\n  - split: test\n    path: v5/test-*.parquet\n"
    (folder / "README.md").write_text(f"---\n{config}---\n")


class CountingServer:
    """An OpenAI-compatible server whose answers follow from the question: half of them are right.

    `requests` counts what it was asked, without probes for readiness. After `stall_after` requests it answers no more,
    and sets `stalled`, until `stall_after` is None.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.stall_after: int | None = None
        self.stalled = threading.Event()
        self.lock = threading.Lock()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if text := owner.answer(body):
                    self.send(text, body["model"])
                else:
                    self.close_connection = True

            def send(self, text: str, model: str) -> None:
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
                answer = {"id": "1", "object": "chat.completion", "created": 1, "model": model}
                data = json.dumps({**answer, "choices": [choice], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, body: dict) -> str:
        """The answer to a request, counted; nothing while stalled."""
        question = body["messages"][-1]["content"]
        if body["max_tokens"] == 8:
            return "2"
        with self.lock:
            if self.stall_after is not None and len(self.requests) >= self.stall_after:
                self.stalled.set()
                return ""
            self.requests.append(question)
        return f"So \\boxed{{{self.number(question)}}}."

    @staticmethod
    def number(question: str) -> int:
        """What it answers: the sum of `Find A + B.`, or, of half of the questions, one more."""
        left, right = question.removeprefix("Find ").removesuffix(".").split(" + ")
        return int(left) + int(right) + hashlib.sha256(question.encode()).digest()[0] % 2
