"""A GPU on paper: runs code on the CPU, finds what a real GPU would refuse, and counts where it would be waited for.

    python tests/pretend_gpu.py train_grpo.py config/toy_grpo.py --steps=2 --device=cuda
    python tests/pretend_gpu.py argaze.train --device=cuda … -- argaze.show --device=cuda …      # modules, one by one

A tensor that was made on, moved to or computed from "cuda" is marked, and computed on the CPU. MixedDevices is raised
where a marked tensor meets an unmarked one (0-dimensional ones and indices may), is read by numpy, or is drawn with a
CPU generator. `waits` counts, by source line, where the host waits for the GPU: it reads a value by .item(), .tolist(),
.cpu() or if, or sends one without non_blocking=True; `copies` all that it sends.

What it cannot see: the inside of one call of torch (the backward pass, DDP), kernels, memory, speed. Code that passes
here may still fail on a GPU; code that fails here fails there.
"""
import collections
import runpy
import sys
import traceback

import torch
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "unique"}
DRAWS = {"rand", "randn", "randint", "randperm", "multinomial", "normal_", "uniform_", "exponential_"}
SENDS = {"to", "cuda", "tensor", "as_tensor"}
INDEXING = {"__getitem__", "__setitem__", "index_put", "index_put_"}
ANY_DEVICE = {"to", "cuda", "cpu", "copy_", "result_type", "is_same_size", "swap_tensors",
              "_has_compatible_shallow_copy_type"}
LIBRARIES = ("/torch/", "/einops/", "/transformers/", "/pretend_gpu.py", "runpy")


class MixedDevices(RuntimeError):
    """What a GPU would refuse."""


def marked(tensor):
    return getattr(tensor, "_on_paper", False)


def tensors_in(tree):
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in leaves if not isinstance(leaf, CausalBias)]  # a name of a mask, on no device


def has_index_from_cpu(index):
    """Whether x[index] sends a list, or a tensor of the CPU, to the GPU."""
    for part in index if isinstance(index, tuple) else [index]:
        if isinstance(part, list) or isinstance(part, torch.Tensor) and part.dim() > 0 and not marked(part):
            return True
    return False


def source_line():
    """The innermost line of code that is the project's own."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        if not any(part in frame.filename for part in LIBRARIES):
            return f"{frame.filename.split('/')[-1]}:{frame.lineno} {frame.line}"
    return "?"


class PaperGPU(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.copies = collections.Counter()
        self.n_calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name in ("__get__", "__set__"):
            return self.attribute(function, args)

        # the device that is asked for, if any; all is computed on the CPU
        args, kwargs = list(args), dict(kwargs or {})
        device = name if name in ("cuda", "cpu") else kwargs.get("device")
        if device is not None and "device" in kwargs:
            kwargs["device"] = "cpu"
        for i, value in enumerate(args):
            if name == "to" and isinstance(value, (str, torch.device)):
                device, args[i] = value, "cpu"

        # where the result will be: as asked, else with the tensors that it is computed from
        inputs = tensors_in((args, kwargs))
        from_gpu = any(map(marked, inputs))
        on_gpu = from_gpu and name != "tensor"
        if device is not None:
            on_gpu = isinstance(device, int) or torch.device(device).type == "cuda"
        if from_gpu:
            self.check(name, args, inputs)
            self.n_calls += 1
            if name in READS or not on_gpu:
                self.waits[source_line()] += 1
        is_sent = on_gpu and not from_gpu and name in SENDS
        is_sent = is_sent or from_gpu and name == "__getitem__" and has_index_from_cpu(args[1])
        if is_sent:
            self.copies[source_line()] += 1
            if not kwargs.get("non_blocking"):
                self.waits[source_line()] += 1
        if on_gpu and name in DRAWS and kwargs.get("generator") is not None:
            raise MixedDevices(f"{name} with a CPU generator at {source_line()}")

        result = args[0] if name == "cuda" else function(*args, **kwargs)
        if isinstance(result, torch.Tensor) and on_gpu != marked(result) and any(result is tensor for tensor in inputs):
            result = result.clone()  # a move that moved nothing
        for tensor in tensors_in(result) if on_gpu or marked(result) else []:
            tensor._on_paper = on_gpu
        return result

    def attribute(self, function, args):
        """tensor.device, .is_cuda, .data, .grad, .T and so on."""
        tensor, name = args[0], function.__self__.__name__
        if name == "device" and marked(tensor):
            return torch.device("cuda", 0)
        if name in ("is_cuda", "is_cpu"):
            return marked(tensor) == (name == "is_cuda")
        result = function(*args)
        if isinstance(result, torch.Tensor) and result is not tensor and marked(tensor):
            result._on_paper = True
        if function.__name__ == "__set__" and isinstance(args[1], torch.Tensor):
            tensor._on_paper = marked(args[1])
        return result

    def check(self, name, args, inputs):
        if name in ("numpy", "__array__"):
            raise MixedDevices(f"numpy() of a GPU tensor at {source_line()}")
        if name in ANY_DEVICE:
            return
        if name in INDEXING and marked(args[0]):  # indices may come from the CPU, values may not
            inputs = [] if name == "__getitem__" else tensors_in(args[-1])
        strangers = [tuple(tensor.shape) for tensor in inputs if not marked(tensor) and tensor.dim() > 0]
        if strangers:
            raise MixedDevices(f"{name} of GPU tensors and of CPU tensors {strangers} at {source_line()}")


def install():
    """Make torch say that there is one GPU, for the rest of this process."""
    answers = dict(is_available=True, is_bf16_supported=True, device_count=1, current_device=0, set_device=None,
                   synchronize=None, empty_cache=None, reset_peak_memory_stats=None, max_memory_allocated=0)
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)

    # autocast and data loading stay the CPU's
    class Autocast(torch.autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu", *args, **kwargs)

    torch.autocast = torch.amp.autocast_mode.autocast = Autocast
    torch.Tensor.pin_memory = lambda tensor: tensor


def main(arguments):
    """Run scripts (files) or modules, each with its arguments, separated by --. What goes wrong there is raised."""
    install()
    sys.path.insert(0, ".")
    while arguments:
        end = arguments.index("--") if "--" in arguments else len(arguments)
        sys.argv, arguments = arguments[:end], arguments[end + 1:]
        script = sys.argv[0]
        with PaperGPU() as gpu:
            if script.endswith(".py"):
                runpy.run_path(script, run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__", alter_sys=True)
        for line, n in gpu.waits.most_common():
            print(f"{n:8} {line}")
        print(f"on paper: {script}, {gpu.n_calls} calls, {gpu.waits.total()} waits", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
