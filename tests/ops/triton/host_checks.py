"""Launches as made by the host, with Triton's own compiler and a driver that records: no GPU is needed.

Run by test_host.py in a separate process, since Triton cannot compile where it interprets: prints check -> failure.
"""

import json
import os
import tempfile
import traceback
import warnings
from unittest.mock import patch

import torch
import triton
from triton.runtime.jit import JITFunction

from bench import host
from smile_kernels.ops import excluded
from smile_kernels.ops.triton import backend, configs, decode, launch
from smile_kernels.testing import Problem, taking

DRIVER = host.record()
PATHS = [("decode", "fused"), ("decode_one_launch", "fused"), ("one_product", "fused"), ("route_first", "grouped")]


def problem(tokens: int = 5, **options) -> Problem:
    return Problem.random(tokens, 64, 64, 8, 16, 16, 2, **{"dtype": torch.bfloat16, **options})


def calls(p: Problem, linear: str, apply: str, count: int = 1) -> list[host.Launched]:
    """The launches of `count` calls."""
    DRIVER.launched.clear()
    with taking(linear, apply):
        for _ in range(count):
            backend.linear(*p.arguments(), 2, 16, False)
    return list(DRIVER.launched)


def a_kernel_is_compiled_once_for_all_calls():
    """The counters of `decode`: both parities of their rows, from the eager part and from the captured one."""
    p = problem()
    DRIVER.loaded.clear()
    known, launch._known = launch._known, lambda: False
    capturing = decode._capturing
    try:
        calls(p, "decode", "fused", 3)
        decode._capturing = lambda _: True
        calls(p, "decode", "fused", 3)
    finally:
        launch._known, decode._capturing = known, capturing
    assert len(DRIVER.loaded) == 2, DRIVER.loaded


def kept_launches_are_those_of_triton():
    assert launch._known(), f"Triton {triton.__version__} starts kernels in another way"
    for linear, apply in PATHS:
        for p in (problem(), problem(bias=False, expert_bias=False), problem(33, dtype=torch.float32)):
            if p.x.dtype == torch.float32 and linear.startswith("decode"):
                continue
            inputs = {t.data_ptr() for t in p.tensors().values()}
            calls(p, linear, apply)
            kept = calls(p, linear, apply)
            known, launch._known = launch._known, lambda: False
            ordinary = calls(p, linear, apply)
            launch._known = known
            assert len(kept) == len(ordinary) > 0
            for a, b in zip(kept, ordinary):
                assert a[:3] == b[:3], (a, b)
                assert len(a.arguments) == len(b.arguments)
                for mine, theirs in zip(a.arguments, b.arguments):
                    if isinstance(theirs, torch.Tensor):
                        assert isinstance(mine, int)
                        assert mine == theirs.data_ptr() or theirs.data_ptr() not in inputs
                    else:
                        assert mine == theirs, (a, b)


def tensors_of_other_alignment_are_compiled_for():
    p = problem(1)
    calls(p, "decode", "fused")
    DRIVER.loaded.clear()
    storage = torch.zeros(p.x.numel() + 1, dtype=p.x.dtype)
    p.x = storage[1:].view(p.x.shape)
    assert p.x.data_ptr() % 16
    calls(p, "decode", "fused", 2)
    assert len(DRIVER.loaded) == 2, DRIVER.loaded


def settings_hold_from_the_next_call():
    """A table, and a path that failed verification: neither is hidden by what an earlier call prepared."""
    p, table, name = problem(), configs.tables(), host.DEVICE.name

    def kernels() -> list[str]:
        DRIVER.launched.clear()
        backend.linear(*p.arguments(), 2, 16, False)
        return [one.kernel for one in DRIVER.launched]

    decode_, prefill = ["_decode", "_decode"], ["_shrink", "_route", "_expand"]
    assert kernels() == decode_
    table[name] = {configs._key("linear", "half", (5, 64, 64, 8, 16, 16, 16, 2)): "one_product"}
    table.changed()
    assert kernels() == prefill
    del table[name]
    table.changed()
    assert kernels() == decode_
    failed = [excluded.name_of("triton", path, p.x.dtype, False) for path in ("decode", "decode_one_launch")]
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder):
        excluded.record(name, dict.fromkeys(failed, "a reason"))
        with warnings.catch_warnings(record=True):
            assert kernels() == prefill
        excluded.record(name, {})
        assert kernels() == decode_


def a_profiler_hears_of_every_launch():
    p, heard = problem(), []
    calls(p, "decode", "fused")
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(heard.append)
    try:
        launched = calls(p, "decode", "fused")
    finally:
        hook.remove(heard.append)
    assert all(one.hook is hook for one in launched)
    assert all(one.hook is None for one in calls(p, "decode", "fused"))


def a_triton_that_launches_otherwise_is_left_to_it():
    run, seen = JITFunction.run, []
    launch._known.cache_clear()

    def other(self, *args, **kwargs):
        seen.append(self)
        return run(self, *args, **kwargs)

    JITFunction.run = other
    try:
        p = problem()
        launched = calls(p, "decode", "fused", 2)
    finally:
        JITFunction.run = run
        launch._known.cache_clear()
    assert len(seen) == len(launched) == 4


def the_first_launch_of_a_chain_does_not_overlap():
    """Given routing, few tokens: `expand` reads x before it waits, so no earlier kernel may have started early."""
    if not host.DEVICE.pdl:
        return
    p = problem(16)
    weights, ids = torch.rand(16, 2), torch.randint(8, (16, 2), dtype=torch.int32)
    DRIVER.launched.clear()
    with taking("route_first", "fused"):
        backend.apply(*p.arguments()[:7], weights, ids, False)
    assert [one.overlaps for one in DRIVER.launched] == [False, True, True]
    overlaps = [one.overlaps for one in calls(p, "route_first", "fused")]
    assert overlaps == [False, True, True, True, True]
    assert [one.overlaps for one in calls(p, "one_product", "fused")] == [False, True, True]


def kept_launches_take_the_host_less_than_a_third_of_the_time():
    for _ in range(5):  # single rounds are slow on a busy machine
        slow = {
            path: times
            for path, times in host.measure(calls=200, rounds=3).items()
            if 3 * (times["kept"][0] - times["F.linear"][0]) >= times["ordinary"][0] - times["F.linear"][0]
        }
        if not slow:
            return
    raise AssertionError(slow)


CHECKS = [
    a_kernel_is_compiled_once_for_all_calls,
    kept_launches_are_those_of_triton,
    tensors_of_other_alignment_are_compiled_for,
    settings_hold_from_the_next_call,
    a_profiler_hears_of_every_launch,
    a_triton_that_launches_otherwise_is_left_to_it,
    the_first_launch_of_a_chain_does_not_overlap,
    kept_launches_take_the_host_less_than_a_third_of_the_time,
]


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for check in CHECKS:
        try:
            check()
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
