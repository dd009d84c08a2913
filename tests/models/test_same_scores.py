"""A reward model says what transformers' classifier says of what its users give it, however fastppo asks it."""

import copy
import json

import pytest
import tiny
import torch
from services import eventually, reward_service
from tokenizers.processors import TemplateProcessing

from fastppo.config import Config, DataConfig, HealthConfig, OptimConfig, RewardConfig, ZeroConfig
from fastppo.data.batch import Rollout
from fastppo.data.packed import pack
from fastppo.data.prompts import load_prompts
from fastppo.distributed.engine import Frozen
from fastppo.distributed.residency import Residency
from fastppo.distributed.world import World
from fastppo.models.roles import RewardModel
from fastppo.rewards import RewardError, check_chats, load_judge, score
from fastppo.rewards.model import ModelSource
from fastppo.rewards.remote import remote_source
from fastppo.serve_reward import alone

WORLD = World(0, 1, torch.device("cpu"))
# As ChatML: a line break stands behind the token that ends a turn.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OTHER = "{% for m in messages %}{{ m.role }} said: {{ m.content | trim }}. {% endfor %}{{ mood | default('') }}"
CHAT = [{"role": "user", "content": "Why?"}]
MARKERS = ("<s>", "<user>", "<assistant>", "<pad>")
PADDINGS = {"EOS": "<eos>", "another": "<pad>", "none": None}


