"""Wall-clock time of a forward pass, measured side by side."""

from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from legr.compute import Compute


def measure(
    networks: Mapping[str, nn.Module],
    shape: tuple[int, int, int],
    batches: tuple[int, ...],
    compute: Compute,
    repetitions: int = 20,
) -> pd.DataFrame:
    """Latency of each network on random inputs [batch, *shape]: channels, height, width.

    Networks are put into eval mode. They take turns within each repetition, so that a change in the machine's load
    meets all. Each turn is PyTorch's `Timer`: two calls, in which the network's weights come back to the caches, then
    the one that is timed. On CUDA a call replays the pass as a CUDA graph: launched layer by layer, small networks
    would all take the host's time.

    Returns:
        Columns network, batch, latency_ms (median), low_ms and high_ms (quartiles).
    """
    from torch.utils.benchmark import Timer  # here, because it looks for CUDA's compiler, and warns of a lack

    rows = []
    for batch in batches:
        inputs = torch.randn(batch, *shape).to(compute.device, memory_format=torch.channels_last)
        # The timer waits for the current device, which is not that of the inputs where `compute` says cuda:1.
        with torch.inference_mode(), torch.accelerator.device_index(inputs.device.index), compute.autocast():
            calls = {name: _call(network.eval(), inputs) for name, network in networks.items()}
            for _ in range(repetitions):
                for name, call in calls.items():
                    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
                    rows.append((name, batch, 1000 * timer.timeit(1).mean))
    times = pd.DataFrame(rows, columns=["network", "batch", "latency_ms"])
    quartiles = times.groupby(["network", "batch"], sort=False).latency_ms.quantile([0.5, 0.25, 0.75]).unstack()
    return quartiles.set_axis(["latency_ms", "low_ms", "high_ms"], axis=1).reset_index()


def _call(network: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """What is timed: a forward pass."""
    inputs = inputs.to(next((p.dtype for p in network.parameters()), torch.float32))
    if not inputs.is_cuda:
        return lambda: network(inputs)
    here, stream, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        for _ in range(3):  # in these, libraries set themselves up, which can't be recorded
            network(inputs)
    here.wait_stream(stream)
    with torch.cuda.graph(graph):
        network(inputs)

    def replay() -> Tensor:
        graph.replay()
        return inputs  # the graph reads them: they must stay as long as it does

    return replay
