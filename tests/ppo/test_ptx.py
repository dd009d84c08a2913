"""Text that is mixed into PPO's updates: its gradient, its order, and that it keeps what the model knew."""

import json
import math
from itertools import chain

import pytest
import tiny
import torch
import torch.nn.functional as F
import whole_runs
from ppo_step import config_of, step
from transformers import AutoModelForCausalLM

from fastppo.data.examples import load_texts
from fastppo.data.tables import DataError
from fastppo.distributed.engine import Engine
from fastppo.distributed.world import World, start_world
from fastppo.ppo import ptx
from fastppo.ppo.ptx import Texts, read_texts

pytestmark = pytest.mark.slow

TEXTS = ["a film.", "it was long and slow", "we left early.", "no", "the end is the best of it", "why?", "yes!", "well"]


@pytest.fixture(scope="module")
def world():
    return start_world(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = whole_runs.prepare(tmp_path_factory.mktemp("ptx"))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def mixed(folder, *arguments, coef=0.5):
    """One PPO step of the tiny model, all texts in each update."""
    text = ["--ptx.coef", str(coef), "--ptx.path", str(folder / "texts.jsonl"), "--ptx.batch_size", str(len(TEXTS))]
    return config_of(str(folder / "model"), *text, "--ptx.max_tokens", "30", *arguments)


def negative_logprobs(model, texts=TEXTS):
    """What transformers' own model says of each token that another precedes, one text at a time; the EOS counts."""
    found = []
    for text in texts:
        ids = torch.tensor(tiny.tokenizer()(text)["input_ids"] + [0])
        logits = model(ids[None]).logits[0, :-1]
        found.append(F.cross_entropy(logits, ids[1:], reduction="none"))
    return torch.cat(found)


@pytest.mark.parametrize("more", [[], ["--ppo.microbatch_tokens", "40", "--data.max_prompt_tokens", "15"]])
def test_the_gradient_is_that_of_ppos_loss_plus_coef_times_the_texts(folder, world, monkeypatch, more):
    """Against plain PyTorch. On the first update the ratio is 1, so nothing is clipped."""
    gradients, apply = {}, Engine.step

    def keep(self, learning_rates, *, apply_=apply, apply=True):
        if type(self.module).__name__ == "Policy":
            gradients.update({n: p.grad.clone() for n, p in self.module.model.named_parameters()})
        apply_(self, learning_rates, apply=apply)

    monkeypatch.setattr(Engine, "step", keep)
    hot = ["--sampling.temperature", "0.7"]  # of the responses; the text's loss is at 1
    done = step(mixed(folder, "--zero.stage", "0", *hot, *more, coef=0.3), world)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    batch, start, surrogate = done.experience, 0, []
    sequences = batch.packed.tokens.split(batch.packed.lengths.tolist())
    for tokens, length in zip(sequences, batch.packed.response_lengths.tolist(), strict=True):
        logits = model(tokens[None]).logits[0, -length - 1 : -1] / 0.7
        logprobs = -F.cross_entropy(logits, tokens[-length:], reduction="none")
        part = slice(start, start := start + length)
        surrogate.append((logprobs - batch.old_logprobs[part]).exp() * batch.advantages[part])
    text = negative_logprobs(model).mean()
    (-torch.cat(surrogate).mean() + 0.3 * text).backward()
    assert done.updates[0].ptx_loss == pytest.approx(text.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=2e-6)


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("roles", [["--critic.kind", "shared"], ["--actor.lora.rank", "4"], ["--actor.train", "1"]])
def test_the_update_does_not_depend_on_the_microbatch_size(folder, world, roles):
    whole = step(mixed(folder, *roles), world)
    cut = step(mixed(folder, *roles, "--ppo.microbatch_tokens", "30"), world)
    assert difference(whole.parameters, cut.parameters) < 2e-5
    assert whole.updates[0].ptx_loss == pytest.approx(cut.updates[0].ptx_loss, rel=1e-5)
    without = step(mixed(folder, *roles, "--ptx.path", "", coef=0), world)
    assert difference(whole.parameters, without.parameters) > 1e-3


def test_without_a_coefficient_no_text_is_read(folder, world, monkeypatch):
    monkeypatch.setattr(ptx, "load_texts", None)  # calling it would raise
    done = step(config_of(str(folder / "model")), world)
    assert [u.ptx_loss for u in done.updates] == [0.0]


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_while_the_critic_warms_up_no_text_is_learned(folder, world, kind):
    warm = ["--critic.kind", kind, "--critic.warmup_steps", "1", "--steps", "2"]
    done, without = step(mixed(folder, *warm), world), step(mixed(folder, *warm, "--ptx.path", "", coef=0), world)
    assert [u.ptx_loss for u in done.updates] == [0.0]
    assert difference(done.parameters, without.parameters) == 0


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_a_text_whose_loss_is_not_finite_leaves_the_models_as_they_were(folder, world, tmp_path, monkeypatch, stage):
    settings = ["--zero.stage", stage, "--output", str(tmp_path), "--critic.kind", "shared"]
    still = step(mixed(folder, *settings, "--actor.lr", "0", "--critic.lr", "0"), world).parameters
    monkeypatch.setattr(ptx, "negative_logprob", lambda targets, policy, hidden: hidden.sum() * float("nan"))
    done = step(mixed(folder, *settings), world)
    assert [u.skipped for u in done.updates] == [1] and math.isnan(done.updates[0].ptx_loss)
    assert all(torch.equal(still[name], p) for name, p in done.parameters.items())


def test_what_the_model_knew_is_kept(folder, world, tmp_path):
    """A model that has learned the text forgets some of it in PPO, and less with the text mixed in."""
    model = tiny.causal()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = negative_logprobs(model).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    known = float(loss.detach())
    path = tiny.saved(tmp_path / "known", model)
    many, after = ["--actor.model", path, "--ppo.epochs", "8"], {}
    for coef in (0.0, 0.5):
        text = [] if coef else ["--ptx.path", ""]
        parameters = step(mixed(folder, *many, *text, coef=coef), world).parameters
        model.load_state_dict({n.removeprefix("actor.model."): p for n, p in parameters.items() if "critic" not in n})
        after[coef] = float(negative_logprobs(model).mean().detach())
    assert known < 0.1 and after[0.5] < 0.5 and after[0.0] > 1.5  # 0.06, 0.19 and 4.5


# The order, and where the text comes from


def texts_of(folder, *arguments):
    config = mixed(folder, *arguments)
    return Texts.of(read_texts(config, tiny.tokenizer(), None), config)


def test_which_texts_an_update_has_depends_on_the_seed_and_its_number_alone(folder):
    few = ["--ptx.batch_size", "3"]
    straight, fifth = texts_of(folder, *few).from_update(0), texts_of(folder, *few).from_update(5)
    chosen = [next(straight) for _ in range(16)]
    assert chosen[5] == next(fifth)
    assert sorted(chain(*chosen)) == sorted(6 * [*range(len(TEXTS))])  # each text as often
    other = texts_of(folder, *few, "--seed", "2").from_update(0)
    assert chosen[:8] != [next(other) for _ in range(8)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_texts_in_as_many_microbatches(folder, ranks):
    texts = texts_of(folder, "--ppo.microbatch_tokens", "40", "--ppo.batch_size", "8")
    shares = [texts.microbatches([*range(8)], 0.0, World(rank, ranks, torch.device("cpu"))) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(int(i) for share in shares for part in share for i in part) == [*range(8)]
    assert all(int(texts.examples.lengths[part].sum()) <= 40 for share in shares for part in share)


def test_texts_are_read_as_the_settings_say(folder, tmp_path):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    rows = [
        {"q": "ab", "a": "xyz", "none": None, "talk": [*turns, {"role": "assistant", "content": "dd"}]},
        {"q": "", "a": "v" * 40},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(*more, context=None):
        config = mixed(folder, "--ptx.path", str(path), *more).ptx
        return load_texts(config, tiny.tokenizer(), context=context)

    plain = read("--ptx.response", "a")  # the first token is predicted by none; the long text is cut, its EOS too
    assert sorted(zip(plain.lengths.tolist(), plain.response_lengths.tolist(), strict=True)) == [(4, 3), (30, 29)]
    after = read("--ptx.response", "a", "--ptx.prompt", "q", "--ptx.too_long", "drop")
    assert (after.lengths.tolist(), after.response_lengths.tolist()) == ([6], [4])
    path.write_text(json.dumps(rows[0]))
    assert read("--ptx.messages", "talk", "--ptx.max_tokens", "50").response_lengths.tolist() == [2, 3]
    assert read("--ptx.response", "talk", "--ptx.max_tokens", "50").response_lengths.tolist() == [3]
    for more, words in (
        ([], "no column text. .*name one with ptx.response"),
        (["--ptx.response", "none"], r"no usable example: .*empty answer.* columns \(ptx.prompt, ptx.response\)"),
        (["--ptx.messages", "none"], r"no usable example: .*empty conversation.* columns \(ptx.messages\)"),
        (["--ptx.response", "a", "--ptx.max_tokens", "3", "--ptx.too_long", "drop"], "Raise ptx.max_tokens, .*ptx.too"),
        (["--ptx.response", "talk", "--ptx.chat", "never"], "ptx.chat is never"),
        (["--ptx.response", "a", "--ptx.max_tokens", "3", "--ptx.too_long", "error"], "more than ptx.max_tokens 3"),
    ):
        with pytest.raises(DataError, match=words):
            read(*more)
    with pytest.raises(DataError, match=r"ptx.max_tokens is 30, but the model's context holds 29 tokens.*ptx.too_long"):
        read("--ptx.response", "a", context=29)


# Whole runs

# Tells the run to stop at the nth microbatch after those of the first experience.
STOP_AT = """
from fastppo.distributed import stop

real, count = stop.check, iter(range(1, 1_000_000))

def place(*world):
    if next(count) >= 16:
        stop._watch.asked.set()
    real(*world)

stop.check = place
"""


def test_a_run_that_stops_within_a_step_goes_on_as_if_it_had_not_but_not_with_other_text(folder, forks, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text((folder / "texts.jsonl").read_text())
    text = {"ptx__coef": 0.5, "ptx__path": texts, "ptx__batch_size": 2, "ptx__max_tokens": 30}
    text |= {"steps": 2, "eval__prompts": 0, "eval__every": 0, "resume": "auto", "critic__kind": "shared"}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    forks.run(whole_runs.settings(folder, straight, **text))
    argv = whole_runs.settings(folder, broken, **text)
    forks.run(argv, 1, STOP_AT)
    assert "-update-" in whole_runs.checkpoints(broken)[-1], whole_runs.checkpoints(broken)
    texts.write_text(texts.read_text().replace("slow", "fast"))
    refused = forks.start(argv)
    assert forks.wait(refused) == [1]
    assert "made with other data" in refused.text() and f"and ptx.path = {texts} has now" in refused.text()
    texts.write_text(texts.read_text().replace("fast", "slow"))
    forks.run(argv)
    assert whole_runs.records(straight) == whole_runs.records(broken)
    assert whole_runs.same(*map(whole_runs.state, (straight, broken)))
    losses = [record["ptx_loss"] for record in whole_runs.records(straight)]
    assert len(losses) == 2 and losses[1] < losses[0]
