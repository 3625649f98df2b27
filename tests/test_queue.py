"""Many sequences in a few rows and pages: each gets the tokens that it gets alone, whatever else runs."""

import random
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab.dispatch import select
from lab.errors import LabError
from lab.model import decoder as decoder_module
from lab.model import prefill as prefill_module
from lab.model.decoder import Decoder
from lab.model.generate import generate
from lab.model.kv_cache import PagedKVCache
from lab.model.queue import Queue
from lab.model.sampling import Sampling
from lab.model.sources.random import RandomSource
from lab.model.weights import load
from tests.tiny_models import LLAMA

KINDS = [
    Sampling(),
    Sampling(0.9, top_k=40, seed=5),
    Sampling(1.1, min_p=0.02, seed=6, frequency_penalty=0.5, logprobs=2),
    Sampling(repetition_penalty=1.3, logit_bias=((7, 1.5),)),
]


def decoder(device, backend="torch", batch=1, pages=None, plan="basic"):
    weights = load(RandomSource(LLAMA), torch.float32, device)
    return Decoder(weights, select(backend, device), batch, 96, plan=plan, pages=pages)


def requests(count, seed=0):
    """(prompt, new tokens, sampling): lengths of any kind; every third begins with the same 40 tokens."""
    draw = random.Random(seed)
    common = [draw.randrange(LLAMA.vocab) for _ in range(40)]
    made = []
    for number in range(count):
        own = [draw.randrange(LLAMA.vocab) for _ in range(draw.randrange(1, 20))]
        made.append(
            ((common if number % 3 == 0 else []) + own, draw.randrange(1, 20), KINDS[number % len(KINDS)])
        )
    return made


@pytest.mark.parametrize(
    "backend, plan, pages, count",
    [
        ("torch", "basic", None, 14),
        ("torch", "fused", 8, 14),
        ("cuda", "basic", 8, 14),
        ("cuda", "fused", None, 7),
    ],
)
def test_tokens_do_not_depend_on_companions(device, backend, plan, pages, count):
    given, one = requests(count), Queue(decoder(device, backend, plan=plan))
    alone = []
    for prompt, new, sampling in given:
        alone.append(one.submit(prompt, new, sampling))
        one.run()
    queue, seen = Queue(decoder(device, backend, 5, pages, plan)), {}
    together = [
        queue.submit(*request, on_token=lambda task, token: seen.setdefault(task.number, []).append(token))
        for request in given
    ]
    queue.run()
    for want, got in zip(alone, together):
        assert got.output_ids == want.output_ids == seen[got.number]
        assert got.stopped_by == "length" and len(got.output_ids) == got.max_new_tokens
        assert [top.keys() for _, top in got.logprobs] == [top.keys() for _, top in want.logprobs]
    assert (queue.paused > 0) == (pages is not None), "the pool was meant to be too small, or not to be"
    cache = queue.cache
    assert sorted(cache.free) == list(range(cache.pages)) and not cache.prefixes and not any(cache.holders)


def test_a_greedy_sequence_is_that_of_generate(device):
    one = decoder(device)
    queue = Queue(decoder(device, batch=3))
    tasks = [queue.submit(prompt, new) for prompt, new, _ in requests(6)]
    queue.run()
    for task in tasks:
        assert generate(one, task.prompt_ids, task.max_new_tokens).output_ids == task.output_ids


def test_tokens_are_read_one_step_late(device, monkeypatch):
    """The device has its next step before the host waits for the one before, and no step is wasted."""
    from lab.model.queue import Launched

    queue, order = Queue(decoder(device, batch=2)), []
    step, wait = queue.decoder.step, Launched.wait
    monkeypatch.setattr(queue.decoder, "step", lambda *a: order.append("step") or step(*a))
    monkeypatch.setattr(Launched, "wait", lambda self: order.append("wait") or wait(self))
    tasks = [queue.submit([n], 4) for n in (1, 2)]
    queue.run()
    assert order == ["step", *["step", "wait"] * 3, "wait"]
    for task in tasks:
        assert len(task.decode_ms) == 4 and all(ms > 0 for ms in task.decode_ms) and task.prefill_ms >= 0


