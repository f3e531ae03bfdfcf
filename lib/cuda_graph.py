"""Work of fixed shapes as one CUDA graph: thousands of small kernels are started at once, not one by one by Python.

    y = replay(work, x, key, module)       # work(x), a dict of tensors; recorded when a key is seen a second time

The work must read nothing from the device and copy nothing to it. It may draw from torch's own generator. This file has
not been run on a GPU yet.
"""
import torch

MOST_GRAPHS = 8  # the one that was needed longest ago is dropped: each keeps the memory that its work needs

graphs = {}


def replay(work, x, key, module):
    """key: what the work depends on besides x, the precision and the weights of the module. The weights are read anew
    each time, so they may change in place; where they lie is part of what is remembered."""
    addresses = tuple(weight.data_ptr() for weight in module.parameters())
    precision = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    key = (key, addresses, precision, x.shape, x.dtype, x.device)
    if key not in graphs:  # may never come again, as the budgets of a random ratio
        if len(graphs) == MOST_GRAPHS:
            del graphs[next(iter(graphs))]
        graphs[key] = None
        return work(x)

    entry = graphs.pop(key) or record(work, x.clone())
    graphs[key] = entry
    graph, own_x, result = entry
    own_x.copy_(x)
    graph.replay()
    return {name: tensor.clone() for name, tensor in result.items()}


def record(work, x):
    """The graph, the x that it reads, and the tensors that it writes."""
    # autocast's copies of the weights must be made in the graph: those that it keeps are freed when it ends
    on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
        return capture(work, x)


def capture(work, x):
    # once without recording, on a stream of its own: kernels are chosen and loaded then
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work(x)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work(x)
    return graph, x, result
