"""Call an op: by backend, into a buffer of your own, and as an op of torch under torch.compile."""

import torch

import lab

device = "cuda" if torch.cuda.is_available() else "cpu"
x, w = torch.randn(2, 576, device=device), torch.randn(576, device=device)

results = {}
for backend in ("torch", "cuda", "triton"):  # each is the kernel of that backend, and no other
    results[backend] = lab.select(backend, device=device).rmsnorm(x, w, 1e-5)
    torch.testing.assert_close(results[backend], results["torch"])
    print(f"{backend:7} {results[backend][0, :4].tolist()}")

out = torch.empty_like(x)
lab.select("triton", device=device).rmsnorm(x, w, 1e-5, out=out)  # nothing is allocated

lab.use("triton")  # what runs torch.ops.lab.*


@torch.compile(fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
def step(x, residual):
    return torch.ops.lab.rmsnorm(x, w, 1e-5, residual)  # adds x to residual, in place


residual = torch.zeros_like(x)
assert torch.equal(step(x, residual), out) and torch.equal(residual, x)
print("compiled: the same, and the residual was updated")
