"""Random numbers as a pure function of (seed, stream, row, column).

Any worker can draw any row on any device and gets the same bits. The generator is SplitMix64 (Steele, Lea & Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) with one stream per row.
"""

import torch
from torch import Tensor

# PyTorch's 64-bit integers are signed but wrap like unsigned ones.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27)


def _mix(state: Tensor) -> Tensor:
    """Scramble 64-bit integers in place: the output function of SplitMix64."""
    for shift, factor in zip(SHIFTS, FACTORS, strict=True):
        state ^= (state >> shift) & (2 ** (64 - shift) - 1)
        state *= factor
    state ^= (state >> 31) & (2**33 - 1)
    return state


def _mix_integer(state: int) -> int:
    """Scramble an unsigned 64-bit integer in the same way."""
    state &= 2**64 - 1
    for shift, factor in zip(SHIFTS, FACTORS, strict=True):
        state = (state ^ (state >> shift)) * factor & 2**64 - 1
    return state ^ (state >> 31)


def random_integers(size: int, *counters: int) -> list[int]:
    """Return 32-bit integers that depend on all counters."""
    state = 0
    for counter in counters:
        state = _mix_integer(state + counter + GAMMA)
    return [_mix_integer(state + number * GAMMA) >> 32 for number in range(1, size + 1)]


def stream_key(seed: int, stream: int) -> int:
    """Return the key of a stream, which is mixed with the row, as a signed 64-bit integer."""
    key = _mix_integer(_mix_integer(seed) + stream * (GAMMA & 0xFFFFFFFF))
    return key - (key >> 63 << 64)


def random_bits(rows_S: Tensor, num_words: int, *, seed: int, stream: int) -> Tensor:
    """Return random 64-bit words, int64 `[S, num_words]`, for rows given as int64 `[S]`."""
    keys_S = _mix(rows_S * GAMMA + stream_key(seed, stream))
    return _mix(keys_S[:, None] + torch.arange(1, num_words + 1, device=rows_S.device) * GAMMA)


def uniform_rows(rows_S: Tensor, dim: int, *, bound: float, seed: int) -> Tensor:
    """Return float32 `[S, dim]` from U(-bound, bound), stream 0, for rows given as int64 `[S]`."""
    words = random_bits(rows_S, -(-dim // 2), seed=seed, stream=0)
    integers_SD = words.view(torch.int32)[:, :dim] >> 8  # 24 bits, as many as float32 holds
    return integers_SD.float().add_(0.5).mul_(bound / 2**23)


def round_to_bfloat16(values_SD: Tensor, rows_S: Tensor, *, seed: int, stream: int) -> Tensor:
    """Round float32 `[S, D]` stochastically to bfloat16, so that the expected result is the value itself.

    With rounding to nearest, every update smaller than half of the last of bfloat16's 8 bits would be lost. With
    stochastic rounding, a row that was rounded n times is off by a random walk of at most 2^-8 sqrt(n) of its length.
    """
    dim = values_SD.shape[1]
    noise_SD = random_bits(rows_S, -(-dim // 4), seed=seed, stream=stream).view(torch.int16)[:, :dim]
    bits_SD = values_SD.contiguous().view(torch.int32) + (noise_SD.int() & 0xFFFF)
    rounded_SD = (bits_SD & -0x10000).view(torch.float32)
    return torch.where(values_SD.isfinite(), rounded_SD, values_SD).bfloat16()  # noise would turn NaN into a number
