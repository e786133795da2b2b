"""Linear least squares with a ridge, from sums over tokens: no token is kept."""

import torch

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # in units of the mean diagonal of the Gram matrix


class LeastSquares:
    """X (outputs, inputs) for which X x is nearest to y, over the tokens taken in. Sums are in float64."""

    def __init__(self) -> None:
        self.xx: torch.Tensor | float = 0.0
        self.yx: torch.Tensor | float = 0.0
        self.yy: torch.Tensor | float = 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Take in tokens. Args: x (tokens, inputs), y (tokens, outputs)."""
        x, y = x.double(), y.double()
        self.xx = self.xx + x.T @ x
        self.yx = self.yx + y.T @ x
        self.yy = self.yy + y.pow(2).sum(0)

    def solve(self, ridge: float) -> torch.Tensor:
        """X = yx (xx + ridge * mean diagonal of xx)^-1, which is 0 for inputs that were always 0."""
        scale = self.xx.diagonal().mean()
        if scale == 0:
            return torch.zeros_like(self.yx)
        regular = self.xx + ridge * scale * torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        return torch.cholesky_solve(self.yx.T, torch.linalg.cholesky(regular)).T

    def residuals(self, ridge: float) -> torch.Tensor:
        """(outputs,): the sum over tokens of (y - X x)^2 for the solution X."""
        return self._residuals(self.solve(ridge))

    def best_on(self, held_out: "LeastSquares") -> torch.Tensor:
        """The solution, over `RIDGES`, with the least squared error on held-out tokens; 0 where that has less still."""
        found = [self.solve(ridge) for ridge in RIDGES] + [torch.zeros_like(self.yx)]
        return min(found, key=lambda X: held_out._residuals(X).sum().item())

    def _residuals(self, X: torch.Tensor) -> torch.Tensor:
        return self.yy - 2 * (X * self.yx).sum(1) + ((X @ self.xx) * X).sum(1)
