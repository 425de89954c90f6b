"""Error-compensated rounding (GPTQ: Frantar et al., 2022) to ternary weights.

What is made small is the error of the outputs on calibration inputs X [T, K], |X (W - W')^T|^2 = sum over rows e of W - W'
of e H e^T, with H = X^T X. Columns are rounded from first to last; the error of each is made up for by those to its right:
with H^-1 = U^T U, U upper triangular, column i's error e_i adds -e_i U[i, i:] / U[i, i] to them. The scales of 128 columns are
fitted by least squares when the first of them is reached, and once more, all of a row together under H, when all codes stand.
"""

from __future__ import annotations

import numpy as np

from bitnet_mlx.calibration.least_squares import Fitted, check_granularity, codes, fit, grouped, scales_of, spread
from bitnet_mlx.errors import FormatError
from bitnet_mlx.ternary import GROUP, matmul, ternarize

DAMPING = 0.01  # of the mean of H's diagonal, added to it
_ROWS = 512  # of a weight, whose systems of scales are solved at a time


def gptq(w: np.ndarray, h: np.ndarray, granularity: str = "group", u: np.ndarray | None = None) -> Fitted:
    """(t int8 [N, K], scale float32) of float w [N, K] under h float64 [K, K], symmetric. u: factor(h), if it is at hand.

    Rows, or the whole where a scale is of the whole, that absmean or plain least squares serves better, keep those:
    the objective is never worse than theirs. Raises FormatError where h is not finite.
    """
    check_granularity(granularity)
    w, h = np.asarray(w, np.float64), checked(np.asarray(h, np.float64))
    t, scale = compensated(w, factor(h) if u is None else u, granularity)
    best = refit(w, h, t, scale)
    t0, m = ternarize(w)
    plain = np.broadcast_to(np.float32(m), best[1].shape)
    for other in (fit(w, granularity), (t0, plain)):
        best = _better(w, h, best, other)
    return best


def checked(h: np.ndarray) -> np.ndarray:
    """h, unless inputs were not finite: FormatError."""
    if not np.isfinite(h).all():
        raise FormatError("[gptq] the calibration inputs are not finite; the model or the text is damaged")
    return h


def objective(w: np.ndarray, h: np.ndarray, fitted: Fitted) -> np.ndarray:
    """e h e^T of each row e of w - t * scale: float64 [N]."""
    t, scale = fitted
    e = w - t * spread(scale, w.shape)
    return np.einsum("nk,nk->n", matmul(e, h), e)


def compensated(w: np.ndarray, u: np.ndarray, granularity: str) -> Fitted:
    """The rounding alone, in blocks of 128 columns: the columns beyond a block see its errors all at once. u: factor(h)."""
    n, k = w.shape
    w = w.copy()
    fixed = None if granularity == "group" else scales_of(grouped(w, granularity))[:, 0].astype(np.float64)
    t, scales = np.empty((n, k), np.int8), []
    for start in range(0, k, GROUP):
        stop = min(start + GROUP, k)
        block, errors = w[:, start:stop], np.empty((n, stop - start))
        s = scales_of(block).astype(np.float64) if fixed is None else np.broadcast_to(fixed, (n,))
        for i in range(stop - start):
            column = start + i
            t[:, column] = codes(block[:, i], s)
            errors[:, i] = (block[:, i] - t[:, column] * s) / u[column, column]
            block[:, i + 1 :] -= errors[:, i : i + 1] * u[column, column + 1 : stop]
        w[:, stop:] -= matmul(errors, u[start:stop, stop:])
        scales.append(s)
    scale = np.stack(scales, axis=1) if fixed is None else fixed.reshape(()) if granularity == "tensor" else fixed
    return t, scale.astype(np.float32)


def refit(w: np.ndarray, h: np.ndarray, t: np.ndarray, scale: np.ndarray) -> Fitted:
    """The same codes with the scales that make the objective least, all of a row together; rows whose system has no
    positive solution keep theirs."""
    n, k = w.shape
    if scale.ndim == 0:
        th = matmul(t.astype(np.float64), h)
        power = float((th * t).sum())
        s = float((th * w).sum()) / power if power else 0.0
        return t, np.asarray(s if s > 0 else scale, np.float32)
    width = GROUP if scale.ndim == 2 else k
    starts = np.arange(0, k, width)
    old = scale.reshape(n, -1)
    new = old.copy()
    for at in range(0, n, _ROWS):
        rows = slice(at, min(at + _ROWS, n))
        part, wh = t[rows].astype(np.float64), matmul(w[rows], h)
        b = np.add.reduceat(part * wh, starts, axis=1)
        a = np.empty((len(part), len(starts), len(starts)))
        for g, start in enumerate(starts):
            columns = slice(start, min(start + width, k))
            a[:, g] = np.add.reduceat(matmul(part[:, columns], h[columns]) * part, starts, axis=1)
        empty = np.abs(a).sum(axis=2) == 0  # groups of zeros, or of inputs that are always 0
        a[:, np.arange(len(starts)), np.arange(len(starts))] += empty
        b = np.where(empty, old[rows], b)
        try:
            found = np.linalg.solve(a, b[..., None])[..., 0]
        except np.linalg.LinAlgError:
            continue  # inputs so alike that two groups cannot be told apart: the scales stay
        good = np.isfinite(found).all(axis=1) & (found > 0).all(axis=1)
        new[rows][good] = found[good]
    return t, new.reshape(scale.shape).astype(np.float32)


def _better(w: np.ndarray, h: np.ndarray, a: Fitted, b: Fitted) -> Fitted:
    """Row by row, or as a whole where there is one scale, the one of the lower objective."""
    costs = objective(w, h, a), objective(w, h, b)
    if a[1].ndim == 0:
        return a if costs[0].sum() <= costs[1].sum() else b
    take = costs[1] < costs[0]
    t, scale = a[0].copy(), a[1].copy()
    t[take], scale[take] = b[0][take], b[1][take]
    return t, scale


def factor(h: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """U, float64 [K, K], of H^-1 = U^T U, with the diagonal raised; inputs that are always 0 count 1."""
    h = h.copy()
    diagonal = np.einsum("ii->i", h)
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return np.linalg.cholesky(np.linalg.inv(h)).T
