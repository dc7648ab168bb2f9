"""llama-tq's Viterbi search as its C code walks it: slow, and obviously so. For comparison only."""

import numba
import numpy as np

FLT_MAX = np.float32(np.finfo(np.float32).max)


@numba.njit(nogil=True, error_model="numpy")
def best_walk(u, code, bits, states):
    """Set states (129,) to the best walk: relax every edge of every step, strict less wins."""
    n, groups = 1 << 16, 1 << (16 - bits)
    cost = np.zeros(n, np.float32)
    following = np.empty(n, np.float32)
    came_from = np.zeros((u.size, n), np.uint16)
    for i in range(u.size):
        following[:] = FLT_MAX
        for s in range(n):
            for e in range(1 << bits):
                to = (s >> bits) | (e << (16 - bits))
                error = np.float32(u[i] - code[to])
                reached = np.float32(cost[s] + np.float32(error * error))
                if reached < following[to]:
                    following[to] = reached
                    came_from[i, to] = s
        cost, following = following, cost
        for to in range(n):
            if cost[to] == FLT_MAX:
                came_from[i, to] = (to % groups) << bits
    best, state = FLT_MAX, 0
    for low in range(groups):
        for top in range(1 << bits):
            s = top * groups + low
            if cost[s] < best:
                best, state = cost[s], s
    states[u.size] = state
    for i in range(u.size - 1, -1, -1):
        states[i] = came_from[i, states[i + 1]]
