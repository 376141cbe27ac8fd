"""Triton kernels of the proxies' step on a GPU, around matrix products by cuBLAS.

One pass over memory each. A program handles a few rows of proxies, one image, or a few columns of the logits. Numbers
that change from step to step are read from device memory (`SAMPLING_*` and `UPDATE_*`), so that neither the kernels nor
a recorded CUDA graph depend on them.

Letters: s sampled class, b image, d dimension; B, S, D their numbers; PER_CLASS proxies of a class come one after the
other. In kernels that gather and update proxies, s counts proxies, and r is the row of one. `first` is the first
sampled class of a chunk, `padded` is its number of proxies rounded up, so that tensor cores can be used. `scale` is
1 / temperature, `most` the highest logit of a class that is not left out.
"""

import os

import triton.language as tl
from torch import Tensor
from triton import cdiv, jit, next_power_of_2

from nsl_dist.proxies import counter_random, softmax
from nsl_dist.proxies.optimizer import RowwiseAdagrad
from nsl_dist.proxies.sampling import NUM_ROUNDS

# Products and sums may be fused. That is the default, but Triton 3.9 warns that another release will change it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Words of the tensor `sampling`: the keys first; after these, the columns of the B images, the rows of the positives.
NUM_KEYS = tl.constexpr(NUM_ROUNDS)
SAMPLING_POSITIVES = tl.constexpr(NUM_ROUNDS)
SAMPLING_OTHERS = tl.constexpr(NUM_ROUNDS + 1)
SAMPLING_MULTIPLICITY = tl.constexpr(NUM_ROUNDS + 2)  # the bits of a float64
SAMPLING_WORDS = tl.constexpr(NUM_ROUNDS + 3)

# Words of the tensor `update`; all but the first three are bits of a float64.
UPDATE_STEP = tl.constexpr(0)
UPDATE_WEIGHT_KEY = tl.constexpr(1)
UPDATE_STATE_KEY = tl.constexpr(2)
UPDATE_LR = tl.constexpr(3)
UPDATE_MOMENTUM = tl.constexpr(4)
UPDATE_DECAY = tl.constexpr(5)
UPDATE_WORDS = tl.constexpr(6)

# What kernels use must be of this type.
NORMALISER, TARGET, TOTAL = map(tl.constexpr, (softmax.NORMALISER, softmax.TARGET, softmax.TOTAL))
CLASSES, BEST = map(tl.constexpr, (softmax.CLASSES, softmax.BEST))
GAMMA = tl.constexpr(counter_random.GAMMA)
FACTOR_1, FACTOR_2 = map(tl.constexpr, counter_random.FACTORS)
EPSILON = tl.constexpr(RowwiseAdagrad.EPSILON)
LEAST_SQUARED_SINE = tl.constexpr(softmax.LEAST_SQUARED_SINE)


@jit
def _float_at(words, index):
    return tl.load(words + index).to(tl.float64, bitcast=True)


@jit
def _mix(state):
    """`counter_random._mix`."""
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * FACTOR_1
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * FACTOR_2
    return state ^ ((state >> 31) & ((1 << 33) - 1))


@jit
def _scramble(numbers):
    """`sampling._scramble`."""
    numbers = (numbers ^ (numbers >> 16)) * 0x85EBCA6B
    numbers = (numbers ^ (numbers >> 13)) * 0xC2B2AE35
    return numbers ^ (numbers >> 16)


