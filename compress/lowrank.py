"""The best low-rank term of an error matrix under a metric, in closed form.

Knows matrices and metrics; not where the error comes from (`decompose`), how factors are stored (`factors`), nor how many ranks
are worth their bytes (`allocate`).
A metric weighs an error E [O, I] as ‖diag(row)·E·S‖_F with S·Sᵀ = R. With F = diag(row)·E, the best term of rank r is
diag(row)⁻¹·U·Uᵀ·F where U holds the r first eigenvectors of F·R·Fᵀ: no root of R, no inverse of R, so R may be singular.
Legend: O out, I in, R rank, S smaller side, K width of a Krylov basis.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

KRYLOV_SIDE = 512
"""Below this, an eigensolve of the smaller side is cheaper than a Krylov space."""
OVERSAMPLING = 8
CONVERGED = 1e-8
"""A Krylov space stops growing when a step adds less than this share to the energy that U catches."""


@dataclass(frozen=True)
class Metric:
    """‖diag(row)·E·S‖_F; S is diag(column), or a root of the second moment, or (both None) the identity.

    row_O, column_I: positive, row_O without zeros; moment_II symmetric, positive semidefinite, possibly singular.
    """

    row_O: Tensor | None = None
    column_I: Tensor | None = None
    moment_II: Tensor | None = None

    def rows(self, error_OI: Tensor) -> Tensor:
        """F = diag(row)·E, float64."""
        error = error_OI.double()
        return error if self.row_O is None else error * self.row_O.double().unsqueeze(1)

    def times_moment(self, x_NI: Tensor) -> Tensor:
        """x·R for float64 rows x [N, I]."""
        if self.moment_II is not None:
            return x_NI @ self._moment_II
        return x_NI if self.column_I is None else x_NI * self.column_I.double().square()

    def times_root(self, x_NI: Tensor) -> Tensor:
        """x·S for float64 rows x [N, I]; [N, K] with K the numerical rank of R."""
        if self.moment_II is not None:
            return x_NI @ self._root_IK
        return x_NI if self.column_I is None else x_NI * self.column_I.double()

    def beyond(self, down_RI: Tensor, overlap: float) -> Tensor:
        """R − (1 − overlap)·R·downᵀ·(down·R·downᵀ)⁺·down·R, float32 [I, I]; `overlap` 0 is a Schur complement: what an error costs when the
        best up for these rows follows it (variable projection, Golub & Pereyra 1973). R itself at 1."""
        seen_RI = down_RI.double() @ self._moment_II
        caught_RR = torch.linalg.pinv(seen_RI @ down_RI.double().T, rtol=1e-10, hermitian=True)
        left_II = self._moment_II - (1 - overlap) * (seen_RI.T @ (caught_RR @ seen_RI))
        left_II.diagonal().clamp_(min=0.0)
        return left_II.float()

    def scaled(self, scale_I: Tensor) -> "Metric":
        """The metric of E' = E·diag(scale): what the same error costs when the matrix multiplies x/scale."""
        inverse = scale_I.double().reciprocal()
        if self.moment_II is not None:
            return Metric(self.row_O, None, self._moment_II * inverse * inverse.unsqueeze(1))
        return Metric(self.row_O, inverse if self.column_I is None else self.column_I.double() * inverse)

    def importance_I(self) -> Tensor | None:
        """What each column's squared error weighs when columns are taken one by one: diag R, float32 [I]; None if all alike."""
        if self.moment_II is not None:
            return self.moment_II.diagonal().float()
        return None if self.column_I is None else self.column_I.float().square()

    @cached_property
    def _moment_II(self) -> Tensor:
        assert self.moment_II is not None
        return self.moment_II.double()

    @cached_property
    def _root_IK(self) -> Tensor:
        values, vectors = torch.linalg.eigh(self._moment_II)
        seen = values > values[-1].clamp(min=0) * 1e-14
        return vectors[:, seen] * values[seen].sqrt()


def squared_error(error_OI: Tensor, metric: Metric) -> float:
    """‖diag(row)·E·S‖_F², accumulated in float64; the rounding of a nearly singular moment cannot make it negative."""
    return WeightedError(error_OI, metric).squared


