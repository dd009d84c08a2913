"""Decode steps as CUDA graphs: what is recorded, what a replay reads, and that sampling does not change by it.

Without a GPU a stand-in records: it runs the step again at each replay. A step that needs no number from the device
while it is recorded runs on the meta device, whose tensors have none.
"""

import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import COMPILED
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo import ops
from fastppo.config import GenerateConfig, SamplingConfig
from fastppo.data.batch import Prompts
from fastppo.distributed import Residency, World
from fastppo.errors import FastPPOError, log_once
from fastppo.generation.run import Sampled
from fastppo.models import SamplingWeights, attention
from fastppo.models.attention import compute_with, decodes_without_sync
from fastppo.models.backends.flash import FlashAttention
from fastppo.models.backends.varlen import VarlenAttention
from fastppo.models.roles import Policy, fuse_head
from fastppo.rollout import ActorSampler, InProcess, graphs
from fastppo.rollout.decoder import STEPS_UNREAD, Decoder
from fastppo.rollout.decoding import Decoding
from fastppo.rollout.inprocess import make_inprocess, roomy, sample

PROMPTS = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15, 16), (17,), (18, 19, 20, 21, 22), *[(i, i + 1) for i in range(12)]]
STOPS = range(0, 257, 12)


def prompts_of(tokens=PROMPTS, samples=1):
    return Prompts.of(tokens, range(len(tokens)), samples=samples)


def responses(actor, tokens=PROMPTS, **settings):
    config = SamplingConfig(**{"max_new_tokens": 20, "rows": 16} | settings)
    return sample(actor, prompts_of(tokens), config, stop_ids=STOPS, seed=3)


def same(found, expected):
    return all(
        torch.equal(one, other)
        for one, other in (
            (found.packed.tokens, expected.packed.tokens),
            (found.packed.lengths, expected.packed.lengths),
            (found.logprobs, expected.logprobs),
            (found.ended, expected.ended),
        )
    )


class Recorder:
    """Runs a recorded step again at each replay, and knows whether it does."""

    def __init__(self):
        self.recorded, self.replays, self.within = 0, 0, False

    def __call__(self, run, pool):
        self.recorded += 1
        self._run(run)
        return lambda: self._replay(run)

    def _replay(self, run):
        self.replays += 1
        self._run(run)

    def _run(self, run):
        self.within = True
        try:
            run()
        finally:
            self.within = False


@pytest.fixture
def recorder(monkeypatch):
    stand_in = Recorder()
    monkeypatch.setattr(attention, "decodes_without_sync", lambda model: True)
    monkeypatch.setattr(graphs, "record", stand_in)
    return stand_in


@pytest.fixture
def steps(monkeypatch):
    """Of each decode step the number of rows, and where the tensor of rows lies."""
    seen, step = [], Decoder._step
    monkeypatch.setattr(
        Decoder, "_step", lambda self, rows: seen.append((len(rows), rows.data_ptr())) or step(self, rows)
    )
    return seen


@pytest.fixture
def actor():
    return Policy(fuse_head(tiny.causal(dtype=torch.bfloat16)))


@pytest.fixture(autouse=True)
def _pytorch_again():
    yield
    compute_with(None)


@pytest.fixture
def engine(actor):
    config = SamplingConfig(max_new_tokens=20, rows=16)
    made = InProcess(SamplingWeights(actor, stage=0), config, STOPS, longest=30)
    made.sync()
    return made


# What is recorded


@pytest.mark.parametrize("settings", [{}, {"min_new_tokens": 3, "top_k": 40, "top_p": 0.9, "temperature": 0.7}])
@pytest.mark.parametrize("rows", [16, 8, 4])  # of 16 prompts; fewer are refilled
def test_sampling_is_the_same_and_each_number_of_rows_is_recorded_once(actor, recorder, steps, rows, settings):
    settings = {"max_new_tokens": 40, **settings}  # long enough for most to end, however a processor rounds
    found = responses(actor, rows=rows, **settings)
    sizes = [count for count, _ in steps]
    assert recorder.recorded == len(set(sizes)) >= 1 + (rows > 4)  # rows left the batch
    assert sizes == sorted(sizes, reverse=True) and recorder.replays + recorder.recorded == len(sizes)
    lengths = found.packed.response_lengths.tolist()
    assert len(set(lengths)) > 3 and any(n % STEPS_UNREAD not in (0, 1) for n in lengths)  # they end between looks
    assert same(found, responses(actor, rows=rows, cuda_graphs=False, **settings))


