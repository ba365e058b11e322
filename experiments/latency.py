"""Wall-clock time of a forward pass, measured side by side."""

import time
from collections.abc import Mapping

import pandas as pd
import torch
from torch import nn

from legr.training import Compute

WARM_UP = 3


def measure(
    networks: Mapping[str, nn.Module], side: int, batches: tuple[int, ...], compute: Compute, repetitions: int = 20
) -> pd.DataFrame:
    """Latency of each network on random images [batch, 3, side, side].

    Networks take turns within each repetition, so that a change in the machine's load meets all. A single image's
    time is that of the second of two calls: in the first, the network's weights come back to the caches.

    Returns:
        Columns network, batch, latency_ms (median), low_ms and high_ms (quartiles).
    """
    rows = []
    device = torch.device(compute.device)
    for batch in batches:
        inputs = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
        inputs = inputs.to(device, memory_format=torch.channels_last)
        times: dict[str, list[float]] = {name: [] for name in networks}
        with torch.inference_mode(), compute.autocast():
            for repetition in range(WARM_UP + repetitions):
                for name, network in networks.items():
                    network.eval()
                    if batch == 1:
                        _timed(network, inputs, device)
                    milliseconds = _timed(network, inputs, device)
                    if repetition >= WARM_UP:
                        times[name].append(milliseconds)
        for name, values in times.items():
            low, middle, high = pd.Series(values).quantile([0.25, 0.5, 0.75])
            rows.append({"network": name, "batch": batch, "latency_ms": middle, "low_ms": low, "high_ms": high})
    return pd.DataFrame(rows)


def _timed(network: nn.Module, inputs: torch.Tensor, device: torch.device) -> float:
    start = time.perf_counter()
    network(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)
