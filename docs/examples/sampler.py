"""A rollout engine in one file: the plainest loop, with one forward pass over the whole sequence for each token."""

import torch

from fastppo.data import Rollout, pack


class PlainLoop:
    """Draws from the actor's whole distribution; without a cache it is slow, and easy to compare others with."""

    def __init__(self, config, roles, stop_ids, world):
        if config.sampling.top_p < 1 or config.sampling.top_k > 0:
            raise ValueError("it draws from the whole distribution: leave out sampling.top_p and sampling.top_k")
        self.sampling, self.stop_ids, self.weights = config.sampling, stop_ids, roles.sampling_weights

    def sync(self):
        self.policy = self.weights.gather()  # whole on every rank, at every ZeRO stage

    def sample(self, prompts, *, temperature, seed):
        sequences, counts, logprobs, ended = [], [], [], []
        for prompt, stream in zip(prompts.tokens, prompts.streams.tolist(), strict=True):
            response, drawn = self.respond(prompt, temperature, torch.Generator().manual_seed(seed * 2**32 + stream))
            sequences.append([*prompt, *response])
            counts.append(len(response))
            logprobs += drawn
            ended.append(response[-1] in self.stop_ids)
        return Rollout(
            pack(sequences, counts),
            torch.tensor(logprobs, dtype=torch.float32),
            torch.tensor(ended, dtype=torch.bool),
            prompts.sources,
        )

    @torch.no_grad()
    def respond(self, prompt, temperature, generator):
        """Tokens and their logprobs."""
        tokens, logprobs = list(prompt), []
        while len(logprobs) < self.sampling.max_new_tokens:
            hidden = self.policy.hidden(pack([tokens], [1]).to(self.policy.device))  # (N, H)
            logits = self.policy.head(hidden[-1:])[0].float().cpu() / temperature  # (V,)
            if len(logprobs) < self.sampling.min_new_tokens:
                logits[self.stop_ids] = -torch.inf
            distribution = logits.log_softmax(-1)
            tokens.append(int(torch.multinomial(distribution.exp(), 1, generator=generator)))
            logprobs.append(float(distribution[tokens[-1]]))
            if tokens[-1] in self.stop_ids:
                break
        return tokens[len(prompt) :], logprobs
