"""What a cluster can do, measured on every node of a job's Ray: shared files, collectives, the cache without internet.

`python -m launch.probe ADDRESS FOLDER NODES WORKERS PLATFORM MODEL` writes FOLDER/probe.json: a list of [what, fine,
detail]. A check that raises says what it raised; the others go on.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEGABYTES = 64
"""Of each all-reduce."""
CHECK_SECONDS = 120.0


def main() -> None:
    """Entry point."""
    import ray

    address, folder, nodes, workers, platform, model = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    alive = [node for node in ray.nodes() if node["Alive"]]
    place = [node["NodeID"] for node in alive]
    checks: list[tuple[str, Callable[[], str]]] = [
        ("nodes", lambda: _nodes(alive, int(nodes), int(workers))),
        ("private network", lambda: _network(alive)),
        ("shared files", lambda: _shared(Path(folder), place)),
        ("collectives", lambda: _collectives(place, int(workers), platform)),
        ("model without internet", lambda: _model(place, model)),
    ]
    found = [_try(what, check) for what, check in checks]
    (Path(folder) / "probe.json").write_text(json.dumps(found))


def _try(what: str, check: Callable[[], str]) -> tuple[str, bool, str]:
    started = time.monotonic()
    try:
        detail = check()
    except Exception as error:  # whatever a cluster can do wrong is what is to be told
        return what, False, f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return what, True, f"{detail} ({time.monotonic() - started:.1f} s)"


def _nodes(alive: list[dict[str, Any]], nodes: int, workers: int) -> str:
    names = ", ".join(sorted(f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}" for node in alive))
    few = [node for node in alive if node["Resources"].get("GPU", 0) < workers]
    if len(alive) != nodes or few:
        raise RuntimeError(f"{nodes} nodes with {workers} workers each are needed; Ray has {names}")
    return names


def _network(alive: list[dict[str, Any]]) -> str:
    """A warning and no failure: a firewall, which nobody can see from inside, may protect a public address."""
    public = [
        node["NodeManagerAddress"] for node in alive if ipaddress.ip_address(node["NodeManagerAddress"]).is_global
    ]
    if not public:
        return "every node's address is private"
    return (
        f"WARNING: {', '.join(public)} is a public address. TransferQueue and torch.distributed run what is sent to "
        "them there, without asking for a password. Be sure that a firewall keeps others out, or give the profile the "
        "`interface` of a private network"
    )


def _everywhere(place: list[str], function: Any, *each: tuple[Any, ...], gpus: float = 0) -> list[Any]:
    """`function(*each[i])` on node i, all at the same time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0)(function)
    options = [{"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)} for node in place]
    started = [
        task.options(num_gpus=gpus, **option).remote(*arguments)
        for option, arguments in zip(options, each, strict=True)
    ]
    return list(ray.get(started, timeout=CHECK_SECONDS))


def _shared(folder: Path, place: list[str]) -> str:
    """Every node writes a file, and sees those of all others."""
    _everywhere(place, _write, *[(str(folder), i) for i in range(len(place))])
    seen = _everywhere(place, _look, *[(str(folder), len(place))] * len(place))
    if blind := [host for host, names in seen if len(names) != len(place)]:
        raise RuntimeError(f"{', '.join(blind)} does not see in {folder} what the other nodes wrote")
    return f"{len(place)} nodes see each other's files in {folder}"


def _write(folder: str, number: int) -> None:
    with open(Path(folder) / f"seen_{number}", "w") as file:
        file.write(socket.gethostname())
        file.flush()
        os.fsync(file.fileno())


def _look(folder: str, expected: int) -> tuple[str, list[str]]:
    deadline = time.monotonic() + 60  # a network file system may remember for a while that a file was not there
    names: list[str] = []
    while len(names) < expected and time.monotonic() < deadline:
        names = [path.name for path in Path(folder).glob("seen_*") if path.read_text()]
        time.sleep(0.2)
    return socket.gethostname(), names


def _collectives(place: list[str], workers: int, platform: str) -> str:
    """An all-reduce over all workers of all nodes, whose sum is known."""
    ranks = [(node, rank) for rank, node in enumerate(node for node in place for _ in range(workers))]
    (host,) = _everywhere(place[:1], _free_port, ())
    each = [(rank, len(ranks), host, platform) for _, rank in ranks]
    speeds = _everywhere([node for node, _ in ranks], _reduce, *each, gpus=1)
    kind = "gloo" if platform == "cpu" else "nccl"
    return f"all-reduce over {len(ranks)} workers with {kind}: {min(speeds):.2f} GB/s"


def _free_port() -> str:
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


def _reduce(rank: int, world: int, host: str, platform: str) -> float:
    import datetime

    import torch
    import torch.distributed as dist

    device = "cpu" if platform == "cpu" else "cuda"
    kind = "gloo" if platform == "cpu" else "nccl"
    dist.init_process_group(
        kind, f"tcp://{host}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=CHECK_SECONDS)
    )
    ones = torch.full((MEGABYTES * 2**18,), float(rank + 1), device=device)
    dist.all_reduce(ones[:1].clone())  # the first one connects
    started = time.monotonic()
    dist.all_reduce(ones)
    total = ones[-1].item()
    seconds = time.monotonic() - started
    dist.destroy_process_group()
    if total != world * (world + 1) / 2:
        raise RuntimeError(f"the sum of 1 to {world} came out as {total}")
    return MEGABYTES / 1024 / seconds


def _model(place: list[str], model: str) -> str:
    """Every node can read the starting model's configuration and tokenizer without a network."""
    kinds = set(_everywhere(place, _load, *[(model,)] * len(place)))
    return f"{model}: {', '.join(sorted(kinds))}"


def _load(model: str) -> str:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return f"{AutoConfig.from_pretrained(model).model_type}, {len(tokenizer)} tokens"


if __name__ == "__main__":
    main()
