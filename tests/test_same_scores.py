"""A reward model says the same whether it reads the actor's tokens, tokenizes the text itself, or is a service."""

import copy
import json

import pytest
import tiny
import torch
from services import serving
from tokenizers.processors import TemplateProcessing

from fastppo.batch import Moments, Rollout, pack
from fastppo.config import DataConfig, OptimConfig, PPOConfig, RewardConfig, ZeroConfig
from fastppo.data import load_prompts
from fastppo.engine import Frozen
from fastppo.feedback import RewardError, score
from fastppo.feedback.model import ModelSource
from fastppo.feedback.remote import remote_source
from fastppo.models import RewardModel
from fastppo.serve_reward import RewardServer, alone
from fastppo.world import World

WORLD = World(0, 1, torch.device("cpu"))
TEMPLATE = "{{ bos_token }}{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
CHAT = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def tokenizer():
    """Puts a BOS before every text, as most do, and has markers for chat."""
    made = tiny.tokenizer(("<s>", "<user>", "<assistant>"))
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<user>", "<assistant>"]})
    made.chat_template = TEMPLATE
    bos = [("<s>", made.bos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    return made


@pytest.fixture(scope="module")
def model():
    return RewardModel(tiny.classifier(vocabulary=260)).requires_grad_(False).eval()


def reads(model, tokenizer, actors):
    zero = ZeroConfig(stage=0)
    return ModelSource(Frozen(model, OptimConfig(), zero), tokenizer, actors, budget=200, zero=zero, world=WORLD)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [("The film", {}), ("<s>The film", {}), ("The film was long", {"first_tokens": 6}), (CHAT, {})],
    ids=["plain", "with its BOS", "cut", "chat"],
)
def test_the_same_tokens_score_the_same_in_every_way(tmp_path, tokenizer, model, prompt, settings):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}))
    data = DataConfig(path=str(tmp_path / "prompts.jsonl"), **settings)
    prompts, _ = load_prompts(data, tokenizer, prompts_heldout=0, context=None, reserve=0)
    assert prompts.tokens[0].count(tokenizer.bos_token_id) == 1
    responses = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" was<eos>", " was", "<eos>")]
    packed = pack([[*prompts.tokens[0], *r] for r in responses], [len(r) for r in responses])
    zeros = torch.zeros(3, dtype=torch.int64)
    rollout = Rollout(packed, torch.zeros(len(packed.responses)), torch.tensor([True, False, True]), zeros)
    others = copy.deepcopy(tokenizer)
    others.add_tokens("<more>")
    with serving(RewardServer(("127.0.0.1", 0), "tiny", alone(model, tokenizer, 200, WORLD.device))) as url:
        sources = [reads(model, t, tokenizer) for t in (tokenizer, others)] + [remote_source(RewardConfig(url=url))]
        weighted = [(source, 1.0) for source in sources]
        said = score(rollout, prompts, weighted, tokenizer, PPOConfig(), Moments(), WORLD).by_source
    assert [source.same for source in sources[:2]] == [True, False]
    for way in (1, 2):
        assert said[:, way].tolist() == pytest.approx(said[:, 0].tolist(), abs=1e-6)
    assert len({round(x, 5) for x in said[:, 0].tolist()}) == 3  # the EOS makes a difference


def test_a_model_that_reads_text_needs_an_eos(tokenizer, model):
    others = copy.deepcopy(tokenizer)
    others.eos_token = None
    others.add_tokens("<more>")
    with pytest.raises(RewardError, match="its tokenizer has no EOS token"):
        reads(model, others, tokenizer)


def test_a_token_that_the_model_has_no_embedding_of_is_an_error_that_names_it(tokenizer, model):
    """As a tokenizer learns alone where its model's embeddings are not resized with it."""
    grown = copy.deepcopy(tokenizer)
    grown.add_special_tokens({"additional_special_tokens": ["<end of turn>"]})
    source = reads(model, grown, None)
    assert len(source.scores(source.tokenised(["a"], ["b"], [True]), ["b"])) == 1
    with pytest.raises(RewardError, match=r"has embeddings of 260 tokens, and .* token 260 \('<end of turn>'\): its"):
        source.scores(source.tokenised(["a<end of turn>"], ["b"], [True]), ["b"])