class Operations(TorchDispatchMode):
    """Notes every operation of torch that is more than a view or the making of a tensor."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("aten::")
        if not (op.is_view or name.startswith(("empty", "lift_fresh", "detach"))):
            self.names.append(name)
        return op(*args, **kwargs or {})

    def as_one(self, function, name):
        """`function`, whose operations are noted as one of this name."""

        def run(*args):
            before = len(self.names)
            result = function(*args)
            self.names[before:] = [name]
            return result

        return run


def test_the_host_adds_one_copy_to_a_step(device, monkeypatch):
    """Once in as many steps as a page has tokens it also gives rows new pages. After a prefill it adds a copy
    of whether its numbers are finite, which is read when the step after it is launched."""
    queue, steps, noted = Queue(decoder(device, batch=8)), 48, Operations()
    monkeypatch.setattr(queue.decoder, "_run", noted.as_one(queue.decoder._run, "STEP"))
    launch = noted.as_one(decoder_module.launch_prefill, "PREFILL")
    monkeypatch.setattr(decoder_module, "launch_prefill", launch)
    for length in range(2, 10):
        queue.submit(list(range(length)), steps + 20)
    with noted:
        queue.step()
        assert noted.names.count("PREFILL") == 8
        step, names = noted.names.index("STEP"), noted.names[::-1]
        assert step - (len(names) - 1 - names.index("PREFILL")) == 2
        assert "_local_scalar_dense" in noted.names[step:], "it reads that number then"
        added = []
        for _ in range(steps):
            noted.names.clear()
            queue.step()
            added.append(len(noted.names) - 1)
    assert added.count(1) == steps - steps // queue.cache.page_size


@pytest.mark.parametrize("pages, new", [(None, 9), (None, 1), (8, 12)])
def test_a_prefill_that_was_wrong_is_done_again_before_its_tokens_count(device, monkeypatch, pages, new):
    """As if there were keys that are not finite in every prompt: what the first attempt writes is useless."""
    given = [(prompt, new) for prompt, _, _ in requests(8)]
    queue = Queue(decoder(device, batch=3, pages=pages))
    want = [queue.submit(*one) for one in given]
    queue.run()
    launch, spoiled = decoder_module.launch_prefill, []

    def launch_wrong(weights, cache, cos_sin, row, ids):
        launch(weights, cache, cos_sin, row, ids)
        own = [page for page in cache.held[row] if cache.holders[page] == 1]
        cache.k[:, own] = torch.nan
        spoiled.append(row)
        return torch.zeros((), dtype=torch.bool, device=device)

    monkeypatch.setattr(decoder_module, "launch_prefill", launch_wrong)
    queue = Queue(decoder(device, batch=3, pages=pages))
    got = [queue.submit(*one) for one in given]
    queue.run()
    assert [task.output_ids for task in got] == [task.output_ids for task in want]
    assert all(task.stopped_by == "length" and len(task.decode_ms) == new for task in got)
    assert len(spoiled) == sum(len(prompt) > 1 for prompt, _ in given)
    assert sorted(queue.cache.free) == list(range(queue.cache.pages)) and not queue.decoder.live_rows


def test_a_stop_token_ends_a_sequence_and_frees_its_row(device):
    alone = generate(decoder(device), [1, 2, 3], 12).output_ids
    at = next(i for i in range(3, 12) if alone[i] not in alone[:i])
    queue = Queue(decoder(device, batch=2))
    tasks = [queue.submit([1, 2, 3], 12, stop_ids=(alone[at],)) for _ in range(3)]
    queue.run()
    for task in tasks:
        assert task.output_ids == alone[: at + 1] and task.stopped_by == "stop"
    assert not queue.decoder.live_rows


def test_a_common_beginning_is_kept_once(device):
    queue, prompt = Queue(decoder(device, batch=4)), list(range(50))
    for last in range(4):
        queue.submit([*prompt, last], 8)
    queue.step()
    held = queue.cache.held
    assert all(row[:3] == held[0][:3] for row in held) and len({row[3] for row in held}) == 4
    assert [queue.cache.holders[page] for page in held[0]] == [4, 4, 4, 1]
    queue.cancel(queue.running[0])
    assert [queue.cache.holders[page] for page in held[1]] == [3, 3, 3, 1]
    queue.clear()
    assert len(queue.cache.free) == queue.cache.pages


def test_a_page_is_shared_only_after_the_same_pages():
    cache = PagedKVCache(LLAMA, 3, 64, torch.float32, "cpu")
    a, b = list(range(16)), list(range(100, 116))
    cache.extend(0, 32)
    cache.offer(0, a + b)
    assert (
        len(cache.shared_pages(a + b)) == 2
        and cache.shared_pages(b + a) == []
        and cache.shared_pages(b) == []
    )
    assert cache.share(1, a + [5] * 20) == 16
    cache.release(0)
    assert len(cache.shared_pages(a + b)) == 1, "its second page is nobody's now"
    cache.release(1)
    assert cache.shared_pages(a) == [] and len(cache.free) == cache.pages


def test_rows_move_down_when_few_are_left(device):
    queue = Queue(decoder(device, batch=4))
    for new in (2, 2, 2, 9):
        queue.submit([new], new)
    sizes = []
    while queue.step():
        sizes.append(queue._size(max(queue.running, default=0) + 1))
    assert sizes[0] == 4 and sizes[-1] == 1


def test_what_can_never_run_is_refused_at_once(device):
    queue = Queue(decoder(device, batch=2, pages=3))
    for wrong in (
        dict(prompt_ids=[]),
        dict(prompt_ids=[1], max_new_tokens=0),
        dict(prompt_ids=[1], max_new_tokens=2.5),
        dict(prompt_ids=[9999]),
        dict(prompt_ids=[3.7]),
        dict(prompt_ids=["a"]),
    ):
        with pytest.raises(LabError):
            queue.submit(**wrong)
    with pytest.raises(LabError, match="pages"):
        queue.submit([1] * 40, 20)
    with pytest.raises(LabError, match="outside the vocabulary"):
        queue.submit([1], 2, Sampling(logit_bias=((9999, 1.0),)))
    assert not queue.step()


def test_a_sequence_without_numbers_ends_alone(device):
    queue = Queue(decoder(device, batch=2))
    lame, sound = queue.submit([3, 4], 6), queue.submit([5, 6], 6)
    queue.step()
    queue.cache.k[:, queue.cache.held[0][0]] = torch.nan
    queue.run()
    assert lame.stopped_by == "error" and "not numbers" in lame.error
    assert sound.output_ids == generate(decoder(device), [5, 6], 6).output_ids


def test_ids_of_a_tensor_are_those_of_a_list(device):
    queue = Queue(decoder(device, batch=2))
    tasks = [queue.submit(ids, 3) for ids in ([1, 2, 3], torch.tensor([1, 2, 3]))]
    queue.run()
    assert tasks[0].output_ids == tasks[1].output_ids and tasks[1].prompt_ids == [1, 2, 3]


def test_clear_ends_a_sequence_whose_last_token_is_not_read(device):
    queue = Queue(decoder(device, batch=2))
    tasks = [queue.submit([1], 1), queue.submit([2], 5)]
    queue.step()
    assert not queue.running.keys() & {0} and tasks[0].stopped_by is None, "its token is in flight"
    queue.clear()
    assert [task.stopped_by for task in tasks] == ["cancelled", "cancelled"] and not queue.step()


def test_prefills_in_threads_leave_the_flags_of_the_process_alone(monkeypatch):
    """The first prefill waits inside, until a second one would have begun, and then ends first."""
    flag, inside, ended = torch.backends.cuda.cudnn_sdp_enabled, threading.Event(), threading.Event()
    before, layer, current = flag(), prefill_module.after_attention, threading.current_thread

    def after_attention(*args, **more):
        if current().name == "first":
            inside.set()
            time.sleep(0.2)
        else:
            ended.wait(5)
        return layer(*args, **more)

    monkeypatch.setattr(prefill_module, "after_attention", after_attention)
    made = [decoder("cpu"), decoder("cpu")]
    run = lambda one: (one.admit(0, [1, 2, 3]), ended.set())
    threads = [threading.Thread(target=run, args=(one,), name=n) for one, n in zip(made, ("first", "second"))]
    threads[0].start()
    inside.wait(5)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert before and flag() == before