@jit
def _permute(values, sampling, BITS: tl.constexpr):
    """`sampling._permute`."""
    left = (values >> (BITS - BITS // 2)).to(tl.uint32)
    right = (values & ((1 << (BITS - BITS // 2)) - 1)).to(tl.uint32)
    for number in tl.static_range(0, NUM_KEYS, 2):  # the widths of the halves change places in each round
        mixed = _scramble(right + tl.load(sampling + number).to(tl.uint32))
        left, right = right, left ^ (mixed & ((1 << (BITS // 2)) - 1))
        mixed = _scramble(right + tl.load(sampling + number + 1).to(tl.uint32))
        left, right = right, left ^ (mixed & ((1 << (BITS - BITS // 2)) - 1))
    return (left.to(tl.int64) << (BITS - BITS // 2)) | right.to(tl.int64)


@jit
def sample_kernel(
    sampling, rows, B, S, PER_CLASS: tl.constexpr, BITS: tl.constexpr, SEARCH: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the rows of a `Draw` that does not sample everything, the positives first. SEARCH: bits of B."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_positives = tl.load(sampling + SAMPLING_POSITIVES).to(tl.int32)
    num_others = tl.load(sampling + SAMPLING_OTHERS)
    positives = sampling + SAMPLING_WORDS + B
    is_positive = s < num_positives
    is_other = (s >= num_positives) & (s < S)
    drawn = tl.where(is_other, s - num_positives, 0).to(tl.int64)
    drawn = _permute(drawn, sampling, BITS)
    while tl.sum(((drawn >= num_others) & is_other).to(tl.int32)) > 0:
        drawn = tl.where((drawn >= num_others) & is_other, _permute(drawn, sampling, BITS), drawn)
    # The i-th row that is not a positive is i plus the number of positives before it.
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_positives
    for _ in tl.static_range(SEARCH):
        middle = (low + high) // 2
        more = low < high
        before = tl.load(positives + middle, mask=more, other=0) - middle <= drawn
        low, high = tl.where(more & before, middle + 1, low), tl.where(more & (before == 0), middle, high)
    drawn = tl.where(is_other, drawn + low, tl.load(positives + s, mask=is_positive, other=0))
    for k in tl.static_range(PER_CLASS):
        tl.store(rows + s * PER_CLASS + k, drawn * PER_CLASS + k, mask=s < S)


@jit
def copy_rows_kernel(table, rows, values, S, D, TO_TABLE: tl.constexpr, DP: tl.constexpr, RB: tl.constexpr):
    """Copy rows of a table to `values`, or back."""
    s = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    d = tl.arange(0, DP)
    mask = (s < S)[:, None] & (d < D)[None, :]
    in_table = table + tl.load(rows + s, mask=s < S, other=0)[:, None] * D + d[None, :]
    in_values = values + s[:, None] * D + d[None, :]
    if TO_TABLE:
        tl.store(in_table, tl.load(in_values, mask=mask), mask=mask)
    else:
        tl.store(in_values, tl.load(in_table, mask=mask), mask=mask)


@jit
def normalise_kernel(embeddings, queries, lengths, D, DP: tl.constexpr):
    """Divide embeddings by their lengths."""
    b = tl.program_id(0)
    d = tl.arange(0, DP)
    values = tl.load(embeddings + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(values * values)), 1e-12)
    tl.store(queries + b * D + d, (values / length).to(queries.dtype.element_ty), mask=d < D)
    tl.store(lengths + b, length)


@jit
def normalise_backward_kernel(grad_queries, embeddings, lengths, grad, scale, D, DP: tl.constexpr):
    """Turn `scale` times the gradient of the queries into that of the embeddings."""
    b = tl.program_id(0)
    d = tl.arange(0, DP)
    length = tl.load(lengths + b)
    query = tl.load(embeddings + b * D + d, mask=d < D, other=0.0).to(tl.float32) / length
    grad_query = tl.load(grad_queries + b * D + d, mask=d < D, other=0.0) * scale
    tl.store(grad + b * D + d, (grad_query - tl.sum(grad_query * query) * query) / length, mask=d < D)


@jit
def _maps_of(steps, within, after, num_steps, num_blocks, r, ok, PER_BLOCK: tl.constexpr):
    """Return the 2x2 map of the updates that rows have missed: `optimizer.MapProducts.since`."""
    step = tl.load(steps + r, mask=ok, other=0)
    block = step // PER_BLOCK
    w00 = tl.load(within + step, mask=ok, other=1.0)
    w01 = tl.load(within + num_steps + step, mask=ok, other=0.0)
    w10 = tl.load(within + 2 * num_steps + step, mask=ok, other=0.0)
    w11 = tl.load(within + 3 * num_steps + step, mask=ok, other=1.0)
    a00 = tl.load(after + block, mask=ok, other=1.0)
    a01 = tl.load(after + num_blocks + block, mask=ok, other=0.0)
    a10 = tl.load(after + 2 * num_blocks + block, mask=ok, other=0.0)
    a11 = tl.load(after + 3 * num_blocks + block, mask=ok, other=1.0)
    return (
        (a00 * w00 + a01 * w10).to(tl.float32)[:, None],
        (a00 * w01 + a01 * w11).to(tl.float32)[:, None],
        (a10 * w00 + a11 * w10).to(tl.float32)[:, None],
        (a10 * w01 + a11 * w11).to(tl.float32)[:, None],
    )


@jit
def _read_sgd(
    weight, velocity, steps, within, after, num_steps, num_blocks, r, at, ok, mask,
    CATCH_UP: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """`DeferredSGD.read`."""
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(velocity + at, mask=mask, other=0.0).to(tl.float32)
    if CATCH_UP:
        m00, m01, m10, m11 = _maps_of(steps, within, after, num_steps, num_blocks, r, ok, PER_BLOCK)
        w, v = m00 * w + m01 * v, m10 * w + m11 * v
    return w, v


@jit
def gather_kernel(
    weight, velocity, rows, steps, within, after, num_steps, num_blocks, unit, lengths, S, padded, D,
    CATCH_UP: tl.constexpr, PER_BLOCK: tl.constexpr, STAGED: tl.constexpr, DP: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """Write proxies divided by their lengths, and the lengths; zeros for s from S to `padded`.

    STAGED: the s-th class is at s of weight and velocity, not at its row.
    """
    s = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    ok = s < S
    r = tl.load(rows + s, mask=ok, other=0)
    d = tl.arange(0, DP)
    mask = ok[:, None] & (d < D)[None, :]
    at = (s if STAGED else r)[:, None] * D + d[None, :]
    if CATCH_UP:
        w, _ = _read_sgd(
            weight, velocity, steps, within, after, num_steps, num_blocks, r, at, ok, mask, CATCH_UP, PER_BLOCK
        )
    else:
        w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(w * w, axis=1)), 1e-12)
    tl.store(lengths + s, length, mask=ok)
    mask = (s < padded)[:, None] & (d < D)[None, :]
    tl.store(unit + s[:, None] * D + d[None, :], (w / length[:, None]).to(unit.dtype.element_ty), mask=mask)


@jit
def _cosine_and_sine(logits, scale):
    cosines = logits / scale
    return cosines, tl.sqrt(tl.maximum(1 - cosines * cosines, LEAST_SQUARED_SINE))


@jit
def _with_margin(logits, scale, margin, ANGULAR: tl.constexpr):
    """`softmax.with_margin`."""
    if ANGULAR:
        cosines, sines = _cosine_and_sine(logits, scale)
        turned = cosines * tl.cos(margin) - sines * tl.sin(margin)
        return tl.where(cosines > -tl.cos(margin), turned, cosines - margin * tl.sin(margin)) * scale
    return logits - margin * scale


@jit
def _slope_of_angular_margin(logits, scale, margin):
    """`softmax.slope_of_angular_margin`."""
    cosines, sines = _cosine_and_sine(logits, scale)
    return tl.where(cosines > -tl.cos(margin), tl.cos(margin) + cosines / sines * tl.sin(margin), 1.0)


@jit
def _nearest(line, s, ok, PER_CLASS: tl.constexpr):
    """Return the cosine of the nearest proxy of each class."""
    nearest = tl.load(line + s * PER_CLASS, mask=ok, other=0.0)
    for k in tl.static_range(1, PER_CLASS):
        nearest = tl.maximum(nearest, tl.load(line + s * PER_CLASS + k, mask=ok, other=0.0))
    return nearest


@jit(do_not_specialize=["first", "S"])
def sums_kernel(
    cosines, padded, sums, sampling, first, S, scale, shift, margin, most,
    PER_CLASS: tl.constexpr, ANGULAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add a chunk to the `sums` of each image: one program for an image, so that the order is always the same."""
    b = tl.program_id(0)
    B = tl.num_programs(0)
    positives = tl.load(sampling + SAMPLING_POSITIVES) - first
    multiplicity = _float_at(sampling, SAMPLING_MULTIPLICITY).to(tl.float32)
    terms = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    classes = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    line = cosines + b.to(tl.int64) * padded
    column = tl.load(sampling + SAMPLING_WORDS + b) - first
    target = _nearest(line, column, (column >= 0) & (column < S), PER_CLASS) * scale
    for start in range(0, S, BLOCK):
        s = start + tl.arange(0, BLOCK)
        ok = s < S
        logits = _nearest(line, s, ok, PER_CLASS) * scale
        best = tl.maximum(best, tl.where(ok, logits, float("-inf")))
        is_target = s == column
        count = tl.where(s < positives, 1.0, multiplicity)
        count = tl.where(ok & (is_target | (logits <= most)), count, 0.0)
        logits = tl.where(is_target, _with_margin(logits, scale, margin, ANGULAR), logits)
        terms += tl.exp(logits - shift) * count
        total += logits * count
        classes += count
    later = first > 0
    out = sums + b
    tl.store(out + NORMALISER * B, tl.sum(terms) + tl.load(out + NORMALISER * B, mask=later, other=0.0))
    tl.store(out + TARGET * B, target + tl.load(out + TARGET * B, mask=later, other=0.0))
    tl.store(out + TOTAL * B, tl.sum(total) + tl.load(out + TOTAL * B, mask=later, other=0.0))
    tl.store(out + CLASSES * B, tl.sum(classes) + tl.load(out + CLASSES * B, mask=later, other=0.0))
    most = tl.max(best)
    tl.store(out + BEST * B, tl.maximum(most, tl.load(out + BEST * B, mask=later, other=float("-inf"))))


@jit
def loss_kernel(queries, sums, results, shift, smoothing, scale, margin, D, ANGULAR: tl.constexpr, DP: tl.constexpr):
    """Write each image's loss, whether its class is the nearest, and whether embedding and normaliser are valid."""
    b = tl.program_id(0)
    B = tl.num_programs(0)
    d = tl.arange(0, DP)
    query_sum = tl.sum(tl.load(queries + b * D + d, mask=d < D, other=0.0).to(tl.float32))
    normaliser = tl.load(sums + NORMALISER * B + b)
    target = tl.load(sums + TARGET * B + b)
    mean = tl.load(sums + TOTAL * B + b) / tl.load(sums + CLASSES * B + b)
    wanted = _with_margin(target, scale, margin, ANGULAR)
    wanted = tl.where(smoothing > 0, (1 - smoothing) * wanted + smoothing * mean, wanted)
    out = results + b
    tl.store(out, tl.log(normaliser) + shift - wanted)
    tl.store(out + B, (target >= tl.load(sums + BEST * B + b)).to(tl.float32))
    tl.store(out + 2 * B, ((query_sum - query_sum) == 0).to(tl.float32))
    tl.store(out + 3 * B, (((normaliser - normaliser) == 0) & (normaliser > 0)).to(tl.float32))


@jit(do_not_specialize=["first", "S"])
def grad_logits_kernel(
    cosines, grad, padded, sums, sampling, grad_loss, along, first, S, B, scale, shift, smoothing, margin, most,
    PER_CLASS: tl.constexpr, ANGULAR: tl.constexpr, BS: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits of proxies, and for each the sum of logits times gradients.

    Zeros from the last proxy to `padded`. `grad` may be `cosines` if classes have one proxy each.
    """
    r = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    s = r // PER_CLASS
    ok = s < S
    positives = tl.load(sampling + SAMPLING_POSITIVES) - first
    count = tl.where(s < positives, 1.0, _float_at(sampling, SAMPLING_MULTIPLICITY).to(tl.float32))[None, :]
    grad_image = tl.load(grad_loss) / B
    total = tl.zeros([BS], tl.float32)
    for start in range(0, B, BB):
        b = start + tl.arange(0, BB)
        ok_b = b < B
        at = b[:, None].to(tl.int64) * padded + r[None, :]
        mask = ok_b[:, None] & ok[None, :]
        mask_out = ok_b[:, None] & (r < padded)[None, :]
        logits = tl.load(cosines + at, mask=mask, other=0.0) * scale
        of_terms = grad_image / tl.load(sums + NORMALISER * B + b, mask=ok_b, other=1.0)
        share = grad_image * smoothing / tl.load(sums + CLASSES * B + b, mask=ok_b, other=1.0)
        column = tl.load(sampling + SAMPLING_WORDS + b, mask=ok_b, other=-1) - first
        is_target = column[:, None] == s[None, :]
        counts = tl.where(is_target | (logits <= most), count, 0.0)
        inside = tl.where(is_target, _with_margin(logits, scale, margin, ANGULAR), logits)
        value = (tl.exp(inside - shift) * of_terms[:, None] - share[:, None]) * counts
        value = tl.where(is_target, value - (1 - smoothing) * grad_image, value)
        if ANGULAR:
            value = tl.where(is_target, value * _slope_of_angular_margin(logits, scale, margin), value)
        for k in tl.static_range(PER_CLASS):
            if PER_CLASS > 1:  # only the nearest proxy of a class counts, and of equally near ones the first
                sibling = b[:, None].to(tl.int64) * padded + (s * PER_CLASS + k)[None, :]
                other = tl.load(cosines + sibling, mask=mask, other=0.0) * scale
                nearer = (other > logits) | ((other == logits) & (k < r % PER_CLASS)[None, :])
                value = tl.where(nearer, 0.0, value)
        value = tl.where(mask, value, 0.0)
        total += tl.sum(value * logits, axis=0)
        tl.store(grad + at, value.to(grad.dtype.element_ty), mask=mask_out)
    tl.store(along + r, total, mask=ok)


@jit
def _rounded(values, keys, DP: tl.constexpr, RB: tl.constexpr):
    """Round to bfloat16 with the bits of `counter_random.round_to_bfloat16`."""
    words = _mix(keys[:, None] + (tl.arange(0, DP // 4) + 1).to(tl.int64)[None, :] * GAMMA)
    lanes = tl.arange(0, 4).to(tl.int64) * 16
    noise = tl.reshape((words[:, :, None] >> lanes[None, None, :]) & 0xFFFF, [RB, DP]).to(tl.int32)
    bits = (values.to(tl.int32, bitcast=True) + noise) & -65536
    finite = (values - values) == 0.0
    return tl.where(finite, bits.to(tl.float32, bitcast=True), values).to(tl.bfloat16)


@jit
def _write(table, at, values, mask, r, first_row, key, DP: tl.constexpr, RB: tl.constexpr):
    """`Table.write`."""
    if table.dtype.element_ty == tl.bfloat16:
        tl.store(table + at, _rounded(values, _mix((r + first_row) * GAMMA + key), DP, RB), mask=mask)
    else:
        tl.store(table + at, values, mask=mask)


@jit
def _grad_of(w, grad, along, lengths, s, at_s, ok, mask, scale, decay):
    """Return the gradient of proxies. The loss does not depend on their lengths: none of it is along them."""
    length = tl.load(lengths + s, mask=ok, other=1.0)
    shrink = decay - tl.load(along + s, mask=ok, other=0.0) / (length * length)
    return tl.load(grad + at_s, mask=mask, other=0.0) * (scale / length)[:, None] + w * shrink[:, None]


@jit
def update_sgd_kernel(
    weight, velocity, rows, steps, within, after, num_steps, num_blocks, grad, along, lengths, update, first_row, S,
    D, scale,
    CATCH_UP: tl.constexpr, PER_BLOCK: tl.constexpr, STAGED: tl.constexpr, DP: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """`DeferredSGD.update`, given the product of the gradient of the logits and the queries."""
    s = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    ok = s < S
    r = tl.load(rows + s, mask=ok, other=0)
    d = tl.arange(0, DP)
    mask = ok[:, None] & (d < D)[None, :]
    at_s = s[:, None] * D + d[None, :]
    at = at_s if STAGED else r[:, None] * D + d[None, :]
    w, v = _read_sgd(
        weight, velocity, steps, within, after, num_steps, num_blocks, r, at, ok, mask, CATCH_UP, PER_BLOCK
    )
    decay = _float_at(update, UPDATE_DECAY).to(tl.float32)
    v = _float_at(update, UPDATE_MOMENTUM).to(tl.float32) * v + _grad_of(
        w, grad, along, lengths, s, at_s, ok, mask, scale, decay
    )
    w -= _float_at(update, UPDATE_LR).to(tl.float32) * v
    _write(weight, at, w, mask, r, first_row, tl.load(update + UPDATE_WEIGHT_KEY), DP, RB)
    _write(velocity, at, v, mask, r, first_row, tl.load(update + UPDATE_STATE_KEY), DP, RB)
    step = tl.load(update + UPDATE_STEP).to(tl.int32)
    tl.store(steps + r, tl.zeros([RB], tl.int32) + step, mask=ok)


@jit
def update_adagrad_kernel(
    weight, accumulator, rows, grad, along, lengths, update, first_row, S, D, scale,
    STAGED: tl.constexpr, DP: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """`RowwiseAdagrad.update`, given the product of the gradient of the logits and the queries."""
    s = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    ok = s < S
    r = tl.load(rows + s, mask=ok, other=0)
    d = tl.arange(0, DP)
    mask = ok[:, None] & (d < D)[None, :]
    at_s = s[:, None] * D + d[None, :]
    at = at_s if STAGED else r[:, None] * D + d[None, :]
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    decay = _float_at(update, UPDATE_DECAY).to(tl.float32)
    grad_w = _grad_of(w, grad, along, lengths, s, at_s, ok, mask, scale, decay)
    sum_of_squares = tl.load(accumulator + r, mask=ok, other=0.0) + tl.sum(grad_w * grad_w, axis=1) / D
    tl.store(accumulator + r, sum_of_squares, mask=ok)
    lr = _float_at(update, UPDATE_LR).to(tl.float32)
    w -= lr * grad_w / (tl.sqrt(sum_of_squares) + EPSILON)[:, None]
    _write(weight, at, w, mask, r, first_row, tl.load(update + UPDATE_WEIGHT_KEY), DP, RB)


@jit
def append_map_kernel(within, after, num_steps, num_blocks, update, PER_BLOCK: tl.constexpr):
    """`MapProducts.append` the map of the step that ends. Program 0: within its block; others: of earlier blocks."""
    lr = _float_at(update, UPDATE_LR)
    momentum = _float_at(update, UPDATE_MOMENTUM)
    decay = _float_at(update, UPDATE_DECAY)
    last = tl.load(update + UPDATE_STEP) - 1
    block = last // PER_BLOCK
    part = tl.program_id(0)
    i = tl.arange(0, PER_BLOCK)
    if part == 0:
        step = block * PER_BLOCK + i
        _multiply(within, num_steps, step, step <= last, lr, momentum, decay)
    else:
        earlier = (part - 1) * PER_BLOCK + i
        _multiply(after, num_blocks, earlier, earlier < block, lr, momentum, decay)


@jit
def _multiply(products, stride, i, ok, lr, momentum, decay):
    """Multiply the map of a step to products `[2, 2, stride]` from the left."""
    p00 = tl.load(products + i, mask=ok)
    p01 = tl.load(products + stride + i, mask=ok)
    p10 = tl.load(products + 2 * stride + i, mask=ok)
    p11 = tl.load(products + 3 * stride + i, mask=ok)
    tl.store(products + i, (1 - lr * decay) * p00 - lr * momentum * p10, mask=ok)
    tl.store(products + stride + i, (1 - lr * decay) * p01 - lr * momentum * p11, mask=ok)
    tl.store(products + 2 * stride + i, decay * p00 + momentum * p10, mask=ok)
    tl.store(products + 3 * stride + i, decay * p01 + momentum * p11, mask=ok)


def rows_at_once(dim: int) -> dict[str, int]:
    """Return what a program handles: dimensions, rounded up to a power of two, and rows; and its warps."""
    padded = max(4, next_power_of_2(dim))
    return {"DP": padded, "RB": max(1, 512 // padded), "num_warps": min(max(1, padded // 512), 8)}


def copy_rows(table_CD: Tensor, rows_S: Tensor, values_SD: Tensor, *, to_table: bool) -> None:
    """Copy rows of a table to `values_SD`, or back; the table may be pinned host memory."""
    size = rows_at_once(table_CD.shape[1])
    grid = (cdiv(len(rows_S), size["RB"]),)
    copy_rows_kernel[grid](table_CD, rows_S, values_SD, len(rows_S), table_CD.shape[1], TO_TABLE=to_table, **size)