def test_every_replay_reads_the_rows_that_were_recorded(actor, recorder, steps):
    responses(actor, rows=16)
    places = {count: {place for size, place in steps if size == count} for count, _ in steps}
    assert len(places) > 1 and all(len(found) == 1 for found in places.values())
    assert recorder.replays > len(places)


def test_a_step_that_cannot_be_recorded_is_launched_kernel_by_kernel_and_the_log_says_so(
    actor, recorder, monkeypatch, caplog
):
    def record(run, pool):
        run()  # as recording does, before it
        raise graphs.CannotRecordError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", record)
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastppo"):
        found = responses(actor)
    assert same(found, responses(actor, cuda_graphs=False))
    assert [r.getMessage().partition("(")[2] for r in caplog.records] == [
        "operation not permitted when stream is capturing)"
    ]


def test_an_error_of_the_step_itself_is_not_taken_for_one_of_recording(actor, recorder, monkeypatch):
    def step(self, rows):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Decoder, "_step", step)
    with pytest.raises(RuntimeError, match="out of memory"):
        responses(actor)


def test_steps_are_recorded_on_cuda_alone_whatever_computes_attention(actor):
    on_cuda = SimpleNamespace(device=torch.device("cuda"))
    for backend in (FlashAttention(None, None), VarlenAttention(None), None):
        compute_with(backend)
        assert decodes_without_sync(on_cuda) and not decodes_without_sync(actor.model)


@COMPILED
def test_the_kernels_of_a_gpu_draw_the_tokens_of_the_cpu_s(request):
    policy = Policy(fuse_head(tiny.causal("gemma2")))  # a soft cap, and a window in every second layer
    prompts, config = prompts_of(PROMPTS[:3]), SamplingConfig(max_new_tokens=6, rows=4)
    expected = sample(policy, prompts, config, stop_ids=(), seed=3)
    request.getfixturevalue("triton_on_cpu")
    found = sample(policy, prompts, config, stop_ids=(), seed=3)
    assert torch.equal(found.packed.tokens, expected.packed.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)


# What is outside


