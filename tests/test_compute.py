"""Threads of torch."""

from __future__ import annotations

import threading

import torch

from acktr.compute import one_thread


def test_one_thread_overlaps_and_new_threads_find_the_former_number() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with one_thread():
            inside.set()
            done.wait(10)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
            thread.start()
            assert inside.wait(10)
        assert torch.get_num_threads() == 2
        done.set()
        thread.join()
        assert seen == [1, 2]
        late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        late.start()
        late.join()
        assert seen[-1] == 2
    finally:
        torch.set_num_threads(before)
