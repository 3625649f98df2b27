"""For `kernels benchmark`: rmsnorm and linear beside torch, at one token of an 8B model."""

import torch
from kernels.benchmark import Benchmark


class DecodeBenchmark(Benchmark):
    seed = 0

    def setup(self) -> None:
        self.x = torch.randn(1, 4096, device=self.device, dtype=torch.bfloat16)
        self.w = torch.randn(4096, device=self.device, dtype=torch.bfloat16)
        self.matrix = torch.randn(6144, 4096, device=self.device, dtype=torch.bfloat16) / 64

    def benchmark_rmsnorm(self) -> None:
        self.out = self.kernel.rmsnorm(self.x, self.w, 1e-5)

    def verify_rmsnorm(self) -> torch.Tensor:
        return torch.nn.functional.rms_norm(self.x, (4096,), self.w, 1e-5)

    def benchmark_linear(self) -> None:
        self.out = self.kernel.linear(self.x, self.matrix)

    def verify_linear(self) -> torch.Tensor:
        return self.x @ self.matrix.T
