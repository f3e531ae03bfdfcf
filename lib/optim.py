"""Schedules and optimizers."""
import torch


def learning_rate(kind, step, total, lr, lr_end, warmup):
    """linear: lr -> lr_end. linear_w_warmup: 0 -> lr over `warmup` of the steps, then -> lr_end. constant."""
    if kind == "constant":
        return lr
    warm = int(warmup * total) if kind == "linear_w_warmup" else 0
    if step < warm:
        return lr * (step + 1) / warm
    return lr + (lr_end - lr) * (step - warm) / max(1, total - warm)


def exponential(step, total, start, end):
    """start · (end / start)^(step / total)"""
    return start * (end / start) ** (step / max(1, total))


class Muon:
    """Muon for the weight matrices of the layers, Adam for all else (embeddings, convolutions, biases, norms).

    A step's update has all singular values equal, so directions of small gradient are learnt as fast as the others:
    on the toy set this reaches the loss of Adam in a quarter of the steps. Steps are as large as Adam's, so is lr.
    torch computes a step in bfloat16, which can turn a difference of 1e-7 in a gradient into 2 % of the step (random
    matrices). So one process and two, whose sums differ that much, part by 1e-4 in loss after 20 steps; Adam by 1e-5.
    """

    def __init__(self, module, lr, **adam):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}")
        linear = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Linear)}
        params = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in params if id(p) in linear]
        rest = [p for p in params if id(p) not in linear]
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.Adam(rest, lr=lr, **adam)]

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state):
        for part, state_of_part in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(state_of_part)


def make_optimizer(kind, module, lr):
    """kind: adam | sgd | muon, for all weights that are trained."""
    if kind == "muon":
        return Muon(module, lr)
    params = [p for p in module.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(params, lr=lr)
    return torch.optim.Adam(params, lr=lr)