@pytest.fixture(scope="module")
def tokenizer():
    """Puts a BOS before every text, as most do, and has markers for chat."""
    made = tiny.tokenizer(MARKERS)
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<user>", "<assistant>"]})
    made.chat_template = TEMPLATE
    bos = [("<s>", made.bos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    return made


def changed(tokenizer, kind):
    """The reward model's tokenizer: the actor's own, or one with another vocabulary; with a template, or without."""
    made = copy.deepcopy(tokenizer)
    if kind == "without a template":
        made.chat_template = None
    elif kind == "another":
        made.add_tokens("<more>")
    elif kind == "another with its template":
        made.add_tokens("<more>")
        made.chat_template = OTHER
    elif kind == "the same with its template":
        made.chat_template = OTHER
    return made


KINDS = ("the same", "without a template", "the same with its template", "another", "another with its template")


def classifier(padding, tokenizer):
    model = tiny.classifier(vocabulary=262)
    model.config.pad_token_id = None if padding is None else tokenizer.convert_tokens_to_ids(padding)
    return model


def reads(model, tokenizer, actors):
    zero, role = ZeroConfig(stage=0), RewardModel(model).requires_grad_(False).eval()
    return ModelSource(Frozen(role, OptimConfig(), zero), tokenizer, actors, budget=200, zero=zero, world=WORLD)


def transformers_scores(model, tokenizer, rows, side):
    """As users of the classifier get them: all rows in a padded batch, or one by one where nothing pads."""
    if model.config.pad_token_id is None:
        batches = [{"input_ids": torch.tensor([row])} for row in rows]
    else:
        width = max(map(len, rows))
        fill = [[model.config.pad_token_id] * (width - len(row)) for row in rows]
        both = [(f + r, [0] * len(f) + [1] * len(r)) for f, r in zip(fill, rows, strict=True)]
        if side == "right":
            both = [(r + f, [1] * len(r) + [0] * len(f)) for f, r in zip(fill, rows, strict=True)]
        ids, mask = (torch.tensor(part) for part in zip(*both, strict=True))
        batches = [{"input_ids": ids, "attention_mask": mask}]
    with torch.no_grad():
        return torch.cat([model(**batch).logits[:, 0] for batch in batches]).tolist()


@pytest.fixture(scope="module")
def service(tokenizer):
    """The address of a service, and a function that gives it another model."""

    def source(model, tokenizer):
        role = RewardModel(copy.deepcopy(model)).requires_grad_(False).eval()
        return alone(role, tokenizer, 200, WORLD.device)

    with reward_service(lambda: source(classifier(None, tokenizer), tokenizer)) as (url, scorer):
        eventually(lambda: scorer.source is not None)
        yield url, lambda *given: setattr(scorer, "source", source(*given))


def asked(tmp_path, tokenizer, prompt, settings, texts=(" was good", " was", ""), ended=(True, False, True)):
    """Prompts, and a rollout of three responses to the only one; those that ended have their EOS."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
    data = DataConfig(path=str(tmp_path / "prompts.jsonl"), **settings)
    prompts, _ = load_prompts(data, tokenizer, prompts_heldout=0, context=None, reserve=0)
    eos = [tokenizer.eos_token_id]
    responses = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + eos * has
        for text, has in zip(texts, ended, strict=True)
    ]
    packed = pack([[*prompts.tokens[0], *r] for r in responses], [len(r) for r in responses])
    sources = torch.zeros(len(texts), dtype=torch.int64)
    return prompts, Rollout(packed, torch.zeros(len(packed.responses)), torch.tensor(ended), sources)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "settings"),
    [("The film", {}), ("<s>The film", {}), ("The film was long", {"first_tokens": 6}), (CHAT, {})],
    ids=["plain", "with its BOS", "cut", "chat"],
)
def test_a_model_scores_as_in_transformers_in_every_way(
    tmp_path, tokenizer, service, prompt, settings, kind, padding, side
):
    theirs = changed(tokenizer, kind)
    model = classifier(PADDINGS[padding], theirs)
    texts, ended = (" was good", " was", ""), (True, False, True)
    prompts, rollout = asked(tmp_path, tokenizer, prompt, settings, texts, ended)
    if prompt is CHAT and theirs.chat_template is not None:
        chats = [[*CHAT, {"role": "assistant", "content": text.strip()}] for text in texts]
        rows = [theirs.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    else:
        before = prompts.texts[0].removeprefix("<s>")
        rows = [theirs(before + text)["input_ids"] for text in texts]
        rows = [row + [theirs.eos_token_id] * has for row, has in zip(rows, ended, strict=True)]
    expected = transformers_scores(model, theirs, rows, side)
    assert len({round(x, 5) for x in expected}) == 3
    url, give = service
    give(model, theirs)
    sources = [(reads(copy.deepcopy(model), theirs, tokenizer), 1.0), (remote_source(RewardConfig(url=url)), 1.0)]
    said = score(rollout, prompts, sources, tokenizer, WORLD, judge=sources[:1])
    for found in (*said.by_source.T.tolist(), said.judged.tolist()):
        assert found == pytest.approx(expected, abs=1e-6)


def test_padding_by_the_eos_is_scored_before_it_and_another_at_it(tmp_path, tokenizer):
    """Such models were trained so; the two scores differ."""
    prompts, rollout = asked(tmp_path, tokenizer, "The film", {}, (" was", " was"), (True, False))
    for padding, alike in (("<eos>", True), ("<pad>", False), (None, False)):
        source = reads(classifier(padding, tokenizer), tokenizer, tokenizer)
        said = score(rollout, prompts, [(source, 1.0)], tokenizer, WORLD).scores
        assert bool(torch.isclose(said[0], said[1], atol=1e-6)) == alike


def test_a_sequence_of_padding_alone_is_scored_at_its_first_token():
    packed = pack([[5, 0, 0], [0, 0], [0, 7], [4]], [1] * 4)
    assert packed.last_rows_without(0).tolist() == [0, 3, 6, 7]
    assert packed.last_rows_without(None).tolist() == packed.last_rows.tolist() == [2, 4, 6, 7]


def test_the_judge_of_a_run_reads_by_its_own_template(tmp_path, tokenizer):
    theirs = changed(tokenizer, "another with its template")
    model = classifier("<eos>", theirs)
    model.save_pretrained(tmp_path / "judge")
    theirs.save_pretrained(tmp_path / "judge")
    judge = (RewardConfig(model=str(tmp_path / "judge")),)
    config = Config(health=HealthConfig(judge=judge), optim=OptimConfig(dtype="fp32"))
    prompts, rollout = asked(tmp_path, tokenizer, CHAT, {}, (" was good",), (True,))
    loaded = load_judge(config, tokenizer, WORLD, Residency(WORLD.device))
    said = score(rollout, prompts, loaded, tokenizer, WORLD, judge=loaded).judged.tolist()
    row = theirs.apply_chat_template([*CHAT, {"role": "assistant", "content": "was good"}], tokenize=False)
    ids = theirs(row, add_special_tokens=False)["input_ids"]
    assert theirs.decode(ids) == "user said: Why?. assistant said: was good. "
    assert said == pytest.approx(transformers_scores(model, theirs, [ids], "right"), abs=1e-6)


def test_a_template_that_refuses_a_chat_is_named_with_the_roles(tmp_path, tokenizer, service):
    theirs = changed(tokenizer, "another with its template")
    theirs.chat_template = "{% if messages[0].role == 'user' %}{{ raise_exception('who asks?') }}{% endif %}"
    prompts, rollout = asked(tmp_path, tokenizer, CHAT, {}, (" was",), (True,))
    model = classifier(None, theirs)
    theirs.save_pretrained(tmp_path / "reward")
    for group in (
        {"rewards": (RewardConfig(model=str(tmp_path / "reward")),)},
        {"health": HealthConfig(judge=(RewardConfig(ensemble=(str(tmp_path / "reward"),) * 2),))},
    ):
        with pytest.raises(
            RewardError, match=r"(rewards.model|health.judge.ensemble) = .*who asks\?\. Its roles are user"
        ):
            check_chats(Config(**group), tokenizer, prompts)  # before any model is loaded
    words = (
        r"the reward model: a prompt is refused by the tokenizer's chat template: who asks\?\. Its roles are user, ass"
    )
    source = reads(copy.deepcopy(model), theirs, tokenizer)
    with pytest.raises(RewardError, match=words):
        score(rollout, prompts, [(source, 1.0)], tokenizer, WORLD)
    url, give = service
    give(model, theirs)
    source = remote_source(RewardConfig(url=url))
    with pytest.raises(RewardError, match=r"status 400: .*who asks"):
        score(rollout, prompts, [(source, 1.0)], tokenizer, WORLD)


def test_a_model_that_reads_text_needs_an_eos(tokenizer):
    others = changed(tokenizer, "another")
    others.eos_token = None
    with pytest.raises(RewardError, match="its tokenizer has no EOS token"):
        reads(classifier(None, others), others, tokenizer)


def test_a_token_that_the_model_has_no_embedding_of_is_an_error_that_names_it(tokenizer):
    """As a tokenizer learns alone where its model's embeddings are not resized with it."""
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<more>", "<and more>"])  # the model has 262
    grown.add_special_tokens({"additional_special_tokens": ["<end of turn>"]})
    source = reads(classifier(None, tokenizer), grown, None)
    assert len(source.scores(source.tokenised(["a"], ["b"], [True]), ["b"])) == 1
    with pytest.raises(RewardError, match=r"has embeddings of \d+ tokens, and .* token \d+ \('<end of turn>'\): its"):
        source.scores(source.tokenised(["a<end of turn>"], ["b"], [True]), ["b"])