class Launches(TorchDispatchMode):
    """The ops that are called outside of recorded steps."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder, self.ops = recorder, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.recorder.within:
            self.ops.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


class Reads(TorchFunctionMode):
    """The methods by which the host takes content of a tensor outside of recorded steps."""

    NAMES = frozenset({"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"})

    def __init__(self, recorder):
        super().__init__()
        self.recorder, self.methods = recorder, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if not self.recorder.within and name in self.NAMES:
            self.methods.append(name)
        return function(*args, **kwargs or {})


def test_the_host_launches_nothing_and_reads_nothing_for_eight_steps(actor, recorder, monkeypatch):
    """Beside the recorded step there is the copy of the rows, when another batch of them is decoded."""
    spans, step, take = [[]], Decoding._step, Decoding.take
    launches, reads = Launches(recorder), Reads(recorder)

    def counted_step(self):
        with launches, reads:
            step(self)
        spans[-1].append(([*launches.ops], [*reads.methods]))
        launches.ops.clear()
        reads.methods.clear()

    def counted_take(self):
        with launches, reads:
            take(self)
        assert "tolist" in reads.methods  # so that one would be seen
        launches.ops.clear()
        reads.methods.clear()
        spans.append([])

    monkeypatch.setattr(Decoding, "_step", counted_step)
    monkeypatch.setattr(Decoding, "take", counted_take)
    responses(actor, tokens=[(i + 1, i + 2) for i in range(40)], rows=16)
    spans = [span for span in spans if span]
    assert len(spans) > 3 and {len(span) for span in spans} == {STEPS_UNREAD} == {8}
    assert all(reads == [] for span in spans for _, reads in span)
    replayed = [ops for span in spans for ops, _ in span[1:]]  # at the first, a bucket may be recorded
    assert all(ops == [] for ops in replayed)
    at_first = {op for span in spans for ops, _ in span[:1] for op in ops}
    assert at_first <= {"copy_", "clone", "detach", "lift_fresh", "_to_copy", "empty"}  # of the rows in the batch


# What computes attention on the meta device: each launches kernels alone on a GPU, which other tests show.
ON_META = {
    "flash": FlashAttention(None, lambda query, *rest, **options: torch.empty_like(query)),
    "varlen": VarlenAttention(lambda query, *rest, **options: torch.empty_like(query)),
    "op": None,
}


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", ON_META)
def test_a_step_needs_no_content_of_any_tensor(kind, family, monkeypatch):
    """As while a GPU records it; on the meta device asking for content is an error."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(ops, "attend_cached", lambda query, *rest, **options: torch.empty_like(query))
    policy = Policy(fuse_head(tiny.causal(family, dtype=torch.bfloat16))).eval().to("meta")
    config = SamplingConfig(max_new_tokens=8, min_new_tokens=2, top_k=40, top_p=0.9)
    compute_with(ON_META[kind])
    decoder, rows = Decoder(policy, 8, 40, config, STOPS, recorded=False), torch.arange(8, device="meta")
    with torch.no_grad(), OnTheDevice():
        decoder.step(rows)


