"""10,000 chunks, a fifth of the calls faulty, five kill -9, once by hand: python tests/llm/soak.py [CHUNKS] [LATENCY]

Prints what the issue asks for: replies per chunk, repeated replies, how full the server's 64 places were after the last kill (and after
the climb to 64, which is the first 5 s), and the client's memory at a tenth and at the end of that stretch.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from conftest import Endpoint  # noqa: E402

STAGE = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from conftest import make_chunks
from refine_fast.pipeline.llm import LLMSettings, generate_queries
settings = LLMSettings(sys.argv[2], ("tiny",), timeout=3 * float(sys.argv[5]), concurrency=64)
generate_queries(make_chunks(int(sys.argv[4])), settings, Path(sys.argv[3]))
"""


def main(count: int, latency: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "replies.jsonl"
        server = subprocess.Popen([sys.executable, str(HERE / "server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        endpoint = Endpoint(int(server.stdout.readline()))
        endpoint.set(faults=0.2, latency=latency, stall=3.2 * latency)
        command = [sys.executable, "-c", STAGE, str(HERE), endpoint.url, str(store), str(count), str(latency)]

        def lines() -> int:
            return store.read_bytes().count(b"\n") if store.exists() else 0

        for kill in range(1, 6):
            with subprocess.Popen(command) as client:
                while lines() < kill * count // 12:
                    time.sleep(0.1)
                client.send_signal(signal.SIGKILL)
        memory = []
        with subprocess.Popen(command) as client:
            process, start = psutil.Process(client.pid), lines()
            while lines() < start + 64:
                time.sleep(0.1)
            time.sleep(5)
            before, began = endpoint.stats(), time.monotonic()
            while lines() < count - 300:  # the last calls leave places empty
                time.sleep(0.2)
                memory.append(process.memory_info().rss / 2**20)
            after, ended = endpoint.stats(), time.monotonic()
            user = process.cpu_times().user
            client.wait()
        end = endpoint.stats()
        accepted = Counter(record["chunk"] for record in map(json.loads, store.read_text().splitlines()) if "error" not in record)
        print("replies per chunk:", Counter(accepted.values()), "of", count, "chunks")
        print("replies that the server sent:", end["served"], "distinct:", end["distinct"], "calls:", end["calls"])
        seconds = ended - began
        print(f"places filled: {(after['busy'] - before['busy']) / (64 * seconds):.1%} of 64 over {seconds:.0f} s; peak {end['peak']}")
        print(f"client: {user:.0f} s of CPU; {memory[len(memory) // 10]:.0f} MB at a tenth, {memory[-1]:.0f} MB at the end")
        server.kill()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