@dataclass(frozen=True)
class WeightedError:
    """An error in a metric: what many low-rank terms are solved for and compared by, from one product F·R."""

    error_OI: Tensor
    metric: Metric

    @cached_property
    def weighted_OI(self) -> Tensor:
        """F, float64."""
        return self.metric.rows(self.error_OI)

    @cached_property
    def image_OI(self) -> Tensor:
        """F·R, float64."""
        return self.metric.times_moment(self.weighted_OI)

    @cached_property
    def squared_O(self) -> Tensor:
        """What each row of the error costs, float64 [O]."""
        return (self.image_OI * self.weighted_OI).sum(1)

    @property
    def squared(self) -> float:
        """‖F·S‖²."""
        return max(self.squared_O.sum().item(), 0.0)

    def seen_by(self, down_RI: Tensor) -> "SeenError":
        """What a right factor sees of the error: all that the best left factor for it, and what is left by one, are made from."""
        down = down_RI.double()
        return SeenError(self, self.image_OI @ down.T, self.metric.times_moment(down) @ down.T)

    def left_by(self, up_OR: Tensor, down_RI: Tensor) -> float:
        """What a term leaves of the squared error."""
        return self.seen_by(down_RI).left_by(up_OR)

    def best(self, rank: int) -> tuple[Tensor, Tensor]:
        """`best_low_rank` of this error. Where a larger rank was computed before, its first vectors are these."""
        check_rank(rank, (self.error_OI.shape[0], self.error_OI.shape[1]))
        known_OR = vars(self).get("left_OR")
        if known_OR is None or known_OR.shape[1] < rank:
            known_OR = vars(self)["left_OR"] = self._left_vectors(rank)
        left_OR = known_OR[:, :rank]
        up_OR = left_OR if self.metric.row_O is None else left_OR / self.metric.row_O.double().unsqueeze(1)
        return balance(up_OR, left_OR.T @ self.weighted_OI)

    def _left_vectors(self, rank: int) -> Tensor:
        """The first `rank` eigenvectors of F·R·Fᵀ, float64 [O, R] with orthonormal columns."""
        weighted_OI, rows, columns = self.weighted_OI, *self.error_OI.shape
        side = min(rows, columns)
        if side > KRYLOV_SIDE and 8 * (rank + OVERSAMPLING) <= side:
            weighted_IO = weighted_OI.T.contiguous()
            image_OI = vars(self).get("image_OI")  # where it is known already, a product less

            def apply(x_KO: Tensor) -> Tensor:
                return (self.metric.times_moment(x_KO @ weighted_OI) if image_OI is None else x_KO @ image_OI) @ weighted_IO

            return _krylov(apply, rows, rank, weighted_OI).T
        if rows <= columns:
            return torch.linalg.eigh(self.image_OI @ weighted_OI.T).eigenvectors[:, -rank:].flip(1)
        scaled = self.metric.times_root(weighted_OI)
        right = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:].flip(1)
        image = torch.zeros(rows, rank, dtype=torch.float64, device=weighted_OI.device)
        image[:, : right.shape[1]] = scaled @ right
        return torch.linalg.qr(image).Q


@dataclass(frozen=True)
class SeenError:
    """F·R·downᵀ, float64 [O, R], and down·R·downᵀ, float64 [R, R], of a right factor."""

    error: WeightedError
    met_OR: Tensor
    gram_RR: Tensor

    def best_up(self) -> Tensor:
        """The best left factor, E·R·downᵀ·(down·R·downᵀ)⁺, float32 [O, R]."""
        row_O = self.error.metric.row_O
        met_OR = self.met_OR if row_O is None else self.met_OR / row_O.double().unsqueeze(1)
        return (met_OR @ torch.linalg.pinv(self.gram_RR, rtol=1e-10, hermitian=True)).float()

    def left_by(self, up_OR: Tensor) -> float:
        """‖(F − D·up·down)·S‖², D = diag(row), by thin products: ‖F·S‖² − 2·⟨F·R·downᵀ, D·up⟩ + ⟨upᵀ·D²·up, down·R·downᵀ⟩."""
        up = self.error.metric.rows(up_OR)
        met, own = (self.met_OR * up).sum(), ((up.T @ up) * self.gram_RR).sum()
        return max((self.error.squared_O.sum() - 2 * met + own).item(), 0.0)


