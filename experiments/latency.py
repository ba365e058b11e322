"""Wall-clock time of a forward pass, measured side by side."""

from collections.abc import Mapping

import pandas as pd
import torch
from torch import nn
from torch.utils.benchmark import Timer

from legr.training import Compute


def measure(
    networks: Mapping[str, nn.Module],
    shape: tuple[int, int, int],
    batches: tuple[int, ...],
    compute: Compute,
    repetitions: int = 20,
) -> pd.DataFrame:
    """Latency of each network on random inputs [batch, *shape]: channels, height, width.

    Networks take turns within each repetition, so that a change in the machine's load meets all. Each turn is PyTorch's
    `Timer`: two calls, in which the network's weights come back to the caches, then the one that is timed.

    Returns:
        Columns network, batch, latency_ms (median), low_ms and high_ms (quartiles).
    """
    rows = []
    for batch in batches:
        inputs = torch.randn(batch, *shape).to(compute.device, memory_format=torch.channels_last)
        # The timer waits for the current device, which is not that of the inputs where `compute` says cuda:1.
        with torch.inference_mode(), torch.accelerator.device_index(inputs.device.index), compute.autocast():
            for _ in range(repetitions):
                for name, network in networks.items():
                    dtype = next((p.dtype for p in network.parameters()), torch.float32)
                    given = {"network": network.eval(), "inputs": inputs.to(dtype)}
                    timer = Timer("network(inputs)", globals=given, num_threads=torch.get_num_threads())
                    rows.append((name, batch, 1000 * timer.timeit(1).mean))
    times = pd.DataFrame(rows, columns=["network", "batch", "latency_ms"])
    quartiles = times.groupby(["network", "batch"], sort=False).latency_ms.quantile([0.5, 0.25, 0.75]).unstack()
    return quartiles.set_axis(["latency_ms", "low_ms", "high_ms"], axis=1).reset_index()
