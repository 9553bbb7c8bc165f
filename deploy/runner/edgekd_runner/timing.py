"""The timing loop: one call after another, calls at a fixed rate, calls at once, and the warm-up before them.

The inputs of a loop are `calls`: pairs of functions, one that prepares a call and is not timed, and the call itself.
"""

import gc
import time

WARMUP_BLOCK = 20  # calls; medians of blocks are compared
STEADY = 1.02  # three consecutive medians this close together end a warm-up
WARMUP_CAP = 5  # a warm-up gives up after this many times its minimum
DISCARDED = 3  # calls after each switch of models: caches, branch predictors
SETTLE_S, SETTLES = 0.01, 50  # worker threads spin on after a call: 20 to 50 ms were seen in ONNX Runtime 1.31
IDLE_S = 0.002  # before a call is due, sleeping becomes spinning: a sleep ends some tens of microseconds late
PROBES = 1000  # calls of nothing that show what the loop itself takes

if hasattr(time, "perf_counter_ns"):
    now_ns = time.perf_counter_ns
else:  # Python 3.6

    def now_ns():
        return int(time.perf_counter() * 1e9)


def no_op():
    pass


def time_calls(calls, first, count):
    """Return the nanoseconds of `count` calls, from number `first` on. What prepares each is not timed."""
    times = [0] * count
    for i in range(count):
        prepare, call = calls[(first + i) % len(calls)]
        prepare()
        start = now_ns()
        call()
        times[i] = now_ns() - start
    return times


def time_at_rate(calls, first, count, rate):
    """Return (nanoseconds from when a call was due to its end, nanoseconds that it began late) of `count` calls.

    They are due at a fixed rate, in calls a second; one is late because the call before it was not over.
    """
    rows, step, origin = [], 1e9 / rate, now_ns() + int(IDLE_S * 1e9)
    for i in range(count):
        (prepare, call), due = calls[(first + i) % len(calls)], origin + int(i * step)
        start = now_ns()
        prepare()
        late = max(start - due, 0) if i else 0
        if due - start > 2e9 * IDLE_S:
            time.sleep((due - start) / 1e9 - IDLE_S)
        while now_ns() < due:
            pass
        call()
        rows.append((now_ns() - due, late))
    return rows


def time_block(calls, first, count, rate=None):
    """Time the calls of a block, after some that do not count, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        time_calls(calls, first - DISCARDED, DISCARDED)
        return time_at_rate(calls, first, count, rate) if rate else time_calls(calls, first, count)
    finally:
        gc.enable()


def time_burst(session, inputs, count):
    """Return the nanoseconds that `count` calls take together, with several of them under way at once."""
    gc.collect()
    gc.disable()
    try:
        session.run_many(inputs, DISCARDED)
        start = now_ns()
        session.run_many(inputs, count)
        return now_ns() - start
    finally:
        gc.enable()


def loop_overhead_ns():
    """Return what the loop itself adds to a call: the median time of calls of nothing."""
    return sorted(time_block([(no_op, no_op)], 0, PROBES))[PROBES // 2]


def settle():
    """Wait until the worker threads of the previous model sleep: while they spin they hold a core."""
    for _ in range(SETTLES):
        before = time.process_time()
        time.sleep(SETTLE_S)
        if time.process_time() - before < SETTLE_S / 10:
            return


def warm_up(calls, protocol):
    """Call until enough calls and seconds are over and three medians agree, or until the cap; return what it took."""
    started, count, medians = now_ns(), 0, []
    while True:
        times = time_calls(calls, count, WARMUP_BLOCK)
        count += WARMUP_BLOCK
        medians = medians[-2:] + [sorted(times)[WARMUP_BLOCK // 2]]
        seconds = (now_ns() - started) / 1e9
        steady = len(medians) == 3 and max(medians) <= STEADY * min(medians)
        enough = count >= protocol["warmup_calls"] and seconds >= protocol["warmup_s"]
        if enough and (steady or seconds >= WARMUP_CAP * protocol["warmup_s"]):
            return {
                "calls": count,
                "seconds": seconds,
                "steady": steady,
                "median_ns": sorted(medians)[len(medians) // 2],
            }