def check_rank(rank: int, shape: tuple[int, int]) -> None:
    """ValueError naming a rank that no matrix of this shape has."""
    if not 0 < rank <= min(shape):
        raise ValueError(f"rank {rank} does not fit a {shape[0]}×{shape[1]} matrix; choose 1…{min(shape)}")


def best_low_rank(error_OI: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """(up [O, R], down [R, I]) float32 with up·down the minimiser of ‖E − L‖ in the metric over rank(L) ≤ R, √Σ in each factor.

    The closed form of QERA (arXiv:2410.06040, theorem 1), EoRA (arXiv:2410.21271) and CLoQ (arXiv:2501.18475), without their
    square root and inverse. ValueError when rank > min(O, I).
    """
    return WeightedError(error_OI, metric).best(rank)


def spectrum(error_OI: Tensor, metric: Metric, weights_VO: Tensor | None = None) -> Tensor:
    """Squared singular values of diag(row)·E·S, float64 [min(O, I)], descending: the error of rank r is the sum past the r-th.

    With weights_VO: [V, min(O, I)], what each singular direction carries when row o of diag(row)·E counts weights[v, o] times; the
    directions and their order stay those of the metric, so past the r-th lies what the metric's own best term of rank r leaves.
    """
    weighted = metric.rows(error_OI)
    across = weighted.shape[0] <= weighted.shape[1]
    scaled = weighted if across else metric.times_root(weighted)
    gram = metric.times_moment(weighted) @ weighted.T if across else scaled.T @ scaled
    if weights_VO is None:
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    else:
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(gram))
        squares_OR = vectors.square() * values.clamp(min=0) if across else (scaled @ vectors).square()
        values = weights_VO.double() @ squares_OR
    return torch.nn.functional.pad(values, (0, min(error_OI.shape) - values.shape[-1]))


def balance(up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product as U√Σ · √ΣVᵀ, float32: the largest entries of both factors are as small as can be."""
    left, upper = torch.linalg.qr(up_OR.double())
    right, lower = torch.linalg.qr(down_RI.double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)  # R × R only
    return (left @ (u * s.sqrt())).float(), ((vh.T * s.sqrt()).T @ right.T).float()


def _krylov(apply: Callable[[Tensor], Tensor], size: int, rank: int, like: Tensor) -> Tensor:
    """Top eigenvectors [R, O] of the operator by a block Krylov space from a fixed random start (randomized SVD with power iterations
    that throw nothing away: Musco & Musco, arXiv:1504.05477). The space grows until what it catches stops growing.

    Vectors are rows: thin products with a matrix on the right run several times faster than with one on the left."""
    generator = torch.Generator().manual_seed(0)
    start_KO = torch.randn(size, rank + OVERSAMPLING, generator=generator, dtype=torch.float64).T.to(like.device)
    block = basis = _orthonormal(start_KO)
    images, caught = apply(block), -1.0
    ritz = basis @ images.T
    while True:
        values, vectors = torch.linalg.eigh((ritz + ritz.T) / 2)
        now = values[-rank:].sum().item()
        if now - caught <= CONVERGED * abs(now) or len(basis) + len(block) > size:
            return vectors[:, -rank:].flip(1).T @ basis
        caught = now
        block = images[-len(block) :]
        for _ in range(2):  # once is not enough in finite precision
            block = _orthonormal(block - (block @ basis.T) @ basis)
        image, basis = apply(block), torch.cat((basis, block))
        new_KN, images = basis @ image.T, torch.cat((images, image))
        ritz = torch.cat((torch.cat((ritz, new_KN[: -len(block)].T)), new_KN), 1)


def _orthonormal(rows_KO: Tensor) -> Tensor:
    return torch.linalg.qr(rows_KO.T).Q.T.contiguous()
