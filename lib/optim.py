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


@torch.no_grad()
def orthogonalize(x):
    """x (n, a, b) -> nearly the closest matrices whose singular values are all 1: five Newton-Schulz steps with Muon's
    usual coefficients. In float32: bfloat16 is slow on most CPUs, and would turn a difference of 1e-7 in a gradient,
    such as two processes make, into 2 % of a step."""
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


class MatrixMuon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024): the step is the orthogonalized momentum (Nesterov's), as large as Adam's would be."""

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum = group["momentum"]

            # matrices of the same shape go through the iteration together
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                average = state["momentum_buffer"]
                average.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(average, momentum)
                by_shape.setdefault(p.shape, []).append((p, update))

            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in pairs]))
                size = group["lr"] * 0.2 * max(rows, columns) ** 0.5  # 0.2: the usual size of Adam's steps
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.sub_(update, alpha=size)


def fused(params):
    """The argument by which torch's optimizers update all weights in one kernel: on a GPU only, a CPU rounds otherwise
    with it than without."""
    return {"fused": True} if all(p.is_cuda for p in params) else {}


class Muon:
    """Muon for the weight matrices of the layers, Adam for all else (embeddings, convolutions, biases, norms).

    A step's update has all singular values equal, so directions of small gradient are learnt as fast as the others:
    on the toy set this reaches the loss of Adam in a quarter of the steps. Steps are as large as Adam's, so is lr.
    """

    def __init__(self, module, lr, **adam):
        linear = {id(m.weight) for m in module.modules() if isinstance(m, torch.nn.Linear)}
        params = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in params if id(p) in linear]
        rest = [p for p in params if id(p) not in linear]
        adam |= fused(rest)
        self.parts = [MatrixMuon(matrices, lr), torch.optim.Adam(rest, lr=lr, **adam)]

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
        return torch.optim.SGD(params, lr=lr, **fused(params))
    return torch.optim.Adam(params, lr=lr, **fused(params))
