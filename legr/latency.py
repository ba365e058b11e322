"""Wall-clock time of a forward pass, measured side by side."""

import time
from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from legr.graph import Graph
from legr.inference import can_be_fast, fast_inference
from legr.surgery import prune
from legr.training import Compute


def measure(
    networks: Mapping[str, nn.Module],
    side: int,
    batches: tuple[int, ...],
    compute: Compute,
    repetitions: int = 20,
    warmup: int = 3,
) -> pd.DataFrame:
    """Median latency of each network on random images [batch, 3, side, side].

    Networks take turns within each repetition, so that a change in the machine's load meets all. A single image's
    time is that of the second of two calls: in the first, the network's weights come back to the caches.

    Returns:
        Columns network, batch, latency_ms (median), latency_iqr_ms (interquartile range).
    """
    rows = []
    for batch in batches:
        inputs = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        inputs = inputs.to(compute.device, memory_format=torch.channels_last)
        wait = torch.cuda.synchronize if compute.device.startswith("cuda") else lambda: None
        times: dict[str, list[float]] = {name: [] for name in networks}
        with torch.inference_mode(), compute.autocast():
            for repetition in range(warmup + repetitions):
                for name, network in networks.items():
                    network.eval()
                    if batch == 1:
                        network(inputs)
                        wait()
                    start = time.perf_counter()
                    network(inputs)
                    wait()
                    if repetition >= warmup:
                        times[name].append(1000 * (time.perf_counter() - start))
        for name, values in times.items():
            q = pd.Series(values).quantile([0.25, 0.5, 0.75]).tolist()
            rows.append({"network": name, "batch": batch, "latency_ms": q[1], "latency_iqr_ms": q[2] - q[0]})
    return pd.DataFrame(rows)


def against_dense(
    model: nn.Module, graph: Graph, side: int, batch: int, compute: Compute, repetitions: int = 10, fused: bool = False
) -> Callable[[list[Tensor]], float]:
    """What `select(..., latency=, measure=)` asks: latency as a fraction of that of `model`, timed side by side.

    Args:
        side, batch: of the random images [batch, 3, side, side].
        fused: time both networks as `fast_inference` runs them, where it can.
    """

    def ready(network: nn.Module) -> nn.Module:
        if fused and can_be_fast(compute.device, compute.dtype):
            return fast_inference(network, compute.dtype)
        return network.to(compute.device, memory_format=torch.channels_last)

    dense = ready(prune(model, graph, [torch.ones(width, dtype=torch.bool) for width in graph.widths]))

    def ratio(kept: list[Tensor]) -> float:
        networks = {"dense": dense, "cut": ready(prune(model, graph, kept))}
        table = measure(networks, side, (batch,), compute, repetitions).set_index("network")
        return table.latency_ms["cut"] / table.latency_ms["dense"]

    return ratio
