import random


def letters(prompts, responses, **columns):
    # random numbers of Python's own: a resumed run must go on in their row
    return [sum("a" <= c <= "z" for c in response) / 8 + random.random() / 10 for response in responses]