class OnTheDevice(TorchDispatchMode):
    """Refuses what the meta device has no objection to: copies from the host, and ops that look at content on CUDA."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in {"isin", "unique_dim", "_unique2", "bincount", "repeat_interleave"}, name
        host = [x for x in args if isinstance(x, torch.Tensor) and x.device.type == "cpu" and x.ndim]
        assert not host, f"{name} of a tensor in the host's memory"
        return function(*args, **kwargs or {})


# From batch to batch


def test_cache_and_graphs_are_kept_from_batch_to_batch(engine, actor, recorder):
    first = engine.sample(prompts_of(), temperature=1.0, seed=3)
    decoder, place = engine._decoder, engine._decoder.cache.keys.data_ptr()
    second = engine.sample(prompts_of(PROMPTS[:5]), temperature=1.0, seed=3)  # in fewer rows
    recorded = recorder.recorded
    assert len(engine.sample(prompts_of([]), temperature=1.0, seed=3).packed) == 0  # as on a rank that got none
    third = engine.sample(prompts_of(), temperature=1.0, seed=3)
    assert engine._decoder is decoder and decoder.cache.keys.data_ptr() == place
    assert recorder.recorded == recorded
    assert same(first, third) and same(first, responses(actor, cuda_graphs=False))
    assert same(second, responses(actor, tokens=PROMPTS[:5], cuda_graphs=False))


def test_graphs_of_training_and_of_evaluation_are_both_kept_and_no_more(engine, actor, recorder):
    ways = {(1.0, 3): 0, (0.5, 4): 0, (0.8, 5): 0}

    def recorded(way):
        before = recorder.recorded
        found = engine.sample(prompts_of(), temperature=way[0], seed=way[1])
        config = SamplingConfig(max_new_tokens=20, rows=16, temperature=way[0], cuda_graphs=False)
        assert same(found, sample(actor, prompts_of(), config, stop_ids=STOPS, seed=way[1]))
        return recorder.recorded - before

    train, evaluate, other = ways
    assert recorded(train) and recorded(evaluate)
    assert not recorded(train) and not recorded(evaluate) and not recorded(train)
    assert (
        recorded(other) and not recorded(train) and recorded(evaluate)
    )  # the one that was not used the longest is gone


def test_a_larger_batch_gets_a_larger_cache_that_serves_the_smaller_ones_too(engine, recorder):
    engine.sample(prompts_of(PROMPTS[:4]), temperature=1.0, seed=3)
    small = engine._decoder
    engine.sample(prompts_of(), temperature=1.0, seed=3)
    large = engine._decoder
    assert large is not small and (large.rows, large.length) == (16, 30)  # as long as any batch can need
    engine.sample(prompts_of(PROMPTS[:4]), temperature=1.0, seed=3)
    assert engine._decoder is large


def test_a_cache_that_is_kept_has_a_few_lengths_and_is_at_most_a_quarter_too_long():
    lengths = range(1, 5_000)
    assert all(n <= roomy(n) <= max(1.25 * n, n + 15) for n in lengths)
    assert len({roomy(n) for n in lengths}) < 40


@pytest.mark.parametrize("moved", ["cache", "weights"])
def test_what_has_moved_is_recorded_anew(engine, actor, recorder, moved):
    expected = engine.sample(prompts_of(), temperature=1.0, seed=3)
    recorded = recorder.recorded
    before = engine._decoder.cache.keys if moved == "cache" else next(actor.parameters())
    before.data = before.data.clone()
    assert same(engine.sample(prompts_of(), temperature=1.0, seed=3), expected)
    assert recorder.recorded == 2 * recorded


def test_a_sleeping_engine_holds_no_cache_and_wakes_up_with_an_empty_one(engine, recorder):
    expected = engine.sample(prompts_of(), temperature=1.0, seed=3)
    buffers = engine._decoder.cache.states()
    engine.sleep()
    assert [x.untyped_storage().nbytes() for x in buffers] == [0, 0]
    engine.wake()
    assert all(x.untyped_storage().nbytes() == x.nbytes and not x.any() for x in buffers)
    assert same(engine.sample(prompts_of(), temperature=1.0, seed=3), expected)


def test_the_cache_leaves_with_its_phase_and_comes_back_with_it(recorder, steps):
    residency = Residency(torch.device("cpu"))
    residency._moves = True  # as on a GPU; what moves are the same storages
    model = Sampled(Policy(fuse_head(tiny.causal())).requires_grad_(False), tiny.tokenizer(), residency)
    config = GenerateConfig(sampling=SamplingConfig(max_new_tokens=20, rows=16))
    sampler = ActorSampler(
        "in process", make_inprocess(config, model, STOPS, World(0, 1, torch.device("cpu"))), model, config, STOPS
    )
    residency.add_sleeper("sampler", sampler)
    found, held = [], []
    for phase in ("sampling", "feedback") * 3:
        with residency.holding(phase):
            if phase == "sampling":
                sampler.sync()
                found.append(sampler.sample(prompts_of()))
        held.append(sum(x.untyped_storage().nbytes() for x in sampler._engine._decoder.cache.states()))
    assert held[0] > 0 and held == [held[0], 0] * 3
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_where_nothing_is_recorded_no_cache_is_kept(engine, recorder, monkeypatch):
    engine.sample(prompts_of(), temperature=1.0, seed=3)
    monkeypatch.setattr(attention, "decodes_without_sync", lambda model: False)
    engine.sample(prompts_of(), temperature=1.0, seed=3)
    assert engine._decoder is None


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["flash", "varlen", "sdpa"])
def test_on_a_gpu_sampling_is_the_same_in_every_batch_of_both_ways_to_draw(actor, engine, setting):
    try:
        attention.choose_attention(setting, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    except FastPPOError as error:
        pytest.skip(str(error))
    actor.to("cuda")
    log_once.cache_clear()
    for temperature, seed in ((1.0, 3), (0.5, 4), (1.0, 3)):
        config = SamplingConfig(max_new_tokens=20, rows=16, temperature=temperature, cuda_graphs=False)
        expected = sample(actor, prompts_of(), config, stop_ids=STOPS, seed=seed)
        found = engine.sample(prompts_of(), temperature=temperature, seed=seed)
        assert torch.equal(found.packed.tokens, expected.packed.tokens)
        assert all(step is not None for steps in engine._decoder._graphs._ways.values() for step in steps.values())
        engine.sleep()
        engine.wake()
