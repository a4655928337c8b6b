"""10,000 chunks, a fifth of the calls faulty, five kill -9; run by hand.

    python tests/llm/soak.py [CHUNKS] [LATENCY]

The server works on 64 calls at a time, each for LATENCY seconds, a stalled one for 3.2 times that
(the client gives up after 3); a 429 takes no place. Of seven faults one is a 429 and one a stall: a
call that takes a place gets a good reply with probability 0.8 / (1 - 0.2 / 7), and holds the place
for LATENCY * (1 + 2.2 * (0.2 / 7) / (1 - 0.2 / 7)). The limit is what the server sends per second
if no place is ever empty: 64 times the one by the other. Measured after the last kill, from 5 s
after the first 64 replies (the climb to 64).

Prints replies per chunk, repeated replies, throughput against the limit, and the client's memory
over the measured stretch. On two cores (AMD EPYC) with LATENCY 0.5: one reply per chunk, 237
repeated (at most 64 in flight at each kill), 94.1 replies per second of 99.0 (95.1%), 274 to
288 MB.
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
from refine_fast.pipeline.queries.llm import LLMSettings, generate_queries
timeout = 3 * float(sys.argv[5])
settings = LLMSettings(
    sys.argv[2], ("tiny",), {"question": 1}, 4, timeout=timeout, concurrency=64
)
generate_queries(make_chunks(int(sys.argv[4])), settings, Path(sys.argv[3]))
"""


PLACES, FAULTS = 64, 0.2
STALLED = FAULTS / 7 / (1 - FAULTS / 7)  # of the calls that take a place, those that stall


def limit(latency: float) -> float:
    """Good replies a second of the server with every place taken."""
    return PLACES * (1 - FAULTS) / (1 - FAULTS / 7) / (latency * (1 + 2.2 * STALLED))


def main(count: int, latency: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "replies.jsonl"
        server = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout
        endpoint = Endpoint(int(server.stdout.readline()))
        endpoint.set(faults=FAULTS, latency=latency, stall=3.2 * latency, slots=PLACES)
        command = [
            sys.executable,
            "-c",
            STAGE,
            str(HERE),
            endpoint.url,
            str(store),
            str(count),
            str(latency),
        ]

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
            before, began, cpu = endpoint.stats(), time.monotonic(), process.cpu_times()
            while lines() < count - 300:  # the last calls leave places empty
                time.sleep(0.2)
                memory.append(process.memory_info().rss / 2**20)
            after, seconds, spent = endpoint.stats(), time.monotonic() - began, process.cpu_times()
            client.wait()
        end = endpoint.stats()
        accepted = Counter(
            record["chunk"]
            for record in map(json.loads, store.read_text().splitlines())
            if "error" not in record
        )
        rate = (after["served"] - before["served"]) / seconds
        print("replies per chunk:", Counter(accepted.values()), "of", count, "chunks")
        print(
            "replies that the server sent:",
            end["served"],
            "distinct:",
            end["distinct"],
            "calls:",
            end["calls"],
        )
        print(
            f"{rate:.1f} replies per second over {seconds:.0f} s: "
            f"{rate / limit(latency):.1%} of the limit, {limit(latency):.1f}"
        )
        print(
            f"places taken: {(after['busy'] - before['busy']) / (PLACES * seconds):.1%}, "
            f"at most {end['peak']} calls open"
        )
        fifths = ", ".join(
            f"{memory[int(share * (len(memory) - 1))]:.0f}" for share in (0, 0.2, 0.4, 0.6, 0.8, 1)
        )
        print(
            f"client: {spent.user + spent.system - cpu.user - cpu.system:.0f} s of CPU; {fifths} MB"
        )
        server.kill()


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 10_000,
        float(sys.argv[2]) if len(sys.argv) > 2 else 1.0,
    )
