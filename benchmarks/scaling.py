"""What many runs, adapters and visitors cost one server: `python -m benchmarks.scaling [runs|gallery|queue|page] …`.

`--runs`, `--adapters`, `--waiting` and `--users` say how many. Everything is made in a temporary workspace; "page"
serves it with app.py and asks as open pages do, by gradio's own protocol. Processor seconds hold on a busy machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from safetensors.torch import save

from reparam_diffusion import events as e
from reparam_diffusion.config import settle
from reparam_diffusion.gallery import catalog
from reparam_diffusion.jobs import locks, queue, runs
from reparam_diffusion.jobs.overview import Overview
from ui import ahead, blend_tab, gallery_look, generate_acts, run_view

ROOT = Path(__file__).resolve().parent.parent
LOOKS = [
    ("what a run will cost (until it is known)", ahead.LOOK_AGAIN),
    ("the runs", run_view.SELDOM),
    ("what is drawn", generate_acts.SELDOM),
    ("the gallery", gallery_look.SELDOM),
    ("a blend", blend_tab.SELDOM),
]
"""The page's timers that tick while nothing goes on, in their order, and their seconds."""
STEPS = 300
"""Steps that each finished run has told."""


# --- what there is ---------------------------------------------------------------------------------------------------
def make_runs(workspace: Path, count: int) -> None:
    """Finished runs, each with its steps, checks and saves."""
    config = settle({"data": {"images": str(ROOT / "assets/examples/teddy"), "trigger": "sks", "class_word": "toy"}})
    begun = datetime.datetime(2026, 1, 1)
    for number in range(count):
        folder = runs.create_run(config, workspace, now=begun + datetime.timedelta(minutes=number))
        told: list[e.Event] = [e.Launched(1, str(folder))]
        told += [e.Started("lora", STEPS, 1, 157, 1_000_000, 2_000_000, "cpu", "bf16", 6)]
        told += [e.Step(step, 1 / step, {"unet": 1e-4}, 0.3, 0.1) for step in range(1, STEPS + 1)]
        told += [e.Validated(STEPS, 0.3, False), e.Finished(STEPS, "adapter.safetensors", 90.0)]
        (folder / "events.jsonl").write_text("".join(event.to_json() + "\n" for event in told), encoding="utf-8")


def make_adapters(workspace: Path, count: int) -> None:
    """Small LoRAs, each with notes, as a shelf of that size would have them."""
    shelf = workspace / "adapters"
    shelf.mkdir(parents=True, exist_ok=True)
    sites = [
        f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{n}_to_{leaf}" for n in (1, 2) for leaf in "qkv"
    ]
    tensors = {f"{site}.lora_down.weight": torch.ones(4, 320) for site in sites}
    tensors |= {f"{site}.lora_up.weight": torch.ones(320, 4) for site in sites}
    tensors |= {f"{site}.alpha": torch.tensor(4.0) for site in sites}
    content = save(tensors, {"ss_network_module": "networks.lora", "ss_network_dim": "4"})
    for number in range(count):
        (shelf / f"adapter-{number:05d}.safetensors").write_bytes(content)
        notes = {
            "activation text": f"sks{number}",
            "preferred weight": 0.8,
            "tags": "toy, icon",
            "notes": f"Number {number}",
        }
        (shelf / f"adapter-{number:05d}.json").write_text(json.dumps(notes), encoding="utf-8")


# --- what it costs ---------------------------------------------------------------------------------------------------
def timed(what: Callable[[], object], times: int = 1) -> float:
    """Seconds of processor time of a call: the median of several."""
    took = []
    for _ in range(times):
        start = time.process_time()
        what()
        took.append(time.process_time() - start)
    return statistics.median(took)


def measure_runs(workspace: Path, count: int) -> None:
    make_runs(workspace, count)
    overview = Overview(workspace)
    print(f"runs: {count} finished ones: first look {timed(overview.look):.2f} s, each later one ", end="")
    print(f"{timed(overview.look, 20) * 1000:.1f} ms")


def measure_gallery(workspace: Path, count: int) -> None:
    make_adapters(workspace, count)
    size = sum(file.stat().st_size for file in (workspace / "adapters").iterdir()) / 1e6
    cold = timed(lambda: catalog.list_entries(workspace))
    warm = timed(lambda: catalog.list_entries(workspace), 5)
    entries = catalog.list_entries(workspace)
    search = timed(lambda: catalog.search(entries, "sks99"), 5)
    cache = (workspace / "index.sqlite").stat().st_size / 1e6
    print(f"gallery: {count} adapters ({size:.0f} MB, index {cache:.1f} MB): first list {cold:.1f} s", end="")
    print(f", later ones {warm:.2f} s, search {search * 1000:.0f} ms")


