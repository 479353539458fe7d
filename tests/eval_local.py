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


def write_livecodebench(folder: Path, dates: list[str], same: bool = False) -> None:
    """Sums of two numbers plus 0, 1, 2, ..., or all the `same`; one problem a date."""
    rows = [
        {
            "question_content": f"Read two integers, print their sum plus {number}.",
            "starter_code": "",
            "public_test_cases": json.dumps([{"input": "1 2\n", "output": f"{3 + number}\n", "testtype": "stdin"}]),
            "private_test_cases": json.dumps([{"input": "5 6\n", "output": f"{11 + number}\n", "testtype": "stdin"}]),
            "metadata": "{}",
            "contest_date": f"{date}T00:00:00",
        }
        for number, date in ((0 if same else n, date) for n, date in enumerate(dates))
    ]
    (folder / "v5").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "v5/test-00000-of-00001.parquet")
    config = "configs:\n- config_name: v5\n  data_files:\n  - split: test\n    path: v5/test-*.parquet\n"
    (folder / "README.md").write_text(f"---\n{config}---\n")


def write_datasets(folder: Path) -> None:
    """A DATASET_LOCAL: 3 problems of each benchmark; LiveCodeBench has a fourth, outside of the window."""
    for name in ("aime24", "aime25"):
        write_lines(
            folder / name / "test.jsonl", [{"problem": f"Find {n} + 3.", "answer": str(n + 3)} for n in range(3)]
        )
    wrong = {f"Incorrect Answer {n}": str(90 + n) for n in (1, 2, 3)}
    write_lines(
        folder / "gpqa/train.jsonl",
        [{"Question": f"What is {n} + 1?", "Correct Answer": str(n + 1), **wrong} for n in range(3)],
    )
    write_livecodebench(folder / "lcb", ["2024-08-01", "2024-10-01", "2025-02-01", "2025-02-02"])


class CountingServer:
    """An OpenAI-compatible server whose answers follow from the question: half of them are right.

    `requests` counts what it was asked, without probes for readiness. After `stall_after` requests it answers no more,
    and sets `stalled`, until `stall_after` is None. `refusals` says how often each question is refused first, with 400;
    `reply` gives text and finish reason of an answer from its question.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.stall_after: int | None = None
        self.stalled = threading.Event()
        self.refusals: dict[str, float] = {}
        self.reply = lambda question: (f"So \\boxed{{{self.number(question)}}}.", "stop")
        self.lock = threading.Lock()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if owner.refuses(body):
                    self.send({"error": {"message": "The maximum context length is 7 tokens.", "code": 400}}, 400)
                elif found := owner.answer(body):
                    self.send_answer(*found, body["model"])
                else:
                    self.close_connection = True

            def send_answer(self, text: str, finish: str, model: str) -> None:
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "finish_reason": finish, "message": message}
                usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
                answer = {"id": "1", "object": "chat.completion", "created": 1, "model": model}
                self.send({**answer, "choices": [choice], "usage": usage}, 200)

            def send(self, answer: dict, status: int) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_) -> None: ...

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def refuses(self, body: dict) -> bool:
        """Whether a request is to be refused, counted."""
        question = body["messages"][-1]["content"]
        with self.lock:
            left = self.refusals.get(question, 0)
            self.refusals[question] = max(0, left - 1)
        return left > 0

    def answer(self, body: dict) -> tuple[str, str] | None:
        """The answer to a request and how it ended, counted; nothing while stalled."""
        question = body["messages"][-1]["content"]
        if body["max_tokens"] == 8:
            return "2", "stop"
        with self.lock:
            if self.stall_after is not None and len(self.requests) >= self.stall_after:
                self.stalled.set()
                return None
            self.requests.append(question)
        return self.reply(question)

    @staticmethod
    def number(question: str) -> int:
        """What it answers: the sum of `Find A + B.`, or, of half of the questions, one more."""
        left, right = question.removeprefix("Find ").removesuffix(".").split(" + ")
        return int(left) + int(right) + hashlib.sha256(question.encode()).digest()[0] % 2