def measure_queue(workspace: Path, count: int) -> None:
    config = settle({"data": {"images": "pictures"}, "model": {"device": "cpu"}})
    folders = [runs.create_run(config, workspace, now=datetime.datetime(2026, 1, 1)) for _ in range(count)]
    with locks.try_hold(locks.device_lock("cpu")) as held:
        assert held, "the device is at work"
        queue.ensure_served = lambda workspace: None  # type: ignore[assignment]  # the dispatcher's round is timed here
        for folder in folders[:-1]:
            queue.submit(folder)
        last = timed(lambda: queue.submit(folders[-1]))
        waiting = queue.waiting(workspace)
        again = timed(lambda: queue._start_what_can(workspace, list(waiting)), 5)
    runs_in_all = len(runs.list_runs(workspace))
    print(f"queue: {count} waiting, {runs_in_all} runs in all: lining up the last {last * 1000:.0f} ms", end="")
    print(f", a round of the dispatcher {again * 1000:.0f} ms")


# --- the page --------------------------------------------------------------------------------------------------------
class Visitor:
    """An open page as the server sees it: a session that calls what the timers call."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=address, timeout=120)
        self.session = uuid.uuid4().hex[:10]

    def open(self) -> dict[str, Any]:
        """Load the page and its description. Any: gradio's own."""
        self.client.get("/").raise_for_status()
        return dict(self.client.get("/config").json())

    def call(self, number: int, data: list[Any]) -> float:
        """Seconds until a handler has answered."""
        start = time.perf_counter()
        body = {"data": data, "fn_index": number, "session_hash": self.session}
        self.client.post("/gradio_api/queue/join", json=body).raise_for_status()
        with self.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:") and '"process_completed"' in line:
                    assert json.loads(line[5:])["success"], line[:300]
                    break
        return time.perf_counter() - start


def measure_page(workspace: Path, users: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--workspace", str(workspace)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    process, address = psutil.Process(server.pid), f"http://127.0.0.1:{port}"
    try:
        visitors = [Visitor(address) for _ in range(users)]
        page = _opened(visitors[0])
        kinds = {part["id"]: part for part in page["components"]}
        timers: list[tuple[int, list[Any]]] = []
        for dependency in page["dependencies"]:
            for target, event in dependency["targets"]:
                if event == "tick" and kinds[target]["props"]["active"]:
                    values = [kinds[part]["props"].get("value") for part in dependency["inputs"]]
                    timers.append((dependency["id"], [None if isinstance(value, dict) else value for value in values]))
        empty = process.memory_info().rss
        opening = _spent(process, lambda: [visitor.open() for visitor in visitors[1:]]) / max(1, users - 1)
        print(
            f"page: {empty / 1e6:.0f} MB at first; opening it costs {opening * 1000:.0f} ms of the server's processor"
        )
        costs = []
        for (name, pace), (number, data) in zip(LOOKS, timers, strict=True):
            for visitor in visitors:  # the first look of each session tells everything
                visitor.call(number, data)
            costs.append(_spent(process, lambda n=number, d=data: [one.call(n, d) for one in visitors]) / users)
            print(f"  a look at {name}, every {pace:g} s: {costs[-1] * 1000:.1f} ms of processor")
        idle = sum(cost / pace for (_, pace), cost in list(zip(LOOKS, costs, strict=True))[1:])
        live = idle + costs[1] / run_view.OFTEN - costs[1] / run_view.SELDOM
        print(f"  each open page: {idle * 1000:.1f} ms a second, {live * 1000:.1f} while a run is at work", end="")
        print(f": {1 / idle:.0f} or {1 / live:.0f} pages fill one core")
        took: list[float] = []

        def poll(visitor: Visitor) -> None:
            for _ in range(3):
                took.extend(visitor.call(number, data) for number, data in timers)

        threads = [threading.Thread(target=poll, args=[visitor]) for visitor in visitors]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = len(took) / (time.perf_counter() - begun)
        print(f"  {users} pages asking all at once: {rate:.0f} answers a second", end="")
        print(f", half within {statistics.median(took):.2f} s")
        print(f"  {process.memory_info().rss / 1e6:.0f} MB after {users} sessions")
    finally:
        server.terminate()
        server.wait()


def _opened(visitor: Visitor) -> dict[str, Any]:
    """The page's description, as soon as it is served. Any: gradio's own."""
    for _ in range(600):
        try:
            return visitor.open()
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError("the page was not served within two minutes")


def _spent(process: psutil.Process, what: Callable[[], object]) -> float:
    """Seconds of a process's processor time that a call costs it."""
    before = sum(process.cpu_times()[:2])
    what()
    return sum(process.cpu_times()[:2]) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["runs", "gallery", "queue", "page"])
    for name, count in (("runs", 500), ("adapters", 10_000), ("waiting", 100), ("users", 100)):
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["TMPDIR"] = tempfile.tempdir = place  # device locks of its own
        workspace = Path(place) / "workspace"
        if "runs" in options.what:
            measure_runs(workspace, options.runs)
        if "gallery" in options.what:
            measure_gallery(workspace, options.adapters)
        if "page" in options.what:
            measure_page(workspace, options.users)
        if "queue" in options.what:
            measure_queue(workspace, options.waiting)


if __name__ == "__main__":
    main()
